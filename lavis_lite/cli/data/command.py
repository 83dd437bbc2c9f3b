"""`lavis-lite data`: one subcommand per module of this package.

Exit codes: 0 all is well, 1 something is missing or wrong (it is in the report), 2 the command line or a file is wrong.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from lavis_lite.cli.failures import exit_code

DESCRIPTION = """List, download, check and show datasets, and what a recipe needs.

examples:
  lavis-lite data list
  lavis-lite data status projects/blip/eval/caption_coco.yaml
  lavis-lite data download coco_caption --split val --images
  lavis-lite data check coco_caption --split val --decode all
  lavis-lite data preview projects/blip/quickstart/caption.yaml --out sheet.png"""
DATASET = "a packaged dataset (coco_caption, gqa/balanced_val) or a recipe's YAML"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `lavis-lite data`; ends the process."""
    argv = sys.argv[1:] if argv is None else list(argv)
    p = parser()
    if not argv:
        p.print_help(sys.stderr)
        sys.exit(2)
    args = p.parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    execute: Callable[[argparse.Namespace], int] = vars(import_module(f"lavis_lite.cli.data.{args.module}"))["run"]
    sys.exit(exit_code(lambda: execute(args), command=[sys.argv[0], *argv]))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="lavis-lite data", description=DESCRIPTION, formatter_class=raw)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, module: str, text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        found.set_defaults(module=module)
        return found

    one = add("list", "listing", "list the packaged datasets, and which of their files are here")
    one.add_argument("names", nargs="*", metavar="NAME", help="only these")
    one.add_argument("--here", action="store_true", help="only datasets of which some file is here")

    one = add("status", "status", "list everything that a recipe needs: files, weights, packages; and what is missing")
    one.add_argument("recipe", metavar="RECIPE", help="the recipe's YAML")
    _add_options(one)
    one.add_argument("--json", action="store_true", help="print JSON in place of the table")

    one = add("check", "check", "check the files of a dataset: there, read, of the published size, without repetitions")
    _add_dataset(one)
    one.add_argument(
        "--decode", default="100", metavar="N|all", help="decode so many images or videos per split (100); 0: none"
    )
    one.add_argument("--strict", action="store_true", help="end with 1 also for repetitions and overlaps")

    one = add("download", "download", "download a dataset's annotations and, if their owner publishes them, its images")
    _add_dataset(one)
    one.add_argument("--images", action="store_true", help="images or videos too")
    one.add_argument("--keep-archives", action="store_true", help="do not delete an archive after unpacking it")

    one = add("preview", "preview", "draw a contact sheet of samples with their texts, as a model gets them")
    _add_dataset(one)
    one.add_argument("-n", type=int, default=24, metavar="N", help="samples per split (24)")
    one.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .png, or an .html page")
    return p


def _add_dataset(p: argparse.ArgumentParser) -> None:
    p.add_argument("dataset", metavar="NAME|RECIPE", help=DATASET)
    p.add_argument("--split", nargs="+", action="extend", default=[], metavar="SPLIT", help="only these splits")
    _add_options(p)


def _add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings, as train.py's"
    )
