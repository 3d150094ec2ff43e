"""Weights of VAEs as people have them: reading them, their names, and the VAE that names and shapes make."""

from remote_vae.server.weights.building import build, other_than
from remote_vae.server.weights.reading import INDEX_SUFFIX, SUFFIXES, read_shards, read_weights, shard_names

__all__ = ["INDEX_SUFFIX", "SUFFIXES", "build", "other_than", "read_shards", "read_weights", "shard_names"]
