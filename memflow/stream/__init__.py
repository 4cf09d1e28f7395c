"""One story, made chunk by chunk."""
