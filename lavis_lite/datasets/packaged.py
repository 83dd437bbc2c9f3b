"""Packaged datasets whose name is a YAML: `configs/datasets/<name>/default.yaml` names a layout.

Registers, for each, the layout's builder with the YAML's settings as defaults. Only the files, which every section has
of its own, and the processors, which follow the model, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import field, fields, make_dataclass
from functools import partial
from typing import Any, get_type_hints

from lavis_lite.common.config.sections import PROCESSOR_KEYS, packaged_dataset
from lavis_lite.common.config.zoo import dataset_zoo
from lavis_lite.common.registry import registry
from lavis_lite.datasets import (  # noqa: F401  these register the layouts
    caption,
    classification,
    instruct,
    instruct_layouts,
    nlvr,
    pairs,
    retrieval,
    vqa,
)
from lavis_lite.datasets.base import BaseBuilder
from lavis_lite.datasets.shapes import builders  # noqa: F401

NO_DEFAULTS = ("build_info", *PROCESSOR_KEYS)


def with_defaults(layout: type[BaseBuilder], name: str, settings: Mapping[str, Any]) -> type[BaseBuilder]:
    """Return the layout's builder class with other defaults."""
    hints = get_type_hints(layout)
    changed = [
        (f.name, hints[f.name], field(default_factory=partial(deepcopy, settings[f.name])))
        for f in fields(layout)
        if f.name in settings and f.name not in NO_DEFAULTS
    ]
    return make_dataclass(name, changed, bases=(layout,), kw_only=True, namespace={"__module__": layout.__module__})


for _name in dataset_zoo.names():
    _section = packaged_dataset(_name)
    if "layout" in _section:
        _layout = registry.get_builder_class(_section["layout"])
        registry.register_builder(_name)(with_defaults(_layout, _name, _section))
