"""Evaluate what a YAML describes: `python evaluate.py --cfg-path X [--checkpoint PATH]`, or the same under torchrun."""

from lavis_lite.cli.main import evaluate_main

if __name__ == "__main__":
    evaluate_main()
