"""Features of another encoder in the place of an image encoder's tokens, any number of them per sample.

One tensor holds features and mask, so that whatever passes tokens on (negatives from other ranks, a gallery in main
memory) passes the mask too: the last channel is 1 where a token counts and 0 where it pads.

Letters: B samples, N tokens of the longest, W width.
"""

import torch
from torch import Tensor

from lavis_lite.common.bounds import MAX_WIDTH, check_number
from lavis_lite.common.errors import InputError
from lavis_lite.nn.vision import ImageEncoder

FEATURES = "features"
"""Name of the encoder: `model.vit_model`."""


class FeatureEncoder(ImageEncoder):
    """Passes features (B,N,W) on; it has no parameters."""

    def __init__(self, *, width: int) -> None:
        super().__init__(width=check_number("model.vit.width", width, 1, MAX_WIDTH), depth=0, image_size=0)

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[-1] != self.width:
            found = f"features of width {image.shape[-1]} do not fit the model, which takes {self.width}"
            raise InputError(f"image: {found}; set model.vit.width to the features' width")
        return image

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state


def pack(features_BNW: Tensor, mask_BN: Tensor) -> Tensor:
    """Return features and mask as (B,N,W+1); padding is zero."""
    mask_BN1 = mask_BN[..., None]
    return torch.cat([features_BNW.masked_fill(mask_BN1 == 0, 0.0), mask_BN1.to(features_BNW.dtype)], dim=-1)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return features (B,N,W) and mask (B,N)."""
    return packed[..., :-1], packed[..., -1]
