"""Activation checkpointing; the one place that touches fairscale's wrapper.

The wrapper replaces a block's `forward` in place: module identity, parameter names and `state_dict` stay as they are.
Memory is traded for a second forward pass, which restores random states. fairscale would repeat that pass under CUDA's
fp16 autocast whatever the first pass ran under, so the autocast state is carried over here.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lavis_lite.errors import MissingPackageError

DEVICE_TYPES = ("cpu", "cuda")


def checkpoint_blocks(modules: Iterable[nn.Module]) -> None:
    """Makes each block drop its activations in the forward pass and recompute them in the backward pass.

    Make deep copies (momentum twins) before: a copy of a wrapped module would still call the original.

    Raises:
        ImportError: fairscale is not installed.
    """
    try:
        from fairscale.nn.checkpoint import checkpoint_wrapper
    except ImportError as error:
        raise MissingPackageError(
            "activation checkpointing needs fairscale: `pip install fairscale`, or set use_grad_checkpoint=False"
        ) from error
    for module in modules:
        checkpoint_wrapper(module)
        module.forward = functools.partial(_checkpointed, module.forward)


def _checkpointed(wrapped: functools.partial[Any], *args: Any, **kwargs: Any) -> Any:
    """Calls fairscale's `partial(checkpointed, original_forward, ...)` with an original that remembers autocast."""
    original, *rest = wrapped.args
    states = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in DEVICE_TYPES]
    return wrapped.func(functools.partial(_under_autocast, states, original), *rest, *args, **kwargs)


def _under_autocast(
    states: list[tuple[str, torch.dtype, bool]], original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    (cpu, cpu_dtype, on_cpu), (cuda, cuda_dtype, on_cuda) = states
    with torch.autocast(cpu, cpu_dtype, on_cpu), torch.autocast(cuda, cuda_dtype, on_cuda):
        return original(*args, **kwargs)
