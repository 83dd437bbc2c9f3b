"""Builders of real pictures that a system's packages install, in several layouts."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from lavis_lite.common.bounds import check_number, one_of
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.common.sources import download
from lavis_lite.datasets.annotations import read_json
from lavis_lite.datasets.base import BaseBuilder, BaseDataset
from lavis_lite.datasets.caption import CaptionEvalDataset, CaptionTrainDataset
from lavis_lite.datasets.classification import ClassificationDataset
from lavis_lite.datasets.packaged import fashion_mnist, openclipart, openmoji
from lavis_lite.datasets.packaged.store import SPLITS, Splits, found_root, made_once
from lavis_lite.datasets.pairs import PairsDataset
from lavis_lite.datasets.retrieval import RetrievalEvalDataset, RetrievalTrainDataset

Kind = Literal["pairs", "caption", "retrieval", "classification"]
DATASETS: dict[str, tuple[type[BaseDataset], type[BaseDataset]]] = {
    "pairs": (PairsDataset, PairsDataset),
    "caption": (CaptionTrainDataset, CaptionEvalDataset),
    "retrieval": (RetrievalTrainDataset, RetrievalEvalDataset),
    "classification": (ClassificationDataset, ClassificationDataset),
}
"""The classes for training and evaluation, by layout."""
FORMAT = 2  # goes up when the same settings give other files


@dataclass(kw_only=True)
class PackagedBuilder(BaseBuilder):
    """Pictures of an installed package; records and images are prepared once below the data root."""

    kind: Kind = "pairs"
    """The layout of the samples."""
    package_root: str = ""
    """Folder of the package; empty: where it is installed."""

    name: ClassVar[str]
    places: ClassVar[Sequence[str]]
    needed: ClassVar[Sequence[str]]
    advice: ClassVar[str]
    kinds: ClassVar[Sequence[str]] = get_args(Kind)
    classes: ClassVar[Sequence[str]] = ()

    def __post_init__(self) -> None:
        one_of("kind", self.kind, self.kinds)
        if self.build_info:
            raise InputError(
                f"{self.name}: takes no build_info; its files are a package's, whose folder is package_root"
            )

    def splits(self) -> list[str]:
        return list(SPLITS)

    def package(self) -> Path:
        """Return the folder of the package. MissingFileError, with how to get it, if it is not installed."""
        return found_root(self.package_root, self.places, self.needed, name=self.name, advice=self.advice)

    def settings(self) -> Mapping[str, Any]:
        """Return what the prepared files depend on besides the package."""
        return {}

    @abstractmethod
    def make(self, root: Path, aside: Path) -> Splits:
        """Write images below `aside` and return the records of each split."""

    def folder(self) -> Path:
        """Return the prepared folder; it is made if need be."""
        root = self.package()
        content = json.dumps({"format": FORMAT, "root": str(root.resolve()), **self.settings()}, sort_keys=True)
        place = download.data_root() / self.name / hashlib.sha256(content.encode()).hexdigest()[:12]
        return made_once(place, lambda aside: self.make(root, aside))

    def image_root(self) -> Path:
        return self.folder()

    def annotation_paths(self, split: str) -> list[Path]:
        return [self.folder() / f"{split}.json"]

    def dataset_class(self, split: str) -> type[BaseDataset]:
        train, evaluation = DATASETS[self.kind]
        return train if split == "train" else evaluation

    def dataset_options(self, split: str) -> dict[str, Any]:
        return {"classes": list(self.classes or self.labels())} if self.kind == "classification" else {}

    def labels(self) -> list[str]:
        """Return the labels of all splits, in alphabetical order."""
        return sorted({record["label"] for split in SPLITS for record in read_json(self.folder() / f"{split}.json")})


@registry.register_builder("openmoji")
@dataclass(kw_only=True)
class OpenMojiBuilder(PackagedBuilder):
    """OpenMoji's drawings; `classification` is by group."""

    drawing_size: int = 256
    """Pixels per side of the prepared pictures."""
    skin_tones: bool = False
    """Also the variants with skin tones."""
    drawings: list[openmoji.Drawing] = field(default_factory=lambda: list(openmoji.DRAWINGS))
    """The kinds of drawings: `color`, `black` or both."""

    name: ClassVar[str] = "openmoji"
    places: ClassVar[Sequence[str]] = openmoji.PLACES
    needed: ClassVar[Sequence[str]] = (openmoji.INDEX,)
    advice: ClassVar[str] = openmoji.ADVICE

    def settings(self) -> Mapping[str, Any]:
        check_number("drawing_size", self.drawing_size, 8, 2048)
        for drawing in self.drawings:
            one_of("drawings", drawing, openmoji.DRAWINGS)
        return {"size": self.drawing_size, "skin_tones": self.skin_tones, "drawings": sorted(set(self.drawings))}

    def make(self, root: Path, aside: Path) -> Splits:
        kinds = [drawing for drawing in openmoji.DRAWINGS if drawing in self.drawings]
        return openmoji.make(root, aside, size=self.drawing_size, skin_tones=self.skin_tones, drawings=kinds)


@registry.register_builder("openclipart")
@dataclass(kw_only=True)
class OpenclipartBuilder(PackagedBuilder):
    """Openclipart's pictures with their titles."""

    name: ClassVar[str] = "openclipart"
    places: ClassVar[Sequence[str]] = openclipart.PLACES
    needed: ClassVar[Sequence[str]] = openclipart.NEEDED
    advice: ClassVar[str] = openclipart.ADVICE
    kinds: ClassVar[Sequence[str]] = ("pairs", "caption", "retrieval")

    def make(self, root: Path, aside: Path) -> Splits:
        return openclipart.make(root, aside)

    def image_root(self) -> Path:
        return self.package()


@registry.register_builder("fashion_mnist")
@dataclass(kw_only=True)
class FashionMNISTBuilder(PackagedBuilder):
    """Fashion-MNIST's pictures with their classes, or class names as texts."""

    kind: Kind = "classification"

    name: ClassVar[str] = "fashion_mnist"
    places: ClassVar[Sequence[str]] = fashion_mnist.PLACES
    needed: ClassVar[Sequence[str]] = fashion_mnist.NEEDED
    advice: ClassVar[str] = fashion_mnist.ADVICE
    kinds: ClassVar[Sequence[str]] = ("classification", "pairs")
    classes: ClassVar[Sequence[str]] = fashion_mnist.CLASSES

    def make(self, root: Path, aside: Path) -> Splits:
        return fashion_mnist.make(root, aside)
