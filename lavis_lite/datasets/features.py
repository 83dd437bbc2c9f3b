"""Features of another encoder as a dataset's images: who reads them, and how a batch holds them.

Letters: B samples, N tokens of the longest, W width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lavis_lite.common.records import StoredImage


@runtime_checkable
class ReadsFeatures(Protocol):
    """A processor that reads files of features itself."""

    def read_features(self, path: str | Path | StoredImage) -> Tensor:
        """Return a file's features (N,W). Raises UnreadableSample if they cannot be read."""
        ...


def is_features(image: Any) -> bool:
    """Return whether a sample's `image` is features (N,W)."""
    return torch.is_tensor(image) and image.dim() == 2


def padded_features(features: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return features as `image` (B,N,W), padded with zeros, and `image_mask` (B,N), 1 where a token counts."""
    masks = [torch.ones(len(one), dtype=torch.long) for one in features]
    return {
        "image": pad_sequence(list(features), batch_first=True),
        "image_mask": pad_sequence(masks, batch_first=True),
    }
