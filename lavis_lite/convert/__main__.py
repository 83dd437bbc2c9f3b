"""`python -m lavis_lite.convert`: see lavis_lite/cli/convert.py."""

from lavis_lite.cli.convert import main

if __name__ == "__main__":
    main()
