"""Videos and reports on disk."""
