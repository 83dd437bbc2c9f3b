"""All published numbers of the papers, each with its recipe or the reason why there is none, and what was measured.

They are the `expected:` entries of the evaluation recipes and, where no recipe can measure them with public weights,
the rows of configs/published.csv. Imports no torch, so that a table appears at once.
"""

import csv
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lavis_lite.common.config.expected import Expected, read_expected
from lavis_lite.common.config.files import load_with_bases, merge_layers
from lavis_lite.common.config.recipes import named_recipe
from lavis_lite.common.config.schema import Checker
from lavis_lite.common.config.zoo import CONFIGS
from lavis_lite.common.errors import InputError

ALL = ("blip", "blip2", "instructblip")
FAMILIES: dict[str, tuple[str, ...]] = {**{name: (name,) for name in ALL}, "lavis": ALL}
"""The published numbers that `lavis-lite table` prints, and the folders of recipes that measure it."""
PAPERS = {"blip": ("BLIP",), "blip2": ("BLIP-2",), "instructblip": ("InstructBLIP",), "lavis": ("LAVIS", "mmpretrain")}
EVALUATION = "evaluation.json"
"""The file in a job's folder with what an evaluation measured."""
DATA_FILE = CONFIGS / "published.csv"
REASONS = ("not released", "ablation", "cited", "third party", "needs training", "no code")
"""Why no evaluation recipe measures a row of the data file: its weights were not released, it is an ablation without
weights, another paper's, or a user's; it needs a training, or code that does not exist here."""


@dataclass(frozen=True, kw_only=True)
class Number:
    """One published number. `here` and `difference` are in percent."""

    paper: str
    table: str
    recipe: str | None
    """`<family>/<folder>/<name>`."""
    model: str
    split: str
    metric: str
    published: str
    """In percent; a few reports give only `~55`."""
    here: float | None = None
    difference: float | None = None
    verdict: str | None = None
    """The verdict of the newest evaluation; None: not measured yet."""
    how: str = ""
    """Why the verdict is what it is, the command that measures the number, or why there is none."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe's published values and its own model."""

    name: str
    path: Path
    model: str
    entries: list[Expected]

    def shown(self) -> str:
        """Return what a command line names it by: its name, or its path where it is not the package's."""
        return shlex.quote(self.name if named_recipe(self.name) == self.path else str(self.path))


def numbers(name: str, projects: Path, output: Path) -> list[Number]:
    """Return the published numbers of `blip`, `blip2`, `instructblip` or `lavis`, by paper and table.

    Raises InputError if `projects` has no recipes, or a file is not what it should be.
    """
    measured = evaluations(output)
    found: list[Number] = []
    recipes: dict[str, Recipe] = {}
    for recipe in read_recipes(projects, FAMILIES[name]):
        recipes[recipe.name] = recipe
        if "/eval/" in recipe.name:
            found += [number for entry in recipe.entries for number in _of_entry(recipe, entry, measured)]
    found += [_of_row(row, recipes, measured) for row in data_file()]
    return sorted((number for number in found if number.paper in PAPERS[name]), key=_order)


def _order(number: Number) -> tuple[Any, ...]:
    first = re.search(r"\d+", number.table)
    return number.paper, not number.table[:1].isdigit(), int(first[0]) if first else 0, number.table


def read_recipes(projects: Path, families: Sequence[str]) -> Iterator[Recipe]:
    """Yield the evaluation and training recipes of some families that have published values."""
    for family in families:
        if not (projects / family / "eval").is_dir():
            raise InputError(f"--projects: {projects} has no {family}/eval: name the folder of the recipes")
        for path in sorted((projects / family).glob("*/[!_]*.yaml")):
            layers = load_with_bases(path)
            entries = read_expected(layers[-1].tree.get("expected"), Checker(layers))
            if entries:
                model = merge_layers(layers)["model"]
                own = f"{model.get('arch')}/{model.get('model_type')}"
                yield Recipe(name=f"{family}/{path.parent.name}/{path.stem}", path=path, model=own, entries=entries)


