"""BLIP-2's Q-Former: its masks as pictures, the recorded states of the original, cached text, shared contexts."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from lavis_lite.nn.attention import text_mask
from lavis_lite.nn.qformer import QFormer, QFormerConfig

REFERENCE = Path(os.environ.get("LAVIS_LITE_REFERENCE_DIR", Path(__file__).parent / "reference"))
CASE = Path(__file__).parent / "reference" / "cases" / "blip2_qformer__a"


def picture(mask: Tensor) -> list[str]:
    """Draw the mask: rows attend to columns, # where allowed."""
    return ["".join("#" if value == 0 else "." for value in row) for row in mask[0, 0]]


def small(**sizes: object) -> QFormer:
    torch.manual_seed(0)
    config = QFormerConfig(
        vocab_size=50, hidden_size=16, num_layers=3, num_heads=2, intermediate_size=24, context_width=12, **sizes
    )
    return QFormer(config, with_lm_head=config.has_text).eval()


def test_masks_are_those_of_the_papers_figure_2() -> None:
    text = torch.tensor([[1, 1, 1, 0]])  # two queries, three tokens, one of padding
    assert picture(text_mask(text, 0, num_queries=2, causal=False, dtype=torch.float)) == [
        "#####.",  # the same for all rows
    ]
    assert picture(text_mask(text, 0, num_queries=2, causal=True, dtype=torch.float)) == [
        "##....",
        "##....",
        "###...",
        "####..",
        "#####.",
        "#####.",
    ]


@pytest.fixture(scope="module")
def case() -> tuple[QFormer, Tensor, dict[str, Tensor], dict]:
    """The recorded Q-Former, its queries, recorded outputs and settings."""
    config = json.loads((CASE / "config.json").read_text())
    weights = load_file(CASE / "weights.safetensors")
    sizes = config["qformer"]
    model = QFormer(
        QFormerConfig(
            vocab_size=config["_explicit"]["qformer"]["vocab_size"],
            hidden_size=sizes["hidden"],
            num_layers=sizes["layers"],
            num_heads=sizes["heads"],
            intermediate_size=sizes["inter"],
            max_positions=config["_explicit"]["qformer"]["max_position_embeddings"],
            context_width=config["vit"]["width"],
        ),
        with_lm_head=True,
    ).eval()
    model.load_state_dict({k.removeprefix("Qformer."): v for k, v in weights.items() if k.startswith("Qformer.")})
    return model, weights["query_tokens"], load_file(CASE / "outputs.safetensors"), config


@torch.no_grad()
def test_recorded_states(case: tuple[QFormer, Tensor, dict[str, Tensor], dict]) -> None:
    model, queries, outputs, config = case
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "tiny_hf" / "bert")
    tokens = tokenizer(config["captions"], padding="longest", return_tensors="pt")
    context = model.project_kv(outputs["image_embeds"])
    alone, _ = model(queries, context=context)
    text, _ = model(None, tokens.input_ids, tokens.attention_mask)
    both, _ = model(queries, tokens.input_ids, tokens.attention_mask, context=context)
    for actual, name in (
        (alone, "image/image_embeds"),
        (text, "text/text_embeds"),
        (both[:, : queries.shape[1]], "multimodal/multimodal_embeds"),
    ):
        torch.testing.assert_close(actual, outputs[f"extract_features/{name}"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_text_after_cached_queries_equals_one_causal_pass() -> None:
    model = small()
    queries, image = torch.randn(1, 3, 16), torch.randn(2, 5, 12)
    ids, mask = torch.randint(1, 50, (2, 4)), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    context = model.project_kv(image)
    whole, _ = model(queries, ids, mask, context=context, causal=True)
    _, cache = model(queries, context=context)
    first, cache = model(None, ids[:, :2], mask[:, :2], past=cache)
    last, _ = model(None, ids[:, 2:], mask, past=cache)
    torch.testing.assert_close(torch.cat([first, last], dim=1), whole[:, 3:])
    assert model.logits(last).shape == (2, 2, 50)


@torch.no_grad()
def test_one_image_is_shared_by_several_texts() -> None:
    model = small()
    queries, image = torch.randn(1, 3, 16), torch.randn(2, 5, 12)
    ids, mask = torch.randint(1, 50, (6, 4)), torch.ones(6, 4, dtype=torch.long)
    shared, _ = model(queries, ids, mask, context=model.project_kv(image))
    copied, _ = model(queries, ids, mask, context=model.project_kv(image.repeat_interleave(3, 0)))
    torch.testing.assert_close(shared, copied)


def test_every_second_layer_cross_attends() -> None:
    names = {name.split(".")[3] for name, _ in small().named_parameters() if "crossattention" in name}
    assert names == {"0", "2"}
    assert {n.split(".")[3] for n, _ in small(cross_attention_freq=1).named_parameters() if "crossatt" in n} == set(
        "012"
    )


def test_text_longer_than_the_positions() -> None:
    with pytest.raises(ValueError, match=r"model\.qformer\.max_positions: .*600.*512"):
        small()(None, torch.ones(1, 600, dtype=torch.long), torch.ones(1, 600))
