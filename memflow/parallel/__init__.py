"""One story over several processes: what they exchange (`ranks`), and how they start and end together (`joining`)."""
