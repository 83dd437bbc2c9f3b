"""Metrics: plain Python and numpy in, numbers out. They know neither models nor datasets."""
