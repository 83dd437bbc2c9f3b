"""Attention of the text transformer: sizes, keys and values, self- and cross-attention, masks.

Letters: B texts, C contexts (B is a multiple of C), T text tokens, P cached tokens, S context tokens, H heads, D width
of a head, E width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_lite.common.bounds import MAX_LAYERS, MAX_TOKENS, MAX_WIDTH, check_divides, check_numbers
from lavis_lite.nn.growing import Growing

KeyValue = tuple[Tensor, Tensor]
"""Keys and values, each (B,H,S,D)."""

MAX_VOCABULARY = 10**7
SELF_MASKED = -10000.0
"""BERT's additive mask for self-attention. Finite as in the published models, whose padding rows rely on it."""


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes of the text transformer; the defaults are BERT-base with BLIP's two extra tokens."""

    vocab_size: int = 30524
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    layer_norm_eps: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02
    context_width: int | None = None
    """Width of the states that cross-attention reads; None builds no cross-attention."""
    num_context_streams: int = 1
    """2: NLVR2's dual cross-attention, one stream per image."""
    merge_streams_from: int = 6
    """First layer that merges the two streams by a linear layer; earlier ones average them."""

    section: ClassVar[str] = "model.med"
    """Key of the YAML under which these sizes are set."""

    def __post_init__(self) -> None:
        values, widths = vars(self), ("hidden_size", "num_heads", "intermediate_size")
        shares = ("layer_norm_eps", "hidden_dropout", "attention_dropout")
        check_numbers(
            self.section,
            values,
            **dict.fromkeys(widths, (1, MAX_WIDTH)),
            **dict.fromkeys(shares, (0.0, 1.0)),
            vocab_size=(1, MAX_VOCABULARY),
            num_layers=(1, MAX_LAYERS),
            max_positions=(1, MAX_TOKENS),
            initializer_range=(0.0, 100.0),
            merge_streams_from=(0, MAX_LAYERS),
        )
        check_divides(self.section, values, divisor="num_heads", number="hidden_size")

    def cross_attends(self, index: int) -> bool:
        """Return whether the layer of this number has cross-attention."""
        return self.context_width is not None


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values (B,H,P,D) of the tokens read so far, one pair per layer; the cache of `decoding.py`."""

    layers: tuple[KeyValue, ...]
    growing: tuple[tuple[Growing, Growing], ...] | None = None
    """Where the tokens are, if they are added in place."""
    num_queries: int = 0
    """Of the tokens, those that are the Q-Former's queries, before the text."""

    @property
    def num_tokens(self) -> int:
        """Number of cached tokens (P)."""
        return self.layers[0][0].shape[2]

    def past(self, index: int, num_new: int) -> KeyValue:
        """Return a layer's keys and values; if they grow, with room for new tokens at their end."""
        if self.growing is None:
            return self.layers[index]
        keys, values = self.growing[index]
        return keys.lengthened(num_new), values.lengthened(num_new)

    def repeat(self, times: int) -> "KeyValueCache":
        """Repeat every row, copies side by side."""
        layers = tuple((k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in self.layers)
        return KeyValueCache(layers, num_queries=self.num_queries)

    def expand(self, times: int) -> "KeyValueCache":
        """Repeat every row, copies side by side, to which tokens are added in place."""
        layers = self.repeat(times).layers
        return KeyValueCache(layers, tuple((Growing(k), Growing(v)) for k, v in layers), self.num_queries)

    def select(self, index: Tensor) -> "KeyValueCache":
        """Return these rows, in this order. If they grow, in place, and each must be of the same text as the row that
        it replaces.
        """
        if self.growing is None:
            return replace(self, layers=tuple((k[index], v[index]) for k, v in self.layers))
        for part in (part for layer in self.growing for part in layer):
            part.select(index)
        return self


@dataclass(frozen=True)
class CrossAttentionKV:
    """Keys and values of the states that a text attends to, and which of these count.

    `layers[i][s]` holds layer i's keys and values of stream s, (C,H,S,D), and is empty for a layer without
    cross-attention; `mask` is (C,S) with 1 where a state counts, or None for all.
    """

    layers: tuple[tuple[KeyValue, ...], ...]
    mask: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Number of contexts (C)."""
        return next(streams[0][0].shape[0] for streams in self.layers if streams)

    def select(self, index: Tensor) -> "CrossAttentionKV":
        """Return the contexts of these rows (a LongTensor), for instance hard negatives; gradients flow."""
        layers = tuple(tuple((k[index], v[index]) for k, v in streams) for streams in self.layers)
        return CrossAttentionKV(layers, None if self.mask is None else self.mask[index])


class SelfAttention(nn.Module):
    """Query, key and value projections, of states of `key_width`; BERT's `self` module."""

    def __init__(self, config: BertConfig, key_width: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(key_width, config.hidden_size)
        self.value = nn.Linear(key_width, config.hidden_size)

    def split_heads(self, x_BTE: Tensor) -> Tensor:
        """(B,T,E) -> (B,H,T,D)"""
        return x_BTE.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def project(self, states_BSE: Tensor) -> KeyValue:
        """Return keys and values of the states, each (B,H,S,D)."""
        return self.split_heads(self.key(states_BSE)), self.split_heads(self.value(states_BSE))

    def forward(self, x_BTE: Tensor, key_value: KeyValue, mask: Tensor | None, *, is_causal: bool = False) -> Tensor:
        """Attend from x to the keys; `mask` is additive and broadcasts to (C,H,T,S). One key row serves B/C
        consecutive text rows. `is_causal`, without a mask: each token to those up to itself.
        """
        k, v = key_value
        num_texts, num_tokens = x_BTE.shape[:2]
        q = self.query(x_BTE).reshape(k.shape[0], -1, x_BTE.shape[-1])
        out = F.scaled_dot_product_attention(
            self.split_heads(q),
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
        )
        return out.transpose(1, 2).reshape(num_texts, num_tokens, -1)


class AddNorm(nn.Module):
    """Project, drop out, add the residual, normalise; BERT's `output` modules."""

    def __init__(self, config: BertConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class DualAddNorm(nn.Module):
    """AddNorm of two streams: a projection each, then their mean or a merging linear layer (BLIP, section 5.4)."""

    def __init__(self, config: BertConfig, *, merge: bool) -> None:
        super().__init__()
        self.dense0 = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense1 = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.merge_layer = nn.Linear(2 * config.hidden_size, config.hidden_size) if merge else None

    def forward(self, x0: Tensor, x1: Tensor, residual: Tensor) -> Tensor:
        x0, x1 = self.dense0(x0), self.dense1(x1)
        x = (x0 + x1) / 2 if self.merge_layer is None else self.merge_layer(torch.cat([x0, x1], dim=-1))
        return self.LayerNorm(self.dropout(x) + residual)


class Attention(nn.Module):
    """Attention over states of `key_width`, the text's own or a context's, and its output."""

    def __init__(self, config: BertConfig, key_width: int) -> None:
        super().__init__()
        self.self = SelfAttention(config, key_width)
        self.output = AddNorm(config, config.hidden_size)

    def project(self, states: Sequence[Tensor]) -> tuple[KeyValue, ...]:
        """Return keys and values of the only stream of states."""
        (states_BSE,) = states
        return (self.self.project(states_BSE),)

    def forward(
        self, x: Tensor, streams: Sequence[KeyValue], mask: Tensor | None, *, is_causal: bool = False
    ) -> Tensor:
        return self.output(self.self(x, streams[0], mask, is_causal=is_causal), x)


class DualCrossAttention(nn.Module):
    """Cross-attention to two images with separate projections."""

    def __init__(self, config: BertConfig, key_width: int, *, merge: bool) -> None:
        super().__init__()
        self.self0 = SelfAttention(config, key_width)
        self.self1 = SelfAttention(config, key_width)
        self.output = DualAddNorm(config, merge=merge)

    def project(self, states: Sequence[Tensor]) -> tuple[KeyValue, ...]:
        """Return keys and values of each image's states."""
        states0, states1 = states
        return self.self0.project(states0), self.self1.project(states1)

    def forward(self, x: Tensor, streams: Sequence[KeyValue], mask: Tensor | None) -> Tensor:
        return self.output(self.self0(x, streams[0], mask), self.self1(x, streams[1], mask), x)


def additive_mask(allowed: Tensor, blocked_value: float, dtype: torch.dtype) -> Tensor:
    """Return 0 where attention is allowed and `blocked_value` elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, blocked_value)


def text_mask(mask_BT: Tensor, num_past: int, *, num_queries: int = 0, causal: bool, dtype: torch.dtype) -> Tensor:
    """Return the additive self-attention mask of queries and the text after them, whose `mask_BT` is 1 where a token
    counts: (B,1,1,Q+T) or, causal, (B,1,L,Q+T) for the L of them that are not among the first `num_past`.

    With `causal` queries attend to queries, and text to the queries and the text before it (BLIP-2, figure 2).
    """
    allowed = F.pad(mask_BT, (num_queries, 0), value=1)[:, None, None, :].bool()
    if causal:
        position = torch.arange(allowed.shape[-1], device=mask_BT.device)
        allowed = allowed & ((position < num_queries) | (position <= position[num_past:, None]))
    return additive_mask(allowed, SELF_MASKED, dtype)


def context_mask(context: CrossAttentionKV | None, dtype: torch.dtype) -> Tensor | None:
    """Return the additive cross-attention mask (C,1,1,S), or None where all states count."""
    if context is None or context.mask is None:
        return None
    return additive_mask(context.mask[:, None, None, :] != 0, torch.finfo(dtype).min, dtype)
