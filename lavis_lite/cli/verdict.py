"""The verdict after an evaluation: its metrics beside the published values that its recipe expects.

A published value was measured by a protocol: the recipe as the file with `expected:` says, with the entry's model and
settings. A run that differs from it, or that evaluated another number of samples, is not comparable. Weights and the
places of files are not part of the protocol, nor are batch sizes and the device.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lavis_lite.common.config.config import Config
from lavis_lite.common.config.expected import Expected
from lavis_lite.common.config.files import ConfigError, Layer, load_with_bases
from lavis_lite.common.registry import did_you_mean, registry
from lavis_lite.tasks.metrics.mean import Mean
from lavis_lite.tasks.metrics.vqa_accuracy import Variant

Verdict = Literal["reproduced", "differs", "not comparable", "by server"]
OTHER = re.compile(
    r"model\.(checkpoint|pretrained|finetuned|load_\w+|init_\w+|tokenizer|\w+_model|\w*grad_checkpoint|\w*grad_ckpt)"
    r"|.*\.build_info\..*|.*_processor\.train\..*|datasets\..*\.builder"
    r"|run\.(report_metric|annotation_file|metrics)"
)
"""Settings that are not part of a protocol."""
TRAINING = ("init_lr", "max_epoch", "max_iters", "weight_decay", "lr_layer_decay", "train_dataset_sampling")
"""Settings of the run that are part of a training's protocol."""
PRECISIONS = ("run.precision", "model.vit_precision", "model.llm_precision")
"""Settings that the machine may decide: left out or `auto`, they equal any value."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published value and what the run measured; values and the difference are in percent."""

    split: str
    metric: str
    key: str
    """Name of the metric in the results, with dots."""
    model: str
    here: float | None
    interval: tuple[float, float] | None
    """95 % interval of `here`."""
    published: float
    difference: float | None
    verdict: Verdict
    source: str
    num_samples: int | None
    expected_samples: int | None
    reasons: list[str]
    """Why the value is not comparable."""


References = Mapping[str, Config]
"""The configurations that a recipe's values were measured with, by `str` of an entry's `changes`."""


def judge(
    cfg: Config, results: Mapping[str, Mapping[str, Any]], num_samples: Mapping[str, int], references: References
) -> list[Row]:
    """Return a row for each published value that is for this run, of those that its recipe measures itself.

    `results` and `num_samples` are by split, `references` is what `check_expected` returns. Of several values of one
    metric it is the one whose model and settings are nearest to the run's, and all others that were published of the
    same measurement.
    """
    candidates: dict[str, list[Expected]] = {}
    for entry in cfg.expected:
        if entry.recipe is None and entry.split in results:
            candidates.setdefault(str(entry), []).append(entry)
    rows = []
    for entries in candidates.values():
        found = [(entry, references[str(entry.changes())]) for entry in entries]
        own = [pair for pair in found if _model(pair[1]) == _model(cfg)] or found[:1]
        nearest, reasons, model = min(
            ((entry, changes(cfg, reference), _model(reference)) for entry, reference in own), key=lambda c: len(c[1])
        )
        same = [entry for entry in entries if entry.changes() == nearest.changes()]
        rows += [_row(cfg, entry, results[entry.split], num_samples.get(entry.split), reasons, model) for entry in same]
    return rows


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what reading a configuration logs: the run's own was logged already."""
    configuration = logging.getLogger("lavis_lite.common.config")
    level = configuration.level
    configuration.setLevel(logging.WARNING)
    try:
        yield
    finally:
        configuration.setLevel(level)


def _recipe(cfg: Config, *more: Layer) -> Config:
    """Return the recipe as the file with `expected:` says, without options or files based on it."""
    layers = load_with_bases(Path(cfg.source))
    end = max(number for number, layer in enumerate(layers) if "expected" in layer.tree)
    with _quiet():
        return Config.from_layers([*layers[: end + 1], *more], source=cfg.source)


def check_expected(cfg: Config) -> References:
    """Return the configurations that the recipe's values were measured with, before the run.

    Raises ConfigError for an entry whose split the recipe does not evaluate, whose metric its task does not compute, or
    whose model or settings do not exist.
    """
    references: dict[str, Config] = {}
    if not cfg.expected:
        return references
    recipe = _recipe(cfg)
    from lavis_lite.tasks.base import setup_task

    task = setup_task(recipe)
    splits, names = [*recipe.run.valid_splits, *recipe.run.test_splits], task.metric_names()
    scorers = {*names} & {*get_args(Variant)} | {recipe.task.get("accuracy", "")}
    for number, entry in enumerate(cfg.expected):
        for key, value, known in (
            ("split", entry.split, splits),
            ("metric", entry.metric.split(".")[0], names),
            ("scorer", entry.scorer or "", scorers | {""}),
        ):
            if entry.recipe is None and known and value not in known:
                advice = did_you_mean(value, [*filter(None, known)]) if {*known} != {""} else "Leave it out."
                raise ConfigError(f"{cfg.source}: expected.{number}.{key}: this recipe measures no {value!r}. {advice}")
        if entry.recipe is None and (changes := str(entry.changes())) not in references:
            references[changes] = _recipe(cfg, entry.layer(f"{cfg.source}: expected.{number}"))
    return references


def _model(cfg: Config) -> str:
    return f"{cfg.model['arch']}/{cfg.model.get('model_type')}"


