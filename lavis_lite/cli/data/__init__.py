"""The command `lavis-lite data`: list, download, check and show datasets, and what a recipe needs."""
