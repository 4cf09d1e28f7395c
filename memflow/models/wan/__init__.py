"""Wan 2.1's transformer in diffusers, its text encoder and its checkpoints."""
