"""`python -m lavis_lite`: the command `lavis-lite`."""

from lavis_lite.cli.app import main

if __name__ == "__main__":
    main()
