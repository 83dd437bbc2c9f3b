"""Models by name and type: `load_model_and_preprocess("blip_caption", "base_coco")`. Importing this loads no torch."""

from importlib import import_module
from typing import Any

_HOMES = {
    "from_pretrained": "lavis_lite.models.loading",
    "load_model": "lavis_lite.models.loading",
    "load_preprocess": "lavis_lite.models.loading",
    "load_model_and_preprocess": "lavis_lite.models.loading",
    "model_zoo": "lavis_lite.zoo",
}
__all__ = ["from_pretrained", "load_model", "load_model_and_preprocess", "load_preprocess", "model_zoo"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
