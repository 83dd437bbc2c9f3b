"""Keys and values of what a language model has read, with rows repeated, selected and reordered.

Seen with transformers 5.17 and 5.23. Its caches reorder rows, but cannot be copied with rows repeated: this file reads
their private layout: `EncoderDecoderCache.self_attention_cache` and `.cross_attention_cache`, `Cache.layers`, and the
tensors among each layer's attributes. `tests/test_llm_cache.py` says what to check when that changes.

Letters: N rows, S tokens of input, E width.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import EncoderDecoderCache


@dataclass(frozen=True)
class LLMCache:
    """transformers' cache (`past`) and the mask (N,S) of what a causal model or an encoder has read; `encoder` (N,S,E)
    are the encoder's states.
    """

    past: Any
    mask: Tensor
    encoder: Tensor | None = None

    def expand(self, times: int) -> Self:
        """Return a copy with every row repeated, copies side by side."""
        return self.rows(torch.arange(len(self.mask), device=self.mask.device).repeat_interleave(times))

    def rows(self, index: Tensor) -> Self:
        """Return a copy with these rows, which may repeat."""
        kept = {id(tensor): tensor for tensor in _tensors(self.past)}  # not copied twice: reordering copies them
        past = copy.deepcopy(self.past, kept)
        past.reorder_cache(index)
        encoder = None if self.encoder is None else self.encoder[index]
        return replace(self, past=past, mask=self.mask[index], encoder=encoder)

    def select(self, index: Tensor) -> Self:
        """Reorder rows in place, each to a row of the same sample: what an encoder has read stays as it is."""
        past: Any = self.past.self_attention_cache if isinstance(self.past, EncoderDecoderCache) else self.past
        past.reorder_cache(index)
        return self

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
