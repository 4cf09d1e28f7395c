"""Latents to video, chunk by chunk."""
