"""The registry: name -> class, for models, processors, dataset builders, tasks, runners and learning-rate schedules.

The first look-up (or listing) of a kind imports every module of that kind's package, so that adding a class takes one
new file. Registering the same class again (a reloaded module, a re-run notebook cell) replaces it; another class under
a used name is an error.
"""

import pkgutil
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any, TypeVar

from lavis_lite.common.errors import InputTypeError, UnknownNameError, did_you_mean

T = TypeVar("T")

KINDS: dict[str, tuple[str, str | None]] = {
    "model": ("lavis_lite.models", "lavis_lite.models.base.BaseModel"),
    "processor": ("lavis_lite.processors", "lavis_lite.processors.base.BaseProcessor"),
    "builder": ("lavis_lite.datasets", "lavis_lite.datasets.base.BaseBuilder"),
    "task": ("lavis_lite.tasks", "lavis_lite.tasks.base.BaseTask"),
    "runner": ("lavis_lite.runners", "lavis_lite.runners.runner.Runner"),
    "lr_scheduler": ("lavis_lite.common.optim", None),
}
"""The package of each kind, and the class that those of the kind derive from; by name, since this module imports no
package of a kind."""


class RegistryError(UnknownNameError):
    """An unknown name, or one that is already used."""


class Table:
    """The classes of one kind, by name."""

    def __init__(self, kind: str, package: str, base: str | None = None) -> None:
        self.kind = kind
        self.package = package
        self.base = base
        self.items: dict[str, Any] = {}
        self._is_imported = False
        self._finder: tuple[Callable[[], Iterable[str]], Callable[[str], Any]] = (tuple, lambda name: None)

    def add_finder(self, names: Callable[[], Iterable[str]], find: Callable[[str], Any]) -> None:
        """Let `find` make the classes of further names at their first look-up, such as those of packaged datasets.

        It may return None for a name that is registered in the usual way.
        """
        self._finder = names, find

    def register(self, name: str) -> Callable[[T], T]:
        """Return the decorator that registers a class under `name`."""
        if not isinstance(name, str) or not name:
            raise InputTypeError(f"register_{self.kind} needs a name, as in @registry.register_{self.kind}('name')")

        def decorate(item: T) -> T:
            parents = item.__mro__ if isinstance(item, type) else ()
            if self.base and self.base not in map(_full_name, parents):
                raise InputTypeError(f"{self.kind} {name!r}: {_full_name(item)} must derive from {self.base}")
            other = self._found(name)
            if other is not None and _full_name(other) != _full_name(item):
                advice = f"register {_full_name(item)} under another"
                raise RegistryError(f"{self.kind} name {name!r} is taken by {_full_name(other)}: {advice}")
            self.items[name] = item
            return item

        return decorate

    def get(self, name: str) -> Any:
        """Return the class called `name`; raise RegistryError, a KeyError, with the nearest names if there is none."""
        self._import_package()
        found = self._found(name)
        if found is None:
            raise RegistryError(f"unknown {self.kind} {name!r}. {did_you_mean(name, self.names())}")
        return found

    def names(self) -> list[str]:
        """Return all registered names, sorted."""
        self._import_package()
        return sorted({*self.items, *self._finder[0]()})

    def _found(self, name: str) -> Any:
        """Return the class of a name, which the finder may make; None if there is none."""
        names, find = self._finder
        if name not in self.items and name in names():
            found = find(name)
            if found is not None:
                self.items[name] = found
        return self.items.get(name)

    def _import_package(self) -> None:
        if self._is_imported:
            return
        self._is_imported = True
        try:
            package = import_module(self.package)
            for module in pkgutil.walk_packages(vars(package).get("__path__", []), f"{package.__name__}."):
                import_module(module.name)
        except BaseException:
            self._is_imported = False  # the next look-up reports the failed import again
            raise


def _full_name(item: Any) -> str:
    return f"{item.__module__}.{item.__qualname__}"


class Registry:
    """One table per kind, and the methods `register_<kind>`, `get_<kind>_class` and `list_<kind>s` of each.

    `packages` replaces the package of some kinds, whose classes may then derive from anything.
    """

    def __init__(self, packages: Mapping[str, str] | None = None) -> None:
        kinds = KINDS | {kind: (package, None) for kind, package in (packages or {}).items()}
        self.tables = {kind: Table(kind, *kinds[kind]) for kind in kinds}
        model, processor, builder, task, runner, schedule = (self.tables[kind] for kind in KINDS)
        self.register_model, self.get_model_class, self.list_models = model.register, model.get, model.names
        self.register_processor, self.get_processor_class = processor.register, processor.get
        self.list_processors = processor.names
        self.register_builder, self.get_builder_class, self.list_builders = builder.register, builder.get, builder.names
        self.list_datasets = builder.names
        self.register_task, self.get_task_class, self.list_tasks = task.register, task.get, task.names
        self.register_runner, self.get_runner_class, self.list_runners = runner.register, runner.get, runner.names
        self.register_lr_scheduler, self.get_lr_scheduler_class = schedule.register, schedule.get
        self.list_lr_schedulers = schedule.names
        self._paths: dict[str, str] = {}

    def register_path(self, name: str, path: str) -> None:
        """Set a path that a task written for LAVIS looks up: `result_dir`, `output_dir`."""
        self._paths[name] = path

    def get_path(self, name: str) -> str:
        """Return a registered path; raise RegistryError, a KeyError, if there is none."""
        if name not in self._paths:
            raise RegistryError(f"unknown path {name!r}. {did_you_mean(name, self._paths)}")
        return self._paths[name]


registry = Registry()
