"""Published values of a recipe's metrics: the typed entries of its `expected:` section.

An entry is a fact about a model and a protocol: the recipe as its file says, with the entry's `model` and `settings`.
The verdict after an evaluation (cli/verdict.py) compares the run with it. Values are in percent, as papers print them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lavis_lite.common.config.files import Layer
from lavis_lite.common.config.schema import Checker, schema_of

TOLERANCE = 0.5
"""Difference, in percent points, up to which a value counts as reproduced where an entry does not say."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A published value, and what it was measured with."""

    split: str
    metric: str
    """Name in the task's metrics; dots separate levels, as in `per_answer_type.number`."""
    value: float
    """In percent."""
    source: str
    """Paper and table or tables, or page, e.g. `BLIP-2, tables 1, 2`; what follows a semicolon is a remark."""
    model: str | None = None
    """`<arch>/<model_type>`; None: the recipe's own."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further keys, with dots, in which the measurement differs from the recipe."""
    tolerance: float = TOLERANCE
    """Percent points."""
    num_samples: int | None = None
    """Samples of the split, as the dataset counts them: images, questions or records."""
    scorer: str | None = None
    """Rule of the VQA accuracy (`official`, `lavis`, ...); None: that of the recipe's `run.accuracy`."""
    server: str | None = None
    """The evaluation server that alone can print this value, from the result file."""
    recipe: str | None = None
    """The recipe that measures it with the weights of this training, from the family's folder: `eval/gqa`."""

    def __str__(self) -> str:
        return " ".join(part for part in (self.split, self.metric, self.scorer, self.server) if part)

    @property
    def label(self) -> str:
        """The metric's name in a table: with the scorer, if the entry names one."""
        return self.metric if self.scorer is None else f"{self.metric} ({self.scorer})"

    def changes(self) -> dict[str, Any]:
        """Return the keys, with dots, and values that turn the recipe into this entry's measurement."""
        arch, _, model_type = (self.model or "").partition("/")
        model = {"model.arch": arch, "model.model_type": model_type} if self.model else {}
        return {**model, **self.settings}

    def layer(self, source: str = "expected") -> Layer:
        """Return `changes` as a layer of the configuration; `source` is the entry's place, for messages."""
        return _layer(self.changes(), source)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as a YAML has it, without defaults."""
        schema, _ = schema_of(Expected)
        return {key: value for key, value in vars(self).items() if value != schema[key].default}


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A reading of the protocol that a published value may have been measured by, for `lavis-lite sweep`."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Keys, with dots, and their values; none: only another number of the same evaluation is read."""
    split: str | None = None
    """The split to read instead of the published value's."""
    metric: str | None = None
    """The metric to read instead of the published value's."""

    def layer(self, source: str) -> Layer:
        """Return `settings` as a layer of the configuration; `source` is the entry's place, for messages."""
        return _layer(self.settings, source)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as a YAML has it, without defaults."""
        return {key: value for key, value in vars(self).items() if value}


def _layer(settings: Mapping[str, Any], source: str) -> Layer:
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return Layer(source, tree)


def read_alternatives(entries: Any, checker: Checker) -> list[Alternative]:
    """Return the section's entries, checked; ConfigError names the entry and the key."""
    listed = checker.value(entries or [], list[dict[str, Any]], ("alternatives",))
    schema, _ = schema_of(Alternative)
    found = [
        Alternative(**checker.section(entry, schema, ("alternatives", str(number))))
        for number, entry in enumerate(listed)
    ]
    for number, alternative in enumerate(found):
        _check_settings(alternative.settings, checker, ("alternatives", str(number)))
    names = [alternative.name for alternative in found]
    if len(set(names)) < len(names):
        raise checker.error(("alternatives",), f"names must differ, got {', '.join(names)}")
    return found


def read_expected(entries: Any, checker: Checker) -> list[Expected]:
    """Return the section's entries, checked; ConfigError names the entry and the key."""
    if entries is None:
        return []
    if not isinstance(entries, Sequence) or not all(isinstance(entry, Mapping) for entry in entries):
        raise checker.error(
            ("expected",), "expected a list of entries such as {split: test, metric: CIDEr, value: 133.5, source: ...}"
        )
    found = []
    for number, entry in enumerate(entries):
        path = ("expected", str(number))
        own = Expected(**checker.section(entry, schema_of(Expected)[0], path))
        if own.model is not None and own.model.count("/") != 1:
            raise checker.error((*path, "model"), f"expected <arch>/<model_type>, got {own.model!r}")
        if own.tolerance < 0:
            raise checker.error((*path, "tolerance"), f"must be at least 0, got {own.tolerance}")
        if own.num_samples is not None and own.num_samples < 1:
            raise checker.error((*path, "num_samples"), f"must be at least 1, got {own.num_samples}")
        if not own.source.strip():
            raise checker.error((*path, "source"), f"must name a paper or page, got {own.source!r}")
        _check_settings(own.changes(), checker, path)
        found.append(own)
    return found


def _check_settings(settings: Mapping[str, Any], checker: Checker, path: tuple[str, ...]) -> None:
    """Raise ConfigError for a key that is not `<section>.<key>`, or that is a part of another key."""
    for key in settings:
        if not re.fullmatch(r"[^.]+(\.[^.]+)+", key):
            raise checker.error((*path, "settings"), f"expected keys such as run.max_len, got {key!r}")
        if longer := next((other for other in settings if other.startswith(f"{key}.")), None):
            raise checker.error((*path, "settings"), f"{key} and {longer} set the same key: leave one out")