def changes(cfg: Config, reference: Config) -> list[str]:
    """Return a line for each setting of the protocol that differs from the reference's."""
    if _model(cfg) != _model(reference):
        return [f"model {_model(cfg)}, the value is for {_model(reference)}"]
    ours, theirs = (protocol(one, training=not cfg.run.evaluate) for one in (cfg, reference))
    lines = []
    for key in sorted(ours.keys() | theirs.keys()):
        here, there = ours.get(key), theirs.get(key)
        if here != there and not (key in PRECISIONS and {here, there} & {None, "auto"}):
            value = "without it" if there is None else f"for {_shown(there)}"
            lines.append(f"{key}: {'not set' if here is None else _shown(here)}, the value is {value}")
    return lines


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def protocol(cfg: Config, *, training: bool = False) -> dict[str, Any]:
    """Return the settings that a measured value depends on, by key with dots; of a `training` also how it trains."""
    tree = cfg.to_dict()
    from lavis_lite.tasks.base import setup_task

    task = setup_task(cfg)
    run = {name: value for name, value in vars(task).items() if not name.startswith("_")}
    run |= {"task": cfg.run.task, "precision": cfg.run.precision, "limit": cfg.run.limit}
    if training:
        run |= {key: vars(cfg.run)[key] for key in TRAINING}
    found = _flat({"model": tree["model"], "datasets": tree["datasets"], "run": run})
    return {key: value for key, value in found.items() if not OTHER.fullmatch(key) and value is not None}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def _row(
    cfg: Config, entry: Expected, metrics: Mapping[str, Any], number: int | None, reasons: Sequence[str], model: str
) -> Row:
    key = key_of(entry, cfg.task.get("accuracy"))
    value = lookup(metrics, key)
    scale = unit(cfg, key)
    here = None if value is None else scale * float(value)
    interval = None
    if isinstance(value, Mean):
        low, high = value.interval()
        interval = scale * low, scale * high
    problems = list(reasons)
    if entry.num_samples is not None and number is not None and number != entry.num_samples:
        problems.append(f"{number:,} of {entry.num_samples:,} samples")
    if here is None and entry.server is None:
        problems.append(_why_missing(metrics, entry))
    difference = None if here is None else here - entry.value
    if entry.server is not None:
        verdict: Verdict = "by server"
        problems.append(f"only {entry.server} prints it, from the result file")
    elif problems or difference is None:
        verdict = "not comparable"
    else:
        # the published value is rounded: half a unit of its last digit is not a difference
        verdict = "reproduced" if abs(difference) <= entry.tolerance + 1e-9 else "differs"
    return Row(
        split=entry.split,
        metric=entry.label,
        key=key,
        model=model,
        here=here,
        interval=interval,
        published=entry.value,
        difference=difference,
        verdict=verdict,
        source=entry.source,
        num_samples=number,
        expected_samples=entry.num_samples,
        reasons=problems,
    )


def key_of(entry: Expected, accuracy: str | None) -> str:
    """Return the key of an entry's metric in the results of a task with this `accuracy`.

    VQATask prints a script's overall accuracy under the script's name, and its tables with that as prefix.
    """
    if entry.scorer in (None, accuracy):
        return entry.metric
    return str(entry.scorer) if entry.metric == "overall" else f"{entry.scorer}_{entry.metric}"


def lookup(metrics: Mapping[str, Any], key: str) -> float | None:
    """Return the metric under a key with dots, in the task's unit; None if it was not measured."""
    node: Any = metrics
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node if isinstance(node, int | float) else None


def unit(cfg: Config, key: str) -> int:
    """Return the factor that turns a metric of the run's task into percent."""
    return 100 if key.split(".")[-1] in registry.get_task_class(cfg.run.task).fractions else 1


def in_percent(cfg: Config, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return all numbers of a split's metrics, in percent, by key with dots."""
    flat = _flat(metrics)
    return {key: unit(cfg, key) * float(value) for key, value in flat.items() if isinstance(value, int | float)}


def _why_missing(metrics: Mapping[str, Any], entry: Expected) -> str:
    left_out = metrics.get("left_out", {})
    return str(left_out.get(entry.metric.split(".")[-1]) or metrics.get("note") or f"{entry.metric} was not measured")


COLUMNS = ("metric", "here", "95 % interval", "published", "difference", "verdict", "source")


def table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the verdict: the table, the numbers of samples, and what makes values not comparable."""
    cells = [COLUMNS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    sizes = {(row.split, row.num_samples, row.expected_samples) for row in rows if row.num_samples is not None}
    with_total = {split for split, _, total in sizes if total is not None}
    for split, number, total in sorted(sizes, key=str):
        if total is None and split in with_total:
            continue
        lines.append(f"{split}: {number:,} samples" if total is None else f"{split}: {number:,} of {total:,} samples")
    reasons = {reason: None for row in rows for reason in row.reasons}
    return [*lines, *(f"{'by server' if 'prints it' in reason else 'not comparable'}: {reason}" for reason in reasons)]


def _cells(row: Row) -> tuple[str, ...]:
    interval = "" if row.interval is None else "{:.2f} to {:.2f}".format(*row.interval)
    here, difference = ("" if value is None else value for value in (row.here, row.difference))
    return (
        f"{row.split} {row.metric}",
        here if isinstance(here, str) else f"{here:.2f}",
        interval,
        str(row.published),
        difference if isinstance(difference, str) else f"{difference:+.2f}",
        row.verdict,
        row.source,
    )


def exit_code(rows: Sequence[Row]) -> int:
    """Return 1 if a value differs, 3 if none differs but some cannot be compared or there is none, else 0."""
    verdicts = [row.verdict for row in rows if row.verdict != "by server"]
    if "differs" in verdicts:
        return 1
    return 3 if not verdicts or "not comparable" in verdicts else 0


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as plain dictionaries."""
    return [asdict(row) for row in rows]
