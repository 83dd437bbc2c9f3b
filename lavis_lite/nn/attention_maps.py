"""Attention probabilities of a layer and their gradients, which fused attention does not give (Grad-CAM)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lavis_lite.common.errors import InputError
from lavis_lite.nn.attention import KeyValue, SelfAttention


@contextmanager
def recorded_attention(attention: SelfAttention) -> Iterator[list[Tensor]]:
    """Compute a layer's attention step by step in the body; yield the list of its probabilities (B,H,T,S).

    Each is a leaf that requires a gradient: `torch.autograd.grad(score, record[-1])` gives it. Earlier layers get none
    through this one's probabilities.
    """
    record: list[Tensor] = []

    def forward(x_BTE: Tensor, key_value: KeyValue, mask: Tensor | None, *, is_causal: bool = False) -> Tensor:
        assert not is_causal, "cross-attention reads the whole context"
        k, v = key_value
        num_texts, num_tokens = x_BTE.shape[:2]
        times = num_texts // k.shape[0]
        k, v = k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)
        scores = attention.split_heads(attention.query(x_BTE)) @ k.transpose(-1, -2) / math.sqrt(k.shape[-1])
        if mask is not None:
            scores = scores + (mask if mask.shape[0] == 1 else mask.repeat_interleave(times, 0))
        with torch.enable_grad():
            record.append(scores.softmax(dim=-1).detach().requires_grad_())
            return (record[-1] @ v).transpose(1, 2).reshape(num_texts, num_tokens, -1)

    attention.forward = forward  # type: ignore[method-assign]  # the instance's own, before the class's
    try:
        yield record
    finally:
        del attention.forward


def grad_cam(probabilities: Tensor, gradient: Tensor) -> Tensor:
    """Return the mean over heads of probabilities times their positive gradients: (B,H,T,S) -> (B,T,S)."""
    return (probabilities.detach() * gradient.clamp(min=0)).mean(dim=1)


def as_grid(tokens_BTS: Tensor) -> Tensor:
    """Return maps (B,T,h,w) of an image's S tokens, h = w, after the class token where there is one.

    Raises InputError if the tokens are not those of a square.
    """
    num_tokens = tokens_BTS.shape[-1]
    for num_extra in (0, 1):
        side = math.isqrt(num_tokens - num_extra)
        if side * side == num_tokens - num_extra:
            return tokens_BTS[..., num_extra:].unflatten(-1, (side, side))
    raise InputError(f"{num_tokens} image tokens are not a square, with or without a class token")
