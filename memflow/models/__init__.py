"""The model families that a stream can run."""
