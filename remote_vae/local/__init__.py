"""This machine: the whole VAE where it fits, and less and less memory where it does not."""
