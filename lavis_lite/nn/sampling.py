"""Random choice by weight, without a wait for the device."""

import torch
from torch import Tensor


def draw(weights_BN: Tensor) -> Tensor:
    """Draw one column per row, by weight: (B,). A column of weight 0 is drawn only where all are 0.

    These are the numbers of `torch.multinomial(weights, 1)`, which waits for the device twice to check its weights.
    Note: weights that are nan are not an error here; the loss, which is nan too, is.
    """
    return (weights_BN / torch.empty_like(weights_BN).exponential_()).argmax(dim=-1)
