"""What a stream remembers."""
