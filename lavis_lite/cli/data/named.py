"""The datasets that a command line names: a packaged dataset, or those of a recipe."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis_lite.common.config.config import Config
from lavis_lite.common.config.files import load_with_bases, parse_options, resolve_key
from lavis_lite.common.config.recipes import find_recipe, named_recipe
from lavis_lite.common.config.zoo import dataset_zoo, packaged_dataset
from lavis_lite.common.errors import InputError, MissingFileError, UnknownNameError
from lavis_lite.common.registry import did_you_mean, registry
from lavis_lite.datasets.base import BaseBuilder
from lavis_lite.datasets.storage import num_samples, section_of
from lavis_lite.tasks.base import make_builder, wanted_splits

READ_BEFORE = ("model.checkpoint", "model.llm_lora")
"""Settings whose files the configuration reads, since they say how a model was trained."""


@dataclass(frozen=True, kw_only=True)
class NamedDataset:
    """One dataset: its name, its builder, and the splits that are meant."""

    name: str
    builder: BaseBuilder
    splits: list[str]
    sizes: Mapping[str, int]
    """Published numbers of samples by split, of the files that have them."""
    train_splits: Sequence[str] = ("train",)

    @property
    def build_info(self) -> Mapping[str, Any]:
        return self.builder.build_info

    def annotation_keys(self) -> list[str]:
        """Return the keys of `build_info.annotations` that the splits need: theirs, and those of files for all splits,
        such as a vocabulary.
        """
        every = self.builder.splits()
        wanted = {self.builder.source_of(split) for split in self.splits}
        entries = section_of(self.build_info, "annotations").items()
        return [key for key, entry in entries if entry is not None and (key in wanted or key not in every)]


def is_recipe(name: str) -> bool:
    """Return whether a name is that of a recipe or a YAML file, and not of a packaged dataset."""
    return Path(name).suffix in (".yaml", ".yml") or Path(name).is_file() or named_recipe(name) is not None


def find_datasets(name: str, *, splits: Sequence[str] = (), options: Sequence[str] = ()) -> list[NamedDataset]:
    """Return the dataset `<name>` or `<name>/<type>`, or the datasets of a recipe with the splits that it uses.

    `splits` selects some of them. Raises UnknownNameError for an unknown dataset, and for a split that none has.
    """
    if is_recipe(name):
        found = of_recipe(read_recipe(name, options)[0])
    else:
        found = [_packaged(name)]
        if options:
            raise InputError(f"--options: {options[0]} is a recipe's setting, and {name} is a packaged dataset")
    known = dict.fromkeys(split for one in found for split in one.builder.splits())
    for split in splits:
        if split not in known:
            raise UnknownNameError(f"{name} has no split {split!r}. {did_you_mean(split, known)}")
    return [_selected(one, splits) for one in found] if splits else found


def read_recipe(path: str, options: Sequence[str] = ()) -> tuple[Config, dict[str, str]]:
    """Return a recipe's configuration, for which nothing is downloaded, and the sources that it would have read and
    that are not here, by setting: a checkpoint's settings are then not in it.

    Raises InputError for a packaged dataset's name, and ConfigError for a mistake in the file.
    """
    if not is_recipe(path) and path.partition("/")[0] in dataset_zoo:
        raise InputError(
            f"{path}: is a packaged dataset, not a recipe's file; `lavis-lite data check {path}` checks it"
        )
    with offline():
        try:
            return Config.from_file(path, options), {}
        except MissingFileError:
            own = [*load_with_bases(find_recipe(path)), *([parse_options(options)] if options else [])]
            named = {key: resolve_key(own, tuple(key.split("."))) for key in READ_BEFORE}
            unread = {key: source for key, source in named.items() if isinstance(source, str)}
            if not unread:
                raise
            return Config.from_file(path, [*options, *(f"{key}=null" for key in unread)]), unread


def of_recipe(cfg: Config) -> list[NamedDataset]:
    """Return the datasets of a configuration, each with those of its splits that the run uses."""
    wanted, found = wanted_splits(cfg.run), []
    for name, section in cfg.datasets.items():
        builder = make_builder(cfg, name)
        packaged = _section_or_none(section.get("builder") or name, cfg.dataset_types.get(name, "default"))
        found.append(
            NamedDataset(
                name=name,
                builder=builder,
                splits=[split for split in builder.splits() if split in wanted],
                sizes=published_sizes(builder, packaged),
                train_splits=cfg.run.train_splits,
            )
        )
    return found


def published_sizes(builder: BaseBuilder, packaged: Mapping[str, Any] | None) -> dict[str, int]:
    """Return the number of samples of each split whose YAML has it.

    A split of which a recipe replaced the files of a packaged dataset has another number, unless it says so.
    """
    own = section_of(builder.build_info, "annotations")
    theirs = (packaged or {}).get("build_info", {}).get("annotations") or {}
    sizes = {}
    for split in builder.splits():
        number = num_samples(builder.build_info, split)
        before = theirs.get(split) or {}
        is_inherited = before.get("num_samples") == number
        is_same = all(before.get(key) == (own.get(split) or {}).get(key) for key in ("url", "storage"))
        if number is not None and (is_same or not is_inherited):
            sizes[split] = number
    return sizes


def _packaged(name: str) -> NamedDataset:
    name, _, kind = name.partition("/")
    if name not in dataset_zoo:
        raise UnknownNameError(
            f"unknown dataset {name!r}. {did_you_mean(name, dataset_zoo.names())} `lavis-lite data list` lists all; a "
            "recipe is named by its file, FILE.yaml"
        )
    section = packaged_dataset(name, kind or "default")
    builder: BaseBuilder = registry.get_builder_class(name)(**section)
    return NamedDataset(name=name, builder=builder, splits=builder.splits(), sizes=published_sizes(builder, section))


def _section_or_none(name: str, kind: str) -> dict[str, Any] | None:
    return packaged_dataset(name, kind) if kind in dataset_zoo.types(name) else None


def _selected(one: NamedDataset, splits: Sequence[str]) -> NamedDataset:
    return NamedDataset(
        name=one.name,
        builder=one.builder,
        splits=[split for split in one.builder.splits() if split in splits],
        sizes=one.sizes,
        train_splits=one.train_splits,
    )


def require_samples(found: Sequence[NamedDataset], name: str) -> None:
    """Raise MissingFileError if no dataset has a split: one for the user's own files."""
    if not any(one.splits for one in found):
        raise MissingFileError(
            f"{name} names no files: it is for your own. Write a recipe that sets build_info of it (docs/data.md), and "
            "name the recipe"
        )


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Let nothing be downloaded inside: a check must not change what is here."""
    before = os.environ.get("LAVIS_LITE_OFFLINE")
    os.environ["LAVIS_LITE_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LAVIS_LITE_OFFLINE"]
        else:
            os.environ["LAVIS_LITE_OFFLINE"] = before
