"""Report pages: a job's curves, metrics and predictions as one HTML file."""
