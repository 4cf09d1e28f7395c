"""Original checkpoint files to a folder that loads."""
