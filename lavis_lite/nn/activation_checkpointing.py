"""Activation checkpointing: recompute a block's activations in the backward pass instead of keeping them.

Only the block's `forward` is replaced, so parameter names stay and blocks can be copied and pickled. The recomputation
repeats the random states and the autocast of the forward pass.
"""

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(modules: Iterable[nn.Module]) -> None:
    """Make each block recompute its activations in the backward pass."""
    for module in modules:
        module.forward = functools.partial(_checkpointed, module)  # in a copied block it refers to the copy


def _checkpointed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(type(module).forward, module, *args, use_reentrant=False, **kwargs)
