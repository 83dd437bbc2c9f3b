"""The command `lavis-lite`: all subcommands, with shell completion.

Subcommands with a parser of their own (`COMMANDS`) get the rest of the command line; the others are declared by typer.
A module is imported when its command runs, so that `--help` needs no torch.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from lavis_lite.cli.commands import chat, demo, doctor, explain, images, report, search, serve, zoos

COMMANDS = {
    "train": ("lavis_lite.cli.main", "train_main", "Train (and then test) what a YAML describes."),
    "evaluate": ("lavis_lite.cli.main", "evaluate_main", "Evaluate a model on the splits of a YAML."),
    "sweep": ("lavis_lite.cli.sweep", "main", "Evaluate a recipe by the alternatives of its protocol."),
    "table": ("lavis_lite.cli.table", "table_main", "Print a paper's tables next to what was measured here."),
    "capfilt": ("lavis_lite.cli.capfilt", "main", "Caption and filter a web set, and pretrain on the kept texts."),
    "data": ("lavis_lite.cli.data.command", "main", "List, download, check and show datasets."),
    "convert": ("lavis_lite.convert.__main__", "main", "Convert weights to and from Hugging Face's layout."),
}
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}

app = typer.Typer(
    name="lavis-lite",
    help="Train, evaluate and use BLIP, BLIP-2 and InstructBLIP.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:
    """Print the version and end, if it is wanted."""
    if wanted:
        from lavis_lite import __version__

        typer.echo(f"lavis_lite {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Train, evaluate and use BLIP, BLIP-2 and InstructBLIP."""


def pass_on(name: str) -> Callable[[typer.Context], None]:
    """Return the command that gives its arguments to the parser of `COMMANDS[name]`."""

    def command(context: typer.Context) -> None:
        module, function, _ = COMMANDS[name]
        started = Path(sys.argv[0])
        module_name = "lavis_lite.cli" if started.parent.name == "cli" else "lavis_lite"
        program = f"python -m {module_name}" if started.name == "__main__.py" else started.name
        sys.argv = [f"{program} {name}", *context.args]
        vars(import_module(module))[function]()

    return command


for command_name, (_, _, text) in COMMANDS.items():
    app.command(command_name, help=text, add_help_option=False, context_settings=PASSED_ON)(pass_on(command_name))
for declared in (images, search, explain, chat, demo, serve, report, zoos, doctor):
    declared.add_to(app)


def main() -> None:
    """Run the command line; ends the process."""
    app()
