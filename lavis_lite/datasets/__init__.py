"""Datasets by registry name: `load_dataset("coco_caption")`, `dataset_zoo`. Importing this loads no torch."""

from lavis_lite.common.lazy import lazy_names

__all__ = ["dataset_zoo", "load_dataset"]
__getattr__ = lazy_names(
    __name__, {"load_dataset": "lavis_lite.datasets.zoo", "dataset_zoo": "lavis_lite.common.config.zoo"}
)
