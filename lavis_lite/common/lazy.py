"""Names of a package that are imported on first use, so that importing the package does not load torch."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's `__getattr__` (PEP 562); `modules` maps each name to its module, or to `<module>.<Class>` for
    a class of another name.
    """

    def __getattr__(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, own_name = modules[name].rpartition(".")
        if not own_name[:1].isupper():
            module, own_name = modules[name], name
        return vars(import_module(module))[own_name]

    return __getattr__
