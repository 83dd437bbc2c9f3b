"""Computation shared by BLIP and BLIP-2: outputs of a training step, features, matching of images and texts.

Letters: B samples, T text tokens, E width, D width of the common space.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_lite.common.errors import InputError
from lavis_lite.models.base import Output
from lavis_lite.models.batches import cut_texts
from lavis_lite.models.inputs import image_of, listed_texts, required, texts_of
from lavis_lite.models.reranking import RerankInterface
from lavis_lite.nn.attention import CrossAttentionKV

FEATURE_MODES = ("image", "text", "multimodal")
MATCH_HEADS = ("itm", "itc")


class MatchingModel(RerankInterface, Protocol):
    """Encoders of images and texts with projections into a common space."""

    vision_proj: nn.Linear
    text_proj: nn.Linear

    def text_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return states (B,T,E) of texts read alone; token 0 represents the text."""

    def image_states(self, image: Tensor) -> Tensor:
        """Return states of images, which `vision_proj` projects."""

    def multimodal_states(self, image: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return states of images and texts read together, by the names of `extract_features`."""

    def image_context(self, image: Tensor) -> CrossAttentionKV:
        """Return keys and values of the images."""


def project(layer: nn.Linear, states: Tensor) -> Tensor:
    """Project and normalise to unit length."""
    return F.normalize(layer(states), dim=-1)


def training_output(metrics: dict[str, Tensor] | None = None, **losses: Tensor) -> Output:
    """Return the sum of the losses as `loss`, each loss as `loss_<name>` and the metrics."""
    total = None
    for value in losses.values():
        total = value if total is None else total + value
    assert total is not None
    parts = {f"loss_{name}": value.detach() for name, value in losses.items()}
    return Output({"loss": total, **parts, **(metrics or {})})


def given_texts(samples: dict[str, Any]) -> list[str]:
    """Return `text_input`, any number of texts; a single string is one text."""
    texts = required(samples, "text_input", "a text, or a list of texts")
    return listed_texts([texts] if isinstance(texts, str) else texts, "samples['text_input']")


@torch.no_grad()
def extract_features(model: MatchingModel, samples: dict[str, Any], mode: str) -> Output:
    """Return features before and, with the suffix `_proj`, after projection and normalisation."""
    if mode not in FEATURE_MODES:
        raise InputError(f"mode: must be one of {', '.join(FEATURE_MODES)}, got {mode!r}")
    if mode == "text":
        states = model.text_states(*cut_texts(model, given_texts(samples)))
        return Output({"text_embeds": states, "text_embeds_proj": project(model.text_proj, states)})
    image = image_of(samples, answering=True)
    if mode == "image":
        states = model.image_states(image)
        return Output({"image_embeds": states, "image_embeds_proj": project(model.vision_proj, states)})
    return Output(model.multimodal_states(image, *cut_texts(model, texts_of(samples, len(image)))))


def match(model: MatchingModel, samples: dict[str, Any], head: str, *, one_text_per_image: bool) -> Tensor:
    """Return `itm` logits (B,2) of each pair, or `itc` similarities of all images (rows) with all texts."""
    if head not in MATCH_HEADS:
        raise InputError(f"match_head: must be one of {', '.join(MATCH_HEADS)}, got {head!r}")
    image = image_of(samples, answering=True)
    is_paired = head == "itm" or one_text_per_image
    ids, mask = cut_texts(model, texts_of(samples, len(image)) if is_paired else given_texts(samples))
    if head == "itm":
        return model.matching_logits(ids, mask, model.image_context(image))
    return model.similarity(model.image_features(image)[1], model.encode_text(ids, mask))
