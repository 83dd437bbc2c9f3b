"""Keys and values that grow in place, against concatenation."""

import torch

from lavis_lite.nn.attention import BertConfig
from lavis_lite.nn.bert import BertLMHeadModel
from lavis_lite.nn.growing import ROOM, Growing


def test_tokens_are_added_and_rows_take_each_others_place() -> None:
    torch.manual_seed(0)
    start = torch.randn(2, 2, 3, 4).repeat_interleave(2, 0)  # two rows of each of two samples
    growing, expected, given = Growing(start), start.clone(), start.clone()
    memories = set()
    for step in range(ROOM + 5):
        new = torch.randn(4, 2, 1 + step % 2, 4)
        found, expected = growing.add(new), torch.cat([expected, new], dim=2)
        assert torch.equal(found, expected)
        index = torch.randint(2, (4,)) + torch.tensor([0, 0, 2, 2])
        growing.select(index)
        expected = expected[index]
        assert torch.equal(growing.tokens, expected)
        memories.add(growing.memory.data_ptr())
    assert len(memories) <= 2 + (expected.shape[2] - 3) // ROOM  # few copies of all tokens
    assert torch.equal(start, given)


@torch.no_grad()
def test_a_decoder_with_a_growing_cache_has_the_logits_of_the_whole_texts() -> None:
    """Two texts of three beams each, which continue each other, against passes over the whole texts."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "intermediate_size": 16}
    model = BertLMHeadModel(BertConfig(**sizes, max_positions=ROOM + 8, context_width=6)).eval()
    prompt, context = torch.randint(1, 11, (2, 3)), model.bert.project_kv(torch.randn(2, 5, 6))
    _, start = model(prompt, torch.ones_like(prompt), context=context)
    before = [part.clone() for layer in start.layers for part in layer]
    cache, ids = start.expand(3), prompt.repeat_interleave(3, 0)
    for _ in range(ROOM + 3):
        index = torch.randint(3, (6,)) + torch.tensor([0, 0, 0, 3, 3, 3])
        ids, cache = torch.cat([ids[index], torch.randint(1, 11, (6, 1))], dim=1), cache.select(index)
        logits, cache = model(ids[:, -1:], torch.ones_like(ids), context=context, past=cache)
        assert cache.num_tokens == ids.shape[1]
    whole, _ = model(ids, torch.ones_like(ids), context=context)
    torch.testing.assert_close(logits[:, -1], whole[:, -1])
    for old, part in zip(before, (part for layer in start.layers for part in layer), strict=True):
        assert torch.equal(part, old)  # the prompt's own cache can be continued again
