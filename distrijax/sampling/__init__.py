"""Noise to images: the denoising loop and decoding."""
