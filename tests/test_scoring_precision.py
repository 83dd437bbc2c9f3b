"""Matching logits, features and similarities are float32 in evaluation, also where the rest runs in bf16."""

import pytest
import torch

from lavis_lite.models import load_model
from lavis_lite.models.image_text import scored

MODELS = ("blip_retrieval", "blip_image_text_matching", "blip2", "blip2_image_text_matching")


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    return load_model(request.param, "tiny").eval()


def is_rounded(values: torch.Tensor) -> bool:
    return values.dtype == torch.bfloat16 or torch.equal(values, values.bfloat16().float())


def test_scores_are_not_rounded_to_bf16(model: torch.nn.Module) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 3, 48, 48)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ids, mask = model.cut_texts(["a red circle", "two blue squares"])
        logits = model.matching_logits(ids, mask, model.image_context(image))
        _, image_feat = model.image_features(image)
        text_feat = model.encode_text(ids, mask)
        sims = model.full_similarity(image_feat, text_feat)
    for values in (logits, image_feat, text_feat, sims):
        assert not is_rounded(values)
    torch.testing.assert_close(sims, model.similarity(image_feat, text_feat), rtol=0, atol=0)


def test_without_autocast_nothing_changes(model: torch.nn.Module) -> None:
    states = torch.randn(5, model.itm_head.in_features)
    torch.testing.assert_close(scored(model.itm_head, states), model.itm_head(states), rtol=0, atol=0)
