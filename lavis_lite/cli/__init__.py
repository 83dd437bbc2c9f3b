"""Commands: train, evaluate and convert."""
