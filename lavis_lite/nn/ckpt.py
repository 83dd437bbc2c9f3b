"""Activation checkpointing by torch, as a change of a block's `forward` that survives copying and pickling.

Module identity, parameter names and `state_dict` stay as they are. Memory is traded for a second forward pass, which
repeats the first one's random states and autocast.
"""

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(modules: Iterable[nn.Module]) -> None:
    """Make each block drop its activations in the forward pass and recompute them in the backward pass."""
    for module in modules:
        module.forward = functools.partial(_checkpointed, module)  # a copy's holds the copy


def _checkpointed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(type(module).forward, module, *args, use_reentrant=False, **kwargs)
