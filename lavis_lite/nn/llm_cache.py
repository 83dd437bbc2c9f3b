"""Keys and values of what a language model has read, with rows repeated, selected and reordered.

Seen with transformers 5.17 and 5.23. Its caches reorder rows, but cannot be copied with rows repeated, and copy all
tokens for each new one: this file reads their private layout: `EncoderDecoderCache.self_attention_cache` and
`.cross_attention_cache`, `Cache.layers`, and the tensors among each layer's attributes; and it replaces layers of plain
attention. `tests/test_llm_cache.py` says what to check when that changes.

Letters: N rows, S tokens of input, E width.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from lavis_lite.nn.growing import Growing


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer of plain attention, which grow in place."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._hold(keys, values)

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self._growing = Growing(keys), Growing(values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        own_keys, own_values = self._growing
        self.keys, self.values = own_keys.add(key_states), own_values.add(value_states)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take any rows, as new tensors."""
        self._hold(self.keys[beam_idx], self.values[beam_idx])

    def select(self, index: Tensor) -> None:
        """Reorder rows in place, as `Growing.select`."""
        for growing in self._growing:
            growing.select(index)


@dataclass(frozen=True)
class LLMCache:
    """transformers' cache (`past`) and the mask (N,S) of what a causal model or an encoder has read; `encoder` (N,S,E)
    are the encoder's states.
    """

    past: Any
    mask: Tensor
    encoder: Tensor | None = None

    def expand(self, times: int) -> Self:
        """Return a copy with every row repeated, copies side by side, to which tokens are added in place."""
        copied = self.rows(torch.arange(len(self.mask), device=self.mask.device).repeat_interleave(times))
        own = copied._read_by_text
        for i, layer in enumerate(own.layers):
            if type(layer) is not DynamicLayer:  # others forget tokens, or have states of other kinds
                continue
            if layer.keys is not None and layer.values is not None:
                own.layers[i] = GrowingLayer(layer.keys, layer.values)
        return copied

    def rows(self, index: Tensor) -> Self:
        """Return a copy with these rows, which may repeat."""
        kept = {id(tensor): tensor for tensor in _tensors(self.past)}  # not copied twice: reordering copies them
        past = copy.deepcopy(self.past, kept)
        past.reorder_cache(index)
        encoder = None if self.encoder is None else self.encoder[index]
        return replace(self, past=past, mask=self.mask[index], encoder=encoder)

    def select(self, index: Tensor) -> Self:
        """Reorder rows in place, each to a row of the same sample: what an encoder has read stays as it is."""
        for layer in self._read_by_text.layers:
            if isinstance(layer, GrowingLayer):
                layer.select(index)
            else:
                layer.reorder_cache(index)
        return self

    @property
    def _read_by_text(self) -> Any:
        """transformers' cache of what the text attends to as its own: a causal model's inputs too."""
        return self.past.self_attention_cache if isinstance(self.past, EncoderDecoderCache) else self.past

    @property
    def row_bytes(self) -> int:
        """Memory of one row."""
        encoder = () if self.encoder is None else (self.encoder,)
        return sum(tensor.nbytes for tensor in (*_tensors(self.past), *encoder)) // len(self.mask)


def _tensors(past: Any) -> Iterator[Tensor]:
    parts = [past.self_attention_cache, past.cross_attention_cache] if isinstance(past, EncoderDecoderCache) else [past]
    for layer in (layer for part in parts for layer in part.layers):
        for value in vars(layer).values():  # layers of linear attention have dictionaries of states
            values = value.values() if isinstance(value, dict) else (value,)
            yield from (one for one in values if isinstance(one, Tensor))
