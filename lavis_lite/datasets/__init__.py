"""Datasets by registry name: `load_dataset("coco_caption")`, `dataset_zoo`. Importing this loads no torch."""

from __future__ import annotations

from typing import Any

__all__ = ["dataset_zoo", "load_dataset"]


def __getattr__(name: str) -> Any:
    if name == "load_dataset":
        from lavis_lite.datasets.base import load_dataset

        return load_dataset
    if name == "dataset_zoo":
        from lavis_lite.zoo import dataset_zoo

        return dataset_zoo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