def tables_of(source: str) -> list[tuple[str, str]]:
    """Return paper and table of a source: of `BLIP, tables 1, 7` both tables; `LAVIS, docs/benchmark.rst` has one."""
    found = re.match(r"([\w-]+), tables? (\d+(?:, \d+)*)", source)
    if found:
        return [(found[1], table) for table in found[2].split(", ")]
    paper, _, place = source.partition(", ")
    return [(paper, re.split(r"; | \(", place)[0])]


def data_file(path: Path = DATA_FILE) -> list[dict[str, str]]:
    """Return the rows of the data file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def evaluations(output: Path) -> list[dict[str, Any]]:
    """Return the contents of all `evaluation.json` below a folder, the newest first."""
    found = []
    for path in output.rglob(EVALUATION):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            recipe = "/".join(Path(content["provenance"]["recipe"]).parts[-3:])
            found.append((str(content["provenance"]["date"]), recipe, [dict(row) for row in content["verdict"]]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not the result of an evaluation ({error!r}); move it elsewhere") from None
    newest = sorted(found, key=lambda item: item[0], reverse=True)
    return [{"recipe": recipe, "rows": rows} for _, recipe, rows in newest]


def _of_entry(recipe: Recipe, entry: Expected, measured: Sequence[Mapping[str, Any]]) -> list[Number]:
    """Return an entry once for each table that has it."""
    model = entry.model or recipe.model
    row = _measured(recipe, entry, model, measured)
    number = Number(
        paper="",
        table="",
        recipe=recipe.name,
        model=model,
        split=entry.split,
        metric=entry.label,
        published=str(entry.value),
        how=command(recipe, entry),
    )
    if row is not None:
        how = "; ".join(row["reasons"])
        number = replace(number, here=row["here"], difference=row["difference"], verdict=row["verdict"], how=how)
    return [replace(number, paper=paper, table=table) for paper, table in tables_of(entry.source)]


def _measured(
    recipe: Recipe, entry: Expected, model: str, measured: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """Return the verdict's row about an entry: of the newest evaluation that compares, else of the newest that has one.

    A later trial with `--limit` or another model does not hide a comparison.
    """
    wanted: dict[str, Any] = {"split": entry.split, "metric": entry.label, "model": model}
    wanted |= {"published": entry.value, "source": entry.source}
    own = [evaluation["rows"] for evaluation in measured if evaluation["recipe"] == f"{recipe.name}.yaml"]
    found = [row for rows in own for row in rows if wanted.items() <= row.items()]
    return next((row for row in found if row["verdict"] in ("reproduced", "differs")), found[0] if found else None)


def command(recipe: Recipe, entry: Expected) -> str:
    """Return the command that measures an entry; of a training's entry, the command that trains."""
    changes = entry.changes()
    if changes.get("model.arch") == recipe.model.split("/")[0]:
        del changes["model.arch"]
    options = "".join(f" {_option(key, value)}" for key, value in changes.items())
    verb = "train" if "/train/" in recipe.name else "evaluate"
    return f"lavis-lite {verb} --cfg-path {recipe.shown()}{' --options' if options else ''}{options}"


def _option(key: str, value: Any) -> str:
    plain = isinstance(value, str) and re.fullmatch(r"[\w./-]+", value)
    return shlex.quote(f"{key}={value if plain else json.dumps(value, ensure_ascii=False)}")


def _of_row(row: Mapping[str, str], recipes: Mapping[str, Recipe], measured: Sequence[Mapping[str, Any]]) -> Number:
    """Return a row of the data file: as the training recipe that it names says, or with its reason."""
    place = (row["paper"], row["table"])
    recipe = recipes.get(row["recipe"])
    how = row["reason"]
    if recipe is not None:
        for entry in recipe.entries:
            if entry.value == float(row["value"]) and place in tables_of(entry.source):
                (number,) = (n for n in _of_entry(recipe, entry, measured) if (n.paper, n.table) == place)
                return number if number.verdict else replace(number, how=f"{how}: {number.how}")
        how += f": see {recipe.shown()}"
    return Number(
        paper=row["paper"],
        table=row["table"],
        recipe=row["recipe"] or None,
        model=row["model"],
        split=f"{row['dataset']}, {row['split']}",
        metric=row["metric"],
        published=row["value"],
        how=how,
    )
