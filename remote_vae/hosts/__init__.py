"""One adapter for each UI: how to get between it and its VAE. None knows HTTP."""
