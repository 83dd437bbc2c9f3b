"""A model zoo with a registry and task runners for the BLIP family.

Importing the package loads neither torch nor transformers: `model_zoo` and `dataset_zoo` are fetched on first use, and
each kind of registered class on its first look-up.
"""

from importlib import import_module

__version__ = "0.1.0"

_LAZY = {"registry": "lavis_lite.registry", "model_zoo": "lavis_lite.zoo", "dataset_zoo": "lavis_lite.zoo"}
__all__ = ["__version__", "dataset_zoo", "model_zoo", "registry"]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_LAZY[name])
    # `lavis_lite.registry` is the submodule; importing it has bound that name already.
    return module if name == "registry" else getattr(module, name)
