"""Tasks: what is computed for each sample, how it is scored, and which files are written."""
