"""Maps of where a model looked: Grad-CAM of its cross-attention to the image, for matching, captions and answers.

As in ALBEF and LAVIS, a map is the cross-attention of one layer times the positive part of its gradient, meaned over
heads. The rows of the maps depend on the model: BLIP's text tokens attend to the image; in BLIP-2 only the
queries do.

Letters: R rows (tokens or queries), h and w the image encoder's grid.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lavis_lite.common.bounds import check_number
from lavis_lite.common.errors import InputError
from lavis_lite.models.base import BaseModel
from lavis_lite.models.blip.caption import BlipCaption
from lavis_lite.models.blip.vqa import BlipVQA
from lavis_lite.models.blip2.llm import Blip2LLM
from lavis_lite.models.image_text import ImageTextModel
from lavis_lite.nn.attention import Attention, SelfAttention
from lavis_lite.nn.attention_maps import as_grid, grad_cam, recorded_attention

PUBLISHED_LAYER = 7 / 12
"""LAVIS's notebooks show layer 7 of 12."""


WHOLE = "[ENC]"
"""The token that BLIP's matching head reads; the last layer has a gradient at it alone."""


class Maps(NamedTuple):
    """Maps of one image, (R,h,w) float32, each with the token or query that attends so."""

    labels: list[str]
    maps: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """The mean of all maps, (h,w), without that of the whole text."""
        mean: np.ndarray = self.maps[self.labels[0] == WHOLE :].mean(axis=0)
        return mean


def explain(
    model: BaseModel, samples: dict[str, Any], *, text: str | None = None, layer: int | None = None
) -> tuple[str, Maps]:
    """Return a text and the maps of what it looks at in one image, `samples["image"]` (1,3,H,W).

    A matching model explains why `text_input` matches. A captioning model explains `text`, or else the caption that it
    writes, with one map per token; a model that answers, `text` or its answer to `text_input`. `layer` counts the
    layers with cross-attention from 0; the default is 7/12 of them, as in LAVIS's notebooks.

    Raises:
        InputError: a model without cross-attention to an image, no such layer, or no text to explain.
    """
    if isinstance(model, ImageTextModel):
        wanted = text or samples.get("text_input")
        if not wanted:
            raise InputError("explain: give the text whose match with the image is explained")
        shown = str(wanted)
        return shown, _match_maps(model, samples, shown, layer)
    if isinstance(model, BlipCaption):
        shown = text or str(model.generate(samples)[0])
        return shown, _caption_maps(model, samples, shown, layer)
    if isinstance(model, BlipVQA):
        shown = text or model.predict_answers(samples, inference_method="generate")[0]
        return shown, _answer_maps(model, samples, shown, layer)
    if isinstance(model, Blip2LLM):
        shown = text or str(model.generate(samples | {"prompt": samples.get("text_input", model.prompt)})[0])
        return shown, _language_model_maps(model, samples, shown, layer)
    raise InputError(f"explain: {type(model).__name__} has no cross-attention to an image that can be shown")


def attention_layers(model: nn.Module) -> list[SelfAttention]:
    """Return the layers whose text or queries attend to the image, first to last."""
    names = ("text_encoder", "text_decoder", "Qformer")
    part = next((child for name, child in model.named_children() if name in names), nn.Module())
    found = [
        module.self
        for name, module in part.named_modules()
        if name.endswith("crossattention") and type(module) is Attention
    ]
    return found


def grad_cam_of(model: nn.Module, target: Callable[[], Tensor], layer: int | None) -> Tensor:
    """Return the Grad-CAM (B,R,S) of the sum of `target()`, computed with gradients, at a layer."""
    layers = attention_layers(model)
    if not layers:
        raise InputError(f"explain: {type(model).__name__} has no cross-attention to one image")
    index = int(len(layers) * PUBLISHED_LAYER) if layer is None else layer
    check_number("layer", index, 0, len(layers) - 1)
    with recorded_attention(layers[index]) as record, torch.enable_grad():
        score = target().sum()
        (gradient,) = torch.autograd.grad(score, record[-1])
    return grad_cam(record[-1], gradient)


def _match_maps(model: ImageTextModel, samples: dict[str, Any], text: str, layer: int | None) -> Maps:
    with torch.no_grad():
        ids, mask = model.cut_texts([text])
        context = model.image_context(samples["image"])
    cam = grad_cam_of(model, lambda: model.matching_logits(ids, mask, context)[:, 1], layer)
    if model.one_text_per_image:  # BLIP: without [SEP]
        return Maps([WHOLE, *_tokens(model, ids[0, 1:-1])], _numbers(cam[:, : ids.shape[1] - 1]))
    return _query_maps(cam)


def _caption_maps(model: BlipCaption, samples: dict[str, Any], text: str, layer: int | None) -> Maps:
    with torch.no_grad():
        context = model.caption_context(samples["image"])
        ids, mask = model.tokenize([text], start=model.decoder_start)
    cam = grad_cam_of(model, lambda: _log_likelihood(model.text_decoder(ids, mask, context=context)[0], ids), layer)
    return Maps(_tokens(model, ids[0, 1:-1]), _numbers(cam[:, : ids.shape[1] - 2]))  # a row predicts the next token


def _answer_maps(model: BlipVQA, samples: dict[str, Any], answer: str, layer: int | None) -> Maps:
    ids, _ = model.tokenize([answer], start=model.decoder_start)

    def target() -> Tensor:
        states, question_mask = model.encode_questions(samples)
        context = model.text_decoder.bert.project_kv(states, mask=question_mask)
        return -model.answer_loss(ids, context)

    cam = grad_cam_of(model, target, layer)
    texts = samples["text_input"]
    question, _ = model.tokenize([texts] if isinstance(texts, str) else texts, start=model.encoder_start)
    return Maps(_tokens(model, question[0, 1:-1]), _numbers(cam[:, 1 : question.shape[1] - 1]))


def _language_model_maps(model: Blip2LLM, samples: dict[str, Any], text: str, layer: int | None) -> Maps:
    texts = samples.get("text_input", model.prompt)
    asked = {"image": samples["image"], "text_input": [texts] if isinstance(texts, str) else texts}
    cam = grad_cam_of(model, lambda: -model(asked | {"text_output": [text], "prompt": "{}"})["loss"], layer)
    return _query_maps(cam)


def _log_likelihood(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the log-likelihood (B,) of a text's tokens after the first."""
    scores = logits[:, :-1].float().log_softmax(dim=-1)
    return scores.gather(-1, ids[:, 1:, None]).squeeze(-1).sum(dim=1)


def _query_maps(cam: Tensor) -> Maps:
    return Maps([f"query {number}" for number in range(1, cam.shape[1] + 1)], _numbers(cam))


def _numbers(cam: Tensor) -> np.ndarray:
    numbers: np.ndarray = as_grid(cam)[0].float().cpu().numpy()
    return numbers


def _tokens(model: Any, ids: Tensor) -> list[str]:
    tokens: list[str] = model.tokenizer.convert_ids_to_tokens(ids.tolist())
    return tokens
