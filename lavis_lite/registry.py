"""The registry under its short path: `from lavis_lite.registry import registry`.

Note: importing this module binds `lavis_lite.registry` to it, so its attributes are the registry's.
"""

from typing import Any

from lavis_lite.common.registry import Registry, RegistryError, did_you_mean, registry

__all__ = ["Registry", "RegistryError", "did_you_mean", "registry"]


def __getattr__(name: str) -> Any:
    return getattr(registry, name)
