"""The layout of transformers' caches that `nn/llm_cache.py` reads; seen with transformers 5.17 and 5.23.

If a test fails after an update, look in transformers' `cache_utils.py` for: `Cache.layers`; the tensors among the
attributes of each layer (`keys` and `values`; `conv_states` and `recurrent_states` of linear attention may be
dictionaries); `EncoderDecoderCache.self_attention_cache` and `.cross_attention_cache`; `reorder_cache(index)` of
both, which must replace tensors and not write into them; `DynamicLayer`, of which `GrowingLayer` replaces `update` and
`reorder_cache`, and its attributes `keys`, `values`, `dtype`, `device` and `is_initialized`.
"""

from typing import Any

import pytest
import torch
import transformers
from test_llm import CONFIGS, adapter, inputs, random_model

from lavis_lite.nn.llm_cache import LLMCache, _tensors

SEEN = "seen with transformers 5.17 and 5.23; this is " + transformers.__version__
ROWS, LENGTH, HEADS, WIDTH = 4, 9, 4, 8


def read(family: str) -> LLMCache:
    lm = adapter(random_model(family))
    return lm.prefix(*inputs(lm)).cache


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("opt", [(ROWS, HEADS, LENGTH, WIDTH)] * 4),
        ("llama", [(ROWS, 2, LENGTH, WIDTH)] * 4),
        ("t5", [(ROWS, HEADS, 1, WIDTH)] * 4 + [(ROWS, HEADS, LENGTH, WIDTH)] * 4),
        ("lfm2", [(ROWS, 2, LENGTH, WIDTH)] * 2 + [(ROWS, 32, 3)]),
    ],
)
def test_keys_values_and_states_of_every_layer_are_found(family: str, expected: list[tuple[int, ...]]) -> None:
    tensors = list(_tensors(read(family).past))
    states = [tuple(t.shape) for t in tensors if t.dim() > 1]
    assert sorted(states) == sorted(expected), SEEN


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_rows_are_copied_and_the_cache_is_kept(family: str) -> None:
    cache = read(family)
    before = [tensor.clone() for tensor in _tensors(cache.past)]
    index = torch.tensor([2, 2, 0])
    copied = cache.rows(index)
    for tensor, old, new in zip(_tensors(cache.past), before, _tensors(copied.past), strict=True):
        assert torch.equal(tensor, old), SEEN
        if old.dim() > 1:
            assert torch.equal(new, old[index]), SEEN
            assert new.data_ptr() != tensor.data_ptr(), SEEN
    assert copied.mask.tolist() == cache.mask[index].tolist()


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_selecting_leaves_what_an_encoder_has_read(family: str) -> None:
    cache = read(family)
    past: Any = cache.past
    own = past.self_attention_cache if family == "t5" else past
    before = [layer.keys.clone() for layer in own.layers]
    index = torch.tensor([1, 0, 3, 2])
    cross = [layer.keys.clone() for layer in past.cross_attention_cache.layers] if family == "t5" else []
    cache.select(index)
    for layer, keys in zip(own.layers, before, strict=True):
        assert torch.equal(layer.keys, keys[index]), SEEN
    if family == "t5":
        for layer, keys in zip(past.cross_attention_cache.layers, cross, strict=True):
            assert torch.equal(layer.keys, keys), SEEN


def test_memory_of_a_row() -> None:
    per_layer = 2 * HEADS * LENGTH * WIDTH * 4
    assert read("opt").row_bytes == 2 * per_layer, SEEN


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_an_expanded_cache_grows_in_place(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that take each other's place, and tokens beyond the room that is made at once: logits as of plain caches."""
    monkeypatch.setattr("lavis_lite.nn.growing.ROOM", 2)
    lm = adapter(random_model(family))
    prefix = lm.prefix(*inputs(lm))
    torch.manual_seed(0)
    index = torch.arange(ROWS).repeat_interleave(2)
    growing, plain = prefix.cache.expand(2), prefix.cache.rows(index)
    before = [tensor.clone() for tensor in _tensors(prefix.cache.past)]
    for _ in range(5):
        ids = torch.randint(4, 60, (2 * ROWS, 1))
        found, growing = lm.extend(growing, ids)
        expected, plain = lm.extend(plain, ids)
        torch.testing.assert_close(found, expected, msg=lambda text: f"{SEEN}: {text}")
        chosen = torch.randint(2, (2 * ROWS,)) + 2 * index
        growing, plain = growing.select(chosen), plain.rows(chosen)
    for tensor, old in zip(_tensors(prefix.cache.past), before, strict=True):
        assert torch.equal(tensor, old), SEEN
