"""The networks: UNet, VAE and text encoders, and the tokenizer."""
