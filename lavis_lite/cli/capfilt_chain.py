"""The chain of `lavis-lite capfilt`, a YAML of steps: which recipe each step runs, with which options, for which rows.

A row is one reading of the ablation (BLIP, table 1). Steps with `per_row` run once for each row and seed, the others
once. Each step is a job `<output_dir>/<step>[_<row>_<seed>]`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lavis_lite.common.config.files import ConfigError, Layer, load_yaml
from lavis_lite.common.config.run import is_plain_name
from lavis_lite.common.config.schema import Checker, schema_of
from lavis_lite.common.errors import did_you_mean

ROWS = ("none", "captioner", "filter", "both")
Options = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One training or evaluation of the chain. Placeholders in options: `{output}`, `{row}`, `{seed}`, `{suffix}`."""

    recipe: str
    """A YAML of train.py or evaluate.py, relative to the chain's."""
    command: Literal["train", "evaluate"] = "train"
    per_row: bool = False
    """Whether it runs once for each row and seed."""
    rows: list[str] = field(default_factory=lambda: list(ROWS))
    """The rows that need it."""
    options: Options = field(default_factory=dict)
    """Settings that override the recipe's."""
    row_options: dict[str, Options] = field(default_factory=dict)
    """Further ones, by row."""


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The steps in order, and what the table shows."""

    output_dir: str
    steps: dict[str, Step]
    report: dict[str, str] = field(default_factory=dict)
    """Column of the table to `<step>.<split>.<metric>` of that step's evaluation."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A step for one row and seed, or for all of them (None)."""

    step: str
    row: str | None
    seed: int | None
    command: Literal["train", "evaluate"]
    recipe: Path
    folder: Path
    options: Options

    def arguments(self) -> list[str]:
        """Return the arguments of `lavis-lite`."""
        settings = {**self.options, "run.output_dir": str(self.folder.parent)}
        words = [self.command, "--cfg-path", str(self.recipe), "--job-id", self.folder.name]
        words += ["--resume", "auto"] if self.command == "train" else []
        given = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
        return [*words, "--options", *given]


def read_chain(path: Path) -> Chain:
    """Return the chain of a YAML. ConfigError for a mistake in it."""
    layer = Layer(str(path), load_yaml(path))
    checker = Checker([layer])
    content = checker.section(layer.tree, schema_of(Chain)[0], ())
    for name, step in content["steps"].items():
        if not is_plain_name(name):
            raise checker.error(("steps", name), "must be a name that a folder can have")
        for row in [*step.get("rows", []), *step.get("row_options", {})]:
            if row not in ROWS:
                raise checker.error(("steps", name, "rows"), f"no row {row!r}. {did_you_mean(row, ROWS)}")
        if not (path.parent / step["recipe"]).is_file():
            raise checker.error(("steps", name, "recipe"), f"no such file: {path.parent / step['recipe']}")
    for column, place in content.get("report", {}).items():
        step, _, rest = place.partition(".")
        if not content["steps"].get(step, {}).get("per_row") or "." not in rest:
            text = f"expected <step>.<split>.<metric> with a step that is per_row, got {place!r}"
            raise checker.error(("report", column), text)
    steps = {name: Step(**step) for name, step in content["steps"].items()}
    return Chain(**{**content, "steps": steps})


def jobs(chain: Chain, path: Path, *, rows: Sequence[str], seeds: Sequence[int], options: Sequence[str]) -> list[Job]:
    """Return all jobs in order. `options` are those of the command line, for every job."""
    found = []
    for name, step in chain.steps.items():
        needed = [row for row in rows if row in step.rows]
        cases: Iterator[tuple[str | None, int | None]]
        cases = ((row, seed) for row in needed for seed in seeds) if step.per_row else iter([(None, None)])
        for row, seed in cases if needed else ():
            found.append(_job(chain, name, row, seed, path, options))
    return found


def _job(chain: Chain, name: str, row: str | None, seed: int | None, path: Path, options: Sequence[str]) -> Job:
    step, suffix = chain.steps[name], "" if row is None else f"_{row}_{seed}"
    settings = {**step.options, **step.row_options.get(row or "", {})}
    settings |= {} if seed is None else {"run.seed": seed}
    names = {"output": chain.output_dir, "row": row, "seed": seed, "suffix": suffix}
    filled = {key: _filled(value, names) for key, value in settings.items()}
    filled |= dict(option.partition("=")[::2] for option in options)
    return Job(
        step=name,
        row=row,
        seed=seed,
        command=step.command,
        recipe=path.parent / step.recipe,
        folder=Path(chain.output_dir) / f"{name}{suffix}",
        options=filled,
    )


def _filled(value: Any, names: Mapping[str, Any]) -> Any:
    """Return an option with its placeholders replaced, also inside lists and mappings."""
    if isinstance(value, str):
        for name, word in names.items():
            value = value.replace(f"{{{name}}}", str(word))
        return value
    if isinstance(value, Mapping):
        return {key: _filled(item, names) for key, item in value.items()}
    return [_filled(item, names) for item in value] if isinstance(value, list) else value


def check_rows(rows: Sequence[str]) -> None:
    """Raise ConfigError for an unknown row, or one that is named twice."""
    for row in rows:
        if row not in ROWS:
            raise ConfigError(f"--rows: no row {row!r}. {did_you_mean(row, ROWS)}")
    if len(set(rows)) < len(rows):
        raise ConfigError(f"--rows: names a row twice: {' '.join(rows)}")
