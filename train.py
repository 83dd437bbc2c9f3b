"""Train what a YAML describes: `python train.py --cfg-path X [--options a.b=c ...]`, or the same under torchrun."""

from lavis_lite.cli.main import train_main

if __name__ == "__main__":
    train_main()
