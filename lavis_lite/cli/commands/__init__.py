"""Commands that are declared by typer. Modules here import torch only inside functions, for quick `--help`."""
