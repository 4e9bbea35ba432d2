"""From noise to images: the denoising loop and the VAE decoder."""
