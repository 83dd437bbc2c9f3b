"""What there is: `model_zoo` and `dataset_zoo`, read off the paths configs/{models,datasets}/<name>/<type>.yaml.

A YAML's path is its public name. Nothing is imported to list or print them, torch included.
"""

from collections.abc import Iterator
from pathlib import Path

from lavis_lite.common.registry import RegistryError, did_you_mean

CONFIGS = Path(__file__).parents[2] / "configs"


class Zoo:
    """The names below one folder, each with its types: iterable of (name, [types]), printable as a table."""

    def __init__(self, folder: Path, *, heading: str) -> None:
        self.folder = folder
        self.heading = heading

    def names(self) -> list[str]:
        """Return the names that have at least one type, sorted."""
        return sorted({path.parent.name for path in self.folder.glob("*/*.yaml")})

    def types(self, name: str) -> list[str]:
        """Return the types of `name`, sorted; none if the name is unknown."""
        return sorted(path.stem for path in (self.folder / name).glob("*.yaml")) if name else []

    def path(self, name: str, kind: str) -> Path:
        """Return the YAML of one name and type. KeyError with the nearest names if there is none."""
        names = self.names()
        if name not in names:
            raise RegistryError(f"unknown {self.heading} {name!r}. {did_you_mean(name, names)}")
        types = self.types(name)
        if kind not in types:
            raise RegistryError(f"{name!r} has no type {kind!r}. {did_you_mean(kind, types)}")
        return self.folder / name / f"{kind}.yaml"

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        return ((name, self.types(name)) for name in self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __str__(self) -> str:
        rows = [(name, ", ".join(types)) for name, types in self]
        width = max([len(name) for name, _ in rows] + [len(self.heading)]) + 2
        rule = "=" * (width + max([len(types) for _, types in rows] + [len("types")]))
        lines = [f"{name:<{width}}{types}" for name, types in rows]
        return "\n".join([rule, f"{self.heading:<{width}}types", rule, *lines])

    __repr__ = __str__


model_zoo = Zoo(CONFIGS / "models", heading="architecture")
dataset_zoo = Zoo(CONFIGS / "datasets", heading="dataset")


def model_config_path(arch: str, model_type: str) -> Path:
    """Return the YAML that IS the model type: configs/models/<arch>/<model_type>.yaml. KeyError if unknown."""
    return model_zoo.path(arch, model_type)


def dataset_config_path(name: str, dataset_type: str = "default") -> Path:
    """Return the YAML of a dataset's type: configs/datasets/<name>/<dataset_type>.yaml. KeyError if unknown."""
    return dataset_zoo.path(name, dataset_type)
