"""Processors turn a raw image or text into a model's input. Importing this package imports no processor."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavis_lite.processors.base import BaseProcessor


def load_processor(name: str, cfg: Mapping[str, Any] | None = None) -> "BaseProcessor":
    """Return the registered processor `name`, built from the arguments in `cfg` (its defaults when None).

    Raises KeyError for an unknown name and ValueError for an unknown argument, both with the nearest one.
    """
    from lavis_lite.common.registry import registry

    return registry.get_processor_class(name).from_config(cfg)
