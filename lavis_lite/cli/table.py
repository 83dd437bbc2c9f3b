"""The command `lavis-lite table`: a paper's tables, with what was measured here or the command that measures it; with
`--compare` two runs (compare.py).
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from lavis_lite.cli.failures import exit_code
from lavis_lite.cli.published import FAMILIES, Number, numbers
from lavis_lite.common.config.recipes import recipes_root
from lavis_lite.common.errors import InputError

HELP = """Print the tables of a paper. Each number is next to what the newest evaluation below the output folder
measured, with its verdict. Missing ones show the command that measures them, or why there is none.
With --compare it is the metrics of two runs on the same samples: their difference, its 95 % interval and p-value.

examples:
  lavis-lite table blip2
  lavis-lite table instructblip --output /results --json
  lavis-lite table --compare output/caption/base output/caption/large"""
COLUMNS = ("recipe", "model", "split", "metric", "published", "here", "difference", "verdict, or command below")
COMMAND = "lavis-lite "
OUTPUT = Path("output")


def table_main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `lavis-lite table`; ends the process, with exit code 2 after a user's mistake."""
    p = argparse.ArgumentParser(
        prog="lavis-lite table", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("paper", nargs="?", choices=FAMILIES, help="the paper; lavis: what LAVIS and others measured again")
    p.add_argument("--compare", nargs=2, type=Path, metavar="RUN", help="folders of two jobs, in place of a paper")
    p.add_argument("--output", type=Path, metavar="FOLDER", help="where evaluations were written (output)")
    p.add_argument("--projects", type=Path, metavar="FOLDER", help="recipes in place of the package's")
    p.add_argument("--json", action="store_true", help="print a list of objects instead of tables")
    args = p.parse_args(argv)
    if (args.paper is None) == (args.compare is None):
        p.error("name a paper, or two runs with --compare, not both")
    if args.compare and (args.output or args.projects):
        p.error("--output and --projects are of a paper's tables; --compare takes the jobs' folders")
    sys.exit(exit_code(lambda: _print(args)))


def _print(args: argparse.Namespace) -> None:
    if args.compare:
        from lavis_lite.cli import compare  # imports torch

        compared = compare.compare(*args.compare)
        shown = [one.to_json() for one in compared]
        print(json.dumps(shown, indent=1) if args.json else "\n".join(compare.lines(compared, args.compare)))
        return
    if args.output is not None and not args.output.is_dir():
        raise InputError(f"--output: not a folder: {args.output}; name the one that has the jobs' folders")
    found = numbers(args.paper, args.projects or recipes_root(), args.output or OUTPUT)
    print(json.dumps([asdict(number) for number in found], indent=1) if args.json else "\n".join(lines(found)))


def lines(found: Sequence[Number]) -> list[str]:
    """Return the lines of all tables, and a last one that counts the verdicts."""
    text = []
    for (paper, table), rows in groupby(found, key=lambda number: (number.paper, number.table)):
        text += [f"{paper}, {'table ' if table[:1].isdigit() else ''}{table}", *layout(list(rows)), ""]
    counts = Counter(number.verdict or ("not measured" if number.recipe else "no recipe") for number in found)
    counted = ", ".join(f"{count} {what}" for what, count in sorted(counts.items(), key=lambda item: -item[1]))
    return [*text, f"{len(found)} numbers: {counted}"]


def layout(rows: Sequence[Number]) -> list[str]:
    """Return the lines of one table, its columns aligned, and of the commands that it refers to by number."""
    missing = dict.fromkeys(row.how for row in rows if row.how.startswith(COMMAND))
    commands = {command: f"command {number}" for number, command in enumerate(missing, start=1)}
    cells = [COLUMNS, *(_cells(row, commands) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return table + [f"  {name}: {command}" for command, name in commands.items()]


def _cells(number: Number, commands: Mapping[str, str]) -> tuple[str, ...]:
    here = "" if number.here is None else f"{number.here:.2f}"
    difference = "" if number.difference is None else f"{number.difference:+.2f}"
    last = ": ".join(part for part in (number.verdict, commands.get(number.how, number.how)) if part)
    place = (number.recipe or "", number.model, number.split, number.metric)
    return (*place, number.published, here, difference, last)
