"""The commands `models`, `datasets` and `recipes`: what the package has, by name."""

import re
from pathlib import Path
from typing import Annotated

import typer

from lavis_lite.cli.commands.common import finish

BASES = re.compile(r"^_base_:.*\n(?:[ -].*\n)*", re.MULTILINE)
"""The key `_base_` of a YAML with its value."""


def models(
    names: Annotated[list[str] | None, typer.Argument(metavar="[ARCHITECTURE]...", show_default=False)] = None,
) -> None:
    """List the model types, as --model takes them."""

    def execute() -> None:
        from lavis_lite.common.config.zoo import model_zoo

        for name in names or model_zoo.names():
            for kind in model_zoo.types(name) or [model_zoo.path(name, "").stem]:
                typer.echo(f"{name}/{kind}")

    finish(execute)


def datasets() -> None:
    """List the packaged datasets and their files here."""

    def execute() -> int:
        from argparse import Namespace

        from lavis_lite.cli.data.listing import run

        return run(Namespace(names=[], here=False))

    finish(execute)


def recipes(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[WORD]...", help="only names with all of these", show_default=False)
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="print the YAML of the recipe that is named")] = False,
    copy: Annotated[
        Path | None, typer.Option(help="copy the recipe that is named to this file, with what it is based on")
    ] = None,
) -> None:
    """List the recipes, as --cfg-path takes them."""

    def execute() -> None:
        from lavis_lite.common.config.recipes import find_recipe, recipe_names
        from lavis_lite.common.errors import InputError, did_you_mean

        if not show and copy is None:
            found = [name for name in recipe_names() if all(word in name for word in words or [])]
            if not found:
                wanted = " ".join(words or [])
                raise InputError(f"recipes: no name has {wanted!r}. {did_you_mean(wanted, recipe_names())}")
            typer.echo("\n".join(found))
            return
        if len(words or []) != 1:
            raise InputError("recipes: name one recipe to show or copy; `lavis-lite recipes` lists them")
        path = find_recipe((words or [""])[0])
        if show:
            typer.echo(path.read_text().rstrip())
        if copy is not None:
            copy_recipe(path, copy)

    finish(execute)


def copy_recipe(path: Path, target: Path) -> None:
    """Copy a recipe; of one that is based on others, `_base_` names those by their full paths.

    Raises ExistingFileError if the target exists.
    """
    import yaml

    from lavis_lite.common.checkpoint import write_text
    from lavis_lite.common.errors import ExistingFileError

    if target.exists():
        raise ExistingFileError(f"--copy {target} exists already; name another file")
    text = path.read_text()
    bases = (yaml.safe_load(text) or {}).get("_base_") or []
    bases = [bases] if isinstance(bases, str) else bases
    if bases:
        full = yaml.safe_dump({"_base_": [str((path.parent / base).resolve()) for base in bases]})
        text = BASES.sub(lambda _: full, text, count=1)
    write_text(target, text)


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (models, datasets, recipes):
        app.command(command.__name__)(command)
