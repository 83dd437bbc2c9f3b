"""Tasks say what a result means: what is computed for each sample, how it is scored, which files are left."""
