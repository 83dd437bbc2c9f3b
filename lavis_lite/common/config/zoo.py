"""The packaged YAMLs, configs/{models,datasets}/<name>/<type>.yaml: `model_zoo`, `dataset_zoo`, and their layers.

A YAML's path is its public name. Listing and printing the zoos imports no model, nor torch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lavis_lite.common.config.files import ConfigError, Layer, load_with_bases, resolve
from lavis_lite.common.registry import RegistryError, did_you_mean

CONFIGS = Path(__file__).parents[2] / "configs"


class Zoo:
    """The names in one folder, each with its types: iterable of (name, [types]), printable as a table."""

    def __init__(self, folder: Path, *, heading: str) -> None:
        self.folder = folder
        self.heading = heading

    def names(self) -> list[str]:
        """Return the names that have at least one type, sorted."""
        return sorted({path.parent.name for path in self.folder.glob("*/*.yaml")})

    get_names = names  # LAVIS's name

    def types(self, name: str) -> list[str]:
        """Return the types of `name`, sorted; an empty list if the name is unknown."""
        return sorted(path.stem for path in (self.folder / name).glob("*.yaml")) if name else []

    def path(self, name: str, kind: str) -> Path:
        """Return the YAML of a name and type; RegistryError, a KeyError, with the nearest names if there is none."""
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


class ModelZoo(Zoo):
    """The zoo of models, which counts its types, as LAVIS's does."""

    def __len__(self) -> int:
        return sum(len(types) for _, types in self)


model_zoo = ModelZoo(CONFIGS / "models", heading="architecture")
dataset_zoo = Zoo(CONFIGS / "datasets", heading="dataset")


def model_layers(arch: str, model_type: str) -> list[Layer]:
    """Return a model type's YAML and its bases as layers, `arch` and `model_type` set; RegistryError if unknown."""
    layers = load_with_bases(model_zoo.path(arch, model_type))
    layers[-1].tree.setdefault("model", {}).update(arch=arch, model_type=model_type)
    return layers


def dataset_layers(name: str, builder: str, dataset_type: str) -> list[Layer]:
    """Return a packaged dataset's YAML and its bases as layers of `datasets.<name>`.

    A packaged YAML has one dataset, called as its folder (its builder); a base's dataset may have another name. Raises
    RegistryError for an unknown builder or type.
    """
    path = dataset_zoo.path(builder, dataset_type)
    layers = []
    for layer in load_with_bases(path):
        bodies = layer.tree.get("datasets", {})
        if len(bodies) != 1 or (layer.source == str(path) and builder not in bodies):
            raise ConfigError(f"{layer.source}: datasets: expected one dataset, {builder}, got {list(bodies)}")
        layers.append(Layer(layer.source, {"datasets": {name: next(iter(bodies.values()))}}))
    return layers


def packaged_dataset(name: str, dataset_type: str = "default") -> dict[str, Any]:
    """Return the settings of a packaged dataset: the arguments of its builder. RegistryError if unknown."""
    return resolve(dataset_layers(name, name, dataset_type))["datasets"][name]
