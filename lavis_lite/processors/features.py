"""The processor of features: tokens that another encoder computed, in place of an image."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lavis_lite.common.bounds import MAX_WIDTH, check_number
from lavis_lite.common.errors import InputError, InputTypeError
from lavis_lite.common.feature_io import checked_features, read_features
from lavis_lite.common.records import StoredImage
from lavis_lite.common.registry import registry
from lavis_lite.processors.base import BaseProcessor


@registry.register_processor("features")
class FeatureProcessor(BaseProcessor):
    """A file of features (`.npy`, `.safetensors`), an array or a tensor in, float32 (N,W) out; nothing is scaled.

    `width` is W, the model's unless given; None takes any.
    """

    def __init__(self, *, width: int | None = None) -> None:
        self.width = None if width is None else check_number("width", width, 1, MAX_WIDTH)

    def __call__(self, features: str | Path | np.ndarray | Tensor) -> Tensor:
        """Return the features as a tensor. Raises InputError for another width or shape, and for nan or infinity."""
        if isinstance(features, str | Path):
            return self.read_features(features)
        if not isinstance(features, np.ndarray | Tensor):
            kind = type(features).__name__
            raise InputTypeError(f"the processor `features` takes a file's path, an array or a tensor, got {kind}")
        try:
            tensor = torch.as_tensor(features)
        except TypeError as error:
            raise InputError(f"features: {error}") from error
        return checked_features(tensor, "features", width=self.width, error=InputError)

    def read_features(self, path: str | Path | StoredImage) -> Tensor:
        """Return the features of a file. Raises UnreadableSample as `common.feature_io.read_features`."""
        return read_features(path, width=self.width)
