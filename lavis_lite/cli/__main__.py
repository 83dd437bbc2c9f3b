"""The command `lavis-lite`, also `python -m lavis_lite.cli`, and its subcommands."""

import sys
from importlib import import_module
from pathlib import Path

COMMANDS = {
    "train": ("lavis_lite.cli.main", "train_main", "train (and then test) what a YAML describes"),
    "evaluate": ("lavis_lite.cli.main", "evaluate_main", "evaluate a model on the splits of a YAML"),
    "sweep": ("lavis_lite.cli.sweep", "main", "evaluate a recipe by the alternatives of its protocol"),
    "table": ("lavis_lite.cli.table", "table_main", "print a paper's tables next to what was measured here"),
    "capfilt": ("lavis_lite.cli.capfilt", "main", "caption and filter a web set, and pretrain on the kept texts"),
    "data": ("lavis_lite.cli.data.command", "main", "list, download, check and show datasets, and what a recipe needs"),
    "convert": ("lavis_lite.convert.__main__", "main", "convert weights between LAVIS's layout and Hugging Face's"),
}


def main() -> None:
    """Run the subcommand named first on the command line; ends the process."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("", "-h", "--help", "--version"):
        from lavis_lite import __version__

        lines = [f"  {command:<10}{text}" for command, (_, _, text) in COMMANDS.items()]
        usage = ["usage: lavis-lite COMMAND ...", "", *lines, "", "lavis-lite COMMAND --help explains a command."]
        text = f"lavis_lite {__version__}" if name == "--version" else "\n".join(usage)
        print(text, file=sys.stdout if name else sys.stderr)
        sys.exit(0 if name else 2)
    if name not in COMMANDS:
        from lavis_lite.common.registry import did_you_mean

        print(f"error: lavis-lite: unknown command {name!r}. {did_you_mean(name, COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    module, function, _ = COMMANDS[name]
    program = Path(sys.argv[0]).name
    sys.argv = [f"{'python -m lavis_lite.cli' if program == '__main__.py' else program} {name}", *sys.argv[2:]]
    vars(import_module(module))[function]()


if __name__ == "__main__":
    main()
