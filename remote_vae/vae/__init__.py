"""What a VAE is: families, telling one from another, the VAE of a call."""
