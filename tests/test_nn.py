"""Building blocks against hand-written formulas, at sizes small enough to follow."""

import math

import pytest
import torch
from torch import Tensor, nn

from lavis_lite.nn.attention import BertConfig, KeyValueCache, text_mask
from lavis_lite.nn.bert import BertLMHeadModel, BertModel
from lavis_lite.nn.decoding import DecodingConfig, decode, sample_nucleus
from lavis_lite.nn.losses import (
    NextTokens,
    language_modeling_loss,
    momentum_targets,
    same_id_targets,
    soft_cross_entropy,
)
from lavis_lite.nn.momentum import enqueue, update_momentum
from lavis_lite.nn.vision import BlipViT, interpolate_pos_embed, vit_config

SIZES = {"vocab_size": 11, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "intermediate_size": 16}


def bert(**sizes: int) -> BertConfig:
    return BertConfig(**{**SIZES, "max_positions": 12, "context_width": 6, **sizes})


def test_language_modeling_loss_by_hand() -> None:
    """Label smoothing 0.1: nine tenths of the label's negative log-probability, a tenth of the vocabulary's mean."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 5), torch.tensor([[0, 3, 1, -100], [0, -100, 2, 4]])
    log_probs = logits.log_softmax(-1)
    by_text = []
    for row in range(2):
        terms = [
            -0.9 * log_probs[row, step - 1, labels[row, step]] - 0.1 * log_probs[row, step - 1].mean()
            for step in range(1, 4)
            if labels[row, step] != -100
        ]
        by_text.append(torch.stack(terms))
    tokens = NextTokens.of(labels)
    assert tokens.labels.tolist() == [3, 1, 2, 4]
    chosen = tokens.states(logits)
    torch.testing.assert_close(language_modeling_loss(chosen, tokens.labels), torch.cat(by_text).mean())
    losses = language_modeling_loss(chosen, tokens.labels, reduction="none")
    expected = torch.stack([terms.sum() for terms in by_text])
    torch.testing.assert_close(tokens.sum_per_text(losses, labels.shape), expected)


def test_soft_targets_by_hand() -> None:
    sim, hard = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    e = math.e
    softmax = torch.tensor([[e, 1.0, 1 / e]]) / (e + 1 + 1 / e)
    targets = momentum_targets(sim, hard, alpha=0.4)
    torch.testing.assert_close(targets, 0.4 * softmax + 0.6 * hard)
    torch.testing.assert_close(soft_cross_entropy(sim, targets), -(targets * softmax.log()).sum())


def test_texts_of_the_same_image_share_the_target() -> None:
    targets = same_id_targets(torch.tensor([7, 8]), torch.tensor([7, 8, 7, -100]))
    assert targets.tolist() == [[0.5, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0]]


def test_momentum_update_by_hand() -> None:
    online, momentum = nn.Linear(2, 2), nn.Linear(2, 2)
    before = [p.detach().clone() for p in momentum.parameters()]
    update_momentum([(online, momentum)], 0.9)
    for old, new, source in zip(before, momentum.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * source)


def test_queue_overwrites_the_oldest() -> None:
    queue, pointer = torch.zeros(1, 4), torch.tensor([0])
    for value in (1.0, 2.0, 3.0):
        enqueue([(queue, torch.full((1, 2), value))], pointer)
    assert queue.tolist() == [[3.0, 3.0, 2.0, 2.0]]
    assert pointer.tolist() == [2]
    with pytest.raises(ValueError, match=r"model\.queue_size: 4 .*5"):
        enqueue([(queue, torch.zeros(1, 5))], pointer)


def test_causal_mask_with_a_cache() -> None:
    """Two cached tokens, two new ones, the last one padding."""
    mask = text_mask(torch.tensor([[1, 1, 1, 0]]), 2, causal=True, dtype=torch.float32)
    assert mask[0, 0].tolist() == [[0.0, 0.0, 0.0, -10000.0], [0.0, 0.0, 0.0, -10000.0]]
    whole = text_mask(torch.ones(1, 3, dtype=torch.long), 0, causal=True, dtype=torch.float32)
    assert (whole[0, 0] == 0).tolist() == [[True, False, False], [True, True, False], [True, True, True]]


def test_one_context_is_shared_by_several_texts() -> None:
    """A context row of three texts gives the states of three copies of it; a masked state has no effect."""
    torch.manual_seed(0)
    model = BertModel(bert()).eval()
    ids, mask, states = torch.randint(1, 11, (6, 4)), torch.ones(6, 4, dtype=torch.long), torch.randn(2, 5, 6)
    states_mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    shared, _ = model(ids, mask, context=model.project_kv(states, mask=states_mask))
    copied = model.project_kv(states.repeat_interleave(3, 0), mask=states_mask.repeat_interleave(3, 0))
    torch.testing.assert_close(shared, model(ids, mask, context=copied)[0])
    short = model.project_kv(states[:1, :4])
    torch.testing.assert_close(shared[:3], model(ids[:3], mask[:3], context=short)[0])


def test_cached_text_has_the_logits_of_the_whole_text() -> None:
    torch.manual_seed(0)
    model = BertLMHeadModel(bert()).eval()
    ids = torch.randint(1, 11, (2, 6))
    context = model.bert.project_kv(torch.randn(2, 3, 6))
    whole, _ = model(ids, torch.ones(2, 6, dtype=torch.long), context=context)
    _, cache = model(ids[:, :4], torch.ones(2, 4, dtype=torch.long), context=context)
    rest, _ = model(ids[:, 4:], torch.ones(2, 6, dtype=torch.long), context=context, past=cache)
    torch.testing.assert_close(rest, whole[:, 4:])


def test_text_longer_than_the_positions_is_an_error() -> None:
    model = BertModel(bert())
    with pytest.raises(ValueError, match=r"model\.med\.max_positions: .*13.*12"):
        model(torch.ones(1, 13, dtype=torch.long), torch.ones(1, 13, dtype=torch.long))


class Table:
    """A language model that is a table of next-token probabilities; its cache is empty."""

    def __init__(self, probabilities: Tensor) -> None:
        self.log = probabilities.log()

    def __call__(self, ids: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, KeyValueCache]:
        return self.log[ids[:, -1]], KeyValueCache(())


def test_beams_find_what_greed_misses() -> None:
    """From 0, greed takes 1 (0.6) and then at best 0.5; two beams find 2 (0.4) and then 0.9. Token 3 ends a text."""
    table = torch.full((4, 4), 1e-9)
    table[0, 1], table[0, 2] = 0.6, 0.4
    table[1] = torch.tensor([0.25, 0.25, 0.0, 0.5]).clamp_min(1e-9)
    table[2, 3] = 0.9
    start = torch.zeros(1, 1, dtype=torch.long)
    settings = {"eos_id": 3, "pad_id": 9, "max_length": 4, "length_penalty": 0.0}
    assert decode(Table(table), start, DecodingConfig(**settings)).ids.tolist() == [[0, 1, 3]]
    assert decode(Table(table), start, DecodingConfig(num_beams=2, **settings)).ids.tolist() == [[0, 2, 3]]


def test_nucleus_holds_the_fewest_likeliest_tokens() -> None:
    """With probabilities 0.5, 0.3, 0.2 and top_p 0.6 only the first two can be drawn, 5 to 3."""
    torch.manual_seed(0)
    drawn = sample_nucleus(torch.tensor([[0.2, 0.5, 0.3]]).log().expand(4000, -1), top_p=0.6, temperature=1.0)
    counts = torch.bincount(drawn, minlength=3)
    assert counts[0] == 0
    assert counts[1] / 4000 == pytest.approx(0.625, abs=0.03)


def test_layer_ids_for_decay() -> None:
    encoder = BlipViT(vit_config("tiny"))  # of 3 layers
    names = [
        "cls_token",
        "pos_embed",
        "patch_embed.proj.bias",
        "blocks.0.norm1.bias",
        "blocks.2.mlp.fc1.bias",
        "norm.bias",
    ]
    assert [encoder.layer_scale(name, 0.5) for name in names] == [0.0625, 0.0625, 0.0625, 0.125, 0.5, 1.0]


def test_drop_path_grows_with_depth() -> None:
    vit = BlipViT(vit_config("tiny", drop_path_rate=0.2))
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in vit.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_sizes_that_do_not_fit_are_errors() -> None:
    with pytest.raises(ValueError, match=r"model\.vit\.patch_size: .*50.*8"):
        vit_config("tiny", image_size=50)
    with pytest.raises(ValueError, match=r"image: .*\(1, 3, 32, 32\).*48"):
        BlipViT(vit_config("tiny"))(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="5 and 4 patches"):
        interpolate_pos_embed(torch.zeros(1, 6, 4), 5)
