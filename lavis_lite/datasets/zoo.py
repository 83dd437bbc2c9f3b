"""Packaged datasets whose name is a YAML: `configs/datasets/<name>/default.yaml` names a layout.

The class of such a name is the layout's builder with the YAML's settings as defaults. Only the files, which every
section has of its own, and the processors, which follow the model, are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import field, fields, make_dataclass
from functools import partial
from typing import get_type_hints

from lavis_lite.common.config.sections import PROCESSOR_KEYS
from lavis_lite.common.config.zoo import dataset_zoo, packaged_dataset
from lavis_lite.common.registry import registry
from lavis_lite.datasets.base import BaseBuilder, BaseDataset

NO_DEFAULTS = ("build_info", *PROCESSOR_KEYS)


def packaged_builder(name: str) -> type[BaseBuilder] | None:
    """Return the builder class of a packaged dataset; None for one whose YAML names no layout."""
    section = packaged_dataset(name)
    if "layout" not in section:
        return None
    layout: type[BaseBuilder] = registry.get_builder_class(section["layout"])
    hints = get_type_hints(layout)
    changed = [
        (f.name, hints[f.name], field(default_factory=partial(deepcopy, section[f.name])))
        for f in fields(layout)
        if f.name in section and f.name not in NO_DEFAULTS
    ]
    return make_dataclass(name, changed, bases=(layout,), kw_only=True, namespace={"__module__": layout.__module__})


def load_dataset(name: str, type: str = "default", splits: Iterable[str] | None = None) -> dict[str, BaseDataset]:
    """Return the datasets of `configs/datasets/<name>/<type>.yaml` by split: all splits unless some are named."""
    return registry.get_builder_class(name)(**packaged_dataset(name, type)).build(splits)


registry.tables["builder"].add_finder(dataset_zoo.names, packaged_builder)
