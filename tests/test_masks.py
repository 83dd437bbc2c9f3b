"""Attention has no mask where no token is padding, so that the fastest kernels of GPUs can compute it.

Outputs are compared with recorded ones of LAVIS, which has masks everywhere, in `test_reference.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from host_waits import DEVICE, simulated
from torch import Tensor

from lavis_lite.models import load_model
from lavis_lite.nn.bert import BertModel
from lavis_lite.nn.qformer import QFormer, QFormerConfig

PHOTOS = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
EQUAL, UNEQUAL = ["a red circle", "a blue star"], ["a red circle", "a star"]


class Call(NamedTuple):
    """One attention: numbers of tokens that attend and that are attended to, and what says which."""

    num_queries: int
    num_keys: int
    has_mask: bool
    is_causal: bool


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The attentions of text and queries so far."""
    found: list[Call] = []
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention

    def record(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
        found.append(Call(q.shape[-2], k.shape[-2], attn_mask is not None, settings.get("is_causal", False)))
        return attend(q, k, v, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return found


def tiny(arch: str) -> Any:
    torch.manual_seed(0)
    return load_model(arch, "tiny", is_eval=True, device="cpu")


def masked(calls: list[Call]) -> list[Call]:
    return [call for call in calls if call.has_mask]


def test_captions_are_decoded_without_a_mask(calls: list[Call]) -> None:
    model = tiny("blip_caption")
    prompt_length = len(model.tokenizer("a picture of").input_ids) - 1
    model.generate({"image": PHOTOS, "prompt": "a picture of"}, max_new_tokens=3, min_new_tokens=1)
    assert masked(calls) == []
    causal = {call for call in calls if call.is_causal}
    assert causal == {Call(prompt_length, prompt_length, has_mask=False, is_causal=True)}


def test_only_a_prompt_after_queries_has_a_mask(calls: list[Call]) -> None:
    model = tiny("blip2")
    num_queries, prompt_length = model.query_tokens.shape[1], len(model.tokenizer("a picture of").input_ids) - 1
    model.generate({"image": PHOTOS, "prompt": "a picture of"}, max_new_tokens=3, min_new_tokens=1)
    expected = Call(prompt_length, num_queries + prompt_length, has_mask=True, is_causal=False)
    assert set(masked(calls)) == {expected}
    assert any(call.num_queries == 1 and call.num_keys > num_queries for call in calls)


@pytest.mark.parametrize("arch", ["blip_image_text_matching", "blip2_image_text_matching"])
def test_texts_have_a_mask_only_if_their_lengths_differ(arch: str, calls: list[Call]) -> None:
    model = tiny(arch)
    with torch.no_grad():
        alone = [model({"image": PHOTOS[:1], "text_input": [text]}) for text in UNEQUAL]
        model({"image": PHOTOS, "text_input": EQUAL})
        assert masked(calls) == []
        together = model({"image": PHOTOS[:1].expand(2, -1, -1, -1), "text_input": UNEQUAL})
    assert masked(calls) != []
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_the_answers_decoder_has_a_mask_of_the_questions_only_if_their_lengths_differ(calls: list[Call]) -> None:
    model = tiny("blip_vqa")
    for questions, has_mask in ((EQUAL, False), (UNEQUAL, True)):
        calls.clear()
        model.predict_answers(
            {"image": PHOTOS, "text_input": questions}, inference_method="generate", max_new_tokens=3, min_new_tokens=1
        )
        longest = max(len(row) for row in model.tokenizer(questions).input_ids)
        assert {call.num_keys for call in masked(calls)} == ({longest} if has_mask else set())


def test_captions_are_learned_without_a_mask(calls: list[Call]) -> None:
    """Padding comes after all labels."""
    model = tiny("blip_caption")
    longest = max(len(row) for row in model.tokenizer(UNEQUAL).input_ids)
    loss = model({"image": PHOTOS, "text_input": UNEQUAL})["loss"]
    assert masked(calls) == []
    assert Call(longest, longest, has_mask=False, is_causal=True) in calls
    parts = [model({"image": PHOTOS[i : i + 1], "text_input": [text]}) for i, text in enumerate(UNEQUAL)]
    total = sum(part["loss"] * part["num_labels"] for part in parts) / sum(part["num_labels"] for part in parts)
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-6)


def test_a_causal_language_model_learns_and_scores_without_a_mask_on_a_device(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = tiny("blip2_opt"), {"image": PHOTOS, "text_input": UNEQUAL}
    with torch.no_grad():
        loss, losses = model(samples)["loss"], model.class_losses({"image": PHOTOS, "prompt": ""}, ["a star", "no"])
    assert masked(calls) != []  # transformers reads that there is padding
    calls.clear()
    with simulated(monkeypatch) as waits, torch.no_grad():
        model = model.to(DEVICE)
        samples["image"] = given = PHOTOS.to(DEVICE)
        waits.found.clear()
        own = model(samples)["loss"]
        assert masked(calls) == [] == waits.found
        assert any(call.is_causal for call in calls)
        own_losses = model.class_losses({"image": given, "prompt": ""}, ["a star", "no"])
        torch.testing.assert_close(own.cpu(), loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own_losses.cpu(), losses, rtol=1e-5, atol=1e-5)
        assert {call.num_queries < call.num_keys for call in masked(calls)} == {True}  # candidates after the inputs


@pytest.mark.parametrize("num_queries", [0, 2])
@torch.no_grad()
def test_no_mask_means_what_a_mask_of_ones_does(num_queries: int) -> None:
    torch.manual_seed(0)
    config = QFormerConfig(
        vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, context_width=12
    )
    model = (QFormer if num_queries else BertModel)(config).eval()
    bert = model.bert if isinstance(model, QFormer) else model
    ids, ones = torch.randint(1, 50, (3, 5)), torch.ones(3, 5, dtype=torch.long)
    queries = {"queries_BQE": torch.randn(3, num_queries, 16)} if num_queries else {}
    for causal in (False, True):
        expected = bert(ids, ones, causal=causal, **queries)[0]
        torch.testing.assert_close(bert(ids, None, causal=causal, **queries)[0], expected)
    past = bert(None, None, **queries)[1] if num_queries else None
    expected = bert(ids, ones, causal=True, past=past)[0]
    for cut in (1, 3):  # in two parts, after the queries
        first, cache = bert(ids[:, :cut], None, causal=True, past=past)
        second, cache = bert(ids[:, cut:], None, causal=True, past=cache)
        torch.testing.assert_close(torch.cat([first, second], dim=1), expected)
        assert (cache.num_queries, cache.num_tokens) == (num_queries, num_queries + 5)
