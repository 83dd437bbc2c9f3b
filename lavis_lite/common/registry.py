"""The registry: name -> class, for models, processors, dataset builders, tasks, runners and learning-rate schedules.

The first look-up (or listing) of a kind imports every module of that kind's package: to add a class is to add a file.
Registering the same class again (a reloaded module, a re-run notebook cell) replaces it; another class under a used
name is an error.
"""

import difflib
import pkgutil
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, TypeVar

from lavis_lite.common.errors import InputTypeError, UnknownNameError

T = TypeVar("T")

PACKAGES = {
    "model": "lavis_lite.models",
    "processor": "lavis_lite.processors",
    "builder": "lavis_lite.datasets",
    "task": "lavis_lite.tasks",
    "runner": "lavis_lite.runners",
    "lr_scheduler": "lavis_lite.common.optim",
}


class RegistryError(UnknownNameError):
    """An unknown or twice used name."""


def did_you_mean(name: object, candidates: Iterable[str], *, limit: int = 12) -> str:
    """Return the sentence to append to an error about `name`: its nearest candidates, or else which ones there are."""
    known = sorted(candidates)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(repr(n) for n in near)}?"
    if not known:
        return "None is known."
    more = f" and {len(known) - limit} more" if len(known) > limit else ""
    return f"Known: {', '.join(known[:limit])}{more}."


def _full_name(item: Any) -> str:
    return f"{item.__module__}.{item.__qualname__}"


class Registry:
    """One table a kind; see the module's docstring for when its package is imported."""

    def __init__(self, packages: dict[str, str] | None = None) -> None:
        self._packages = PACKAGES if packages is None else packages
        self._tables: dict[str, dict[str, Any]] = {kind: {} for kind in self._packages}
        self._imported: set[str] = set()
        self._finders: dict[str, tuple[Callable[[], Iterable[str]], Callable[[str], Any]]] = {}

    def add_finder(self, kind: str, names: Callable[[], Iterable[str]], find: Callable[[str], Any]) -> None:
        """Let `find` make the classes of further names at their first look-up, such as those of packaged datasets.

        It may return None for a name that is registered in the usual way.
        """
        self._finders[kind] = names, find

    def _found(self, kind: str, name: str) -> Any:
        """Return the class of a name, perhaps made by the finder; None if there is none."""
        table = self._tables[kind]
        if name not in table and kind in self._finders:
            names, find = self._finders[kind]
            found = find(name) if name in names() else None
            if found is not None:
                table[name] = found
        return table.get(name)

    def _register(self, kind: str, name: str) -> Callable[[T], T]:
        if not isinstance(name, str) or not name:
            raise InputTypeError(f"register_{kind} needs a name, as in @registry.register_{kind}('name')")

        def decorate(item: T) -> T:
            other = self._found(kind, name)
            if other is not None and _full_name(other) != _full_name(item):
                raise RegistryError(
                    f"{kind} name {name!r} is taken by {_full_name(other)}: register {_full_name(item)} under another"
                )
            self._tables[kind][name] = item
            return item

        return decorate

    def _import_package(self, kind: str) -> None:
        if kind in self._imported:
            return
        self._imported.add(kind)
        try:
            package = import_module(self._packages[kind])
            for module in pkgutil.walk_packages(getattr(package, "__path__", []), f"{package.__name__}."):
                import_module(module.name)
        except BaseException:
            self._imported.discard(kind)  # so that the next look-up reports the failed import again
            raise

    def _get(self, kind: str, name: str) -> Any:
        self._import_package(kind)
        found = self._found(kind, name)
        if found is None:
            raise RegistryError(f"unknown {kind} {name!r}. {did_you_mean(name, self._list(kind))}")
        return found

    def _list(self, kind: str) -> list[str]:
        self._import_package(kind)
        names = self._finders[kind][0]() if kind in self._finders else ()
        return sorted({*self._tables[kind], *names})

    def register_model(self, name: str) -> Callable[[T], T]:
        """Class decorator: registers a model (an architecture) under `name`."""
        return self._register("model", name)

    def register_processor(self, name: str) -> Callable[[T], T]:
        """Class decorator: registers an image or text processor under `name`."""
        return self._register("processor", name)

    def register_builder(self, name: str) -> Callable[[T], T]:
        """Class decorator: registers a dataset builder under the dataset's `name`."""
        return self._register("builder", name)

    def register_task(self, name: str) -> Callable[[T], T]:
        """Class decorator: registers a task under `name`."""
        return self._register("task", name)

    def register_runner(self, name: str) -> Callable[[T], T]:
        """Class decorator: registers a runner under `name`."""
        return self._register("runner", name)

    def register_lr_scheduler(self, name: str) -> Callable[[T], T]:
        """Decorator: registers a learning-rate schedule under `name`."""
        return self._register("lr_scheduler", name)

    def get_model_class(self, name: str) -> Any:
        """Return the model class called `name`; KeyError with the nearest names if there is none, as in all get_*."""
        return self._get("model", name)

    def get_processor_class(self, name: str) -> Any:
        """Return the processor class called `name`."""
        return self._get("processor", name)

    def get_builder_class(self, name: str) -> Any:
        """Return the dataset builder class called `name`."""
        return self._get("builder", name)

    def get_task_class(self, name: str) -> Any:
        """Return the task class called `name`."""
        return self._get("task", name)

    def get_runner_class(self, name: str) -> Any:
        """Return the runner class called `name`."""
        return self._get("runner", name)

    def get_lr_scheduler_class(self, name: str) -> Any:
        """Return the learning-rate schedule called `name`."""
        return self._get("lr_scheduler", name)

    def list_models(self) -> list[str]:
        """Return the registered names, sorted. So do the other list_*."""
        return self._list("model")

    def list_processors(self) -> list[str]:
        """Return the names of all processors."""
        return self._list("processor")

    def list_builders(self) -> list[str]:
        """Return the names of all dataset builders."""
        return self._list("builder")

    def list_datasets(self) -> list[str]:
        """Return the names of all datasets: a dataset is called as its builder."""
        return self._list("builder")

    def list_tasks(self) -> list[str]:
        """Return the names of all tasks."""
        return self._list("task")

    def list_runners(self) -> list[str]:
        """Return the names of all runners."""
        return self._list("runner")

    def list_lr_schedulers(self) -> list[str]:
        """Return the names of all learning-rate schedules."""
        return self._list("lr_scheduler")


registry = Registry()
