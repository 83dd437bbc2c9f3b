"""Attention masks of transformers' models without a wait for the device.

transformers reads a mask's values, to leave the mask out where no token is padding. Where the host knows that already,
this module tells it: by mask functions registered in place of its own for `sdpa` and `eager`, which differ from those
within `known_padding` only.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

Known = Mapping[int, bool] | bool
"""Whether masks have no padding: by their length, or of all lengths."""
_is_full: contextvars.ContextVar[Known] = contextvars.ContextVar("is_full", default=MappingProxyType({}))


def full_lengths(*masks: tuple[Tensor, int]) -> dict[int, bool]:
    """Return by length whether no mask of that length has padding. The masks (B,T) are on the CPU, each with a number
    of tokens without padding that it has beside.
    """
    known: dict[int, bool] = {}
    for mask, more in masks:
        length = mask.shape[1] + more
        known[length] = known.get(length, True) and bool(mask.all())
    return known


@contextlib.contextmanager
def known_padding(is_full: Known, device: torch.device) -> Iterator[None]:
    """In the body, masks have no padding, or may have some, and are not read. On a CPU, where reading costs nothing,
    they are read all the same.
    """
    token = _is_full.set({} if device.type == "cpu" else is_full)
    try:
        yield
    finally:
        _is_full.reset(token)


def of_known_padding(make_mask: Callable[..., Tensor | None], *args: Any, **settings: Any) -> Tensor | None:
    """Return what a mask function of transformers does."""
    known = _is_full.get()
    is_full = known if isinstance(known, bool) else known.get(settings.get("kv_length", -1))
    if is_full is not None and settings.get("attention_mask") is not None:
        unpadded: dict[str, Any] = {"attention_mask": None}
        padded = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        settings |= unpadded if is_full else padded
    return make_mask(*args, **settings)


AttentionMaskInterface.register("sdpa", partial(of_known_padding, sdpa_mask))
AttentionMaskInterface.register("eager", partial(of_known_padding, eager_mask))
