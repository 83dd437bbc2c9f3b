"""Comparison of images and texts in BLIP and BLIP-2: outputs of a training step, features, matching, retrieval.

Letters: B samples, T text tokens, E width, D width of the common space.
"""

import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_lite.common.bounds import one_of
from lavis_lite.common.errors import InputError
from lavis_lite.common.precision import without_autocast
from lavis_lite.models.base import BaseModel, Output
from lavis_lite.models.batches import Texts, by_length
from lavis_lite.models.inputs import texts_of
from lavis_lite.nn.attention import CrossAttentionKV

logger = logging.getLogger(__name__)

TEXTS_PER_STEP = 256
"""Texts that are encoded at once."""


def scored(head: nn.Linear, states: Tensor) -> Tensor:
    """Apply a head; in evaluation in float32, whatever autocast says: scores rounded to bf16 would tie."""
    if head.training:
        return head(states)
    with without_autocast(states.device):
        return F.linear(states.float(), head.weight.float(), head.bias.float())


def project(layer: nn.Linear, states: Tensor) -> Tensor:
    """Project and normalise to unit length."""
    return F.normalize(scored(layer, states), dim=-1)


def training_output(metrics: dict[str, Tensor] | None = None, **losses: Tensor) -> Output:
    """Return the sum of the losses as `loss`, each loss as `loss_<name>` and the metrics."""
    first, *rest = losses.values()
    parts = {f"loss_{name}": value.detach() for name, value in losses.items()}
    return Output({"loss": sum(rest, first), **parts, **(metrics or {})})


class ImageTextModel(BaseModel):
    """Encoders of images and texts with projections into a common space, and a head that matches them."""

    vision_proj: nn.Linear
    text_proj: nn.Linear
    itm_head: nn.Linear
    one_text_per_image: ClassVar[bool]
    """Whether similarities too are of as many texts as images."""
    has_warned_of_cut_texts: bool = False
    """Whether the warning about cut texts was logged; it is logged once per model."""

    @abstractmethod
    def encode_image(self, image: Tensor) -> Tensor:
        """Return the images' tokens (B,S,E)."""

    @abstractmethod
    def image_states(self, image: Tensor) -> Tensor:
        """Return states of images, which `vision_proj` projects."""

    @abstractmethod
    def image_features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (B,S,E) and normalised features (B,D) or, of several queries, (B,Q,D)."""

    @abstractmethod
    def text_states(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return states (B,T,E) of texts read alone; token 0 represents the text."""

    @abstractmethod
    def multimodal_states(self, image: Tensor, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Return states of images and texts read together, by the names of `extract_features`."""

    @abstractmethod
    def similarity(self, image_feat: Tensor, text_feat: Tensor) -> Tensor:
        """Return similarities (images, texts) of features."""

    def full_similarity(self, image_feat: Tensor, text_feat: Tensor) -> Tensor:
        """Return `similarity` in float32, whatever autocast says."""
        with without_autocast(image_feat.device):
            return self.similarity(image_feat.float(), text_feat.float())

    @abstractmethod
    def project_kv(self, tokens: Tensor) -> CrossAttentionKV:
        """Return keys and values of the images' tokens."""

    @abstractmethod
    def matching_logits(self, ids: Tensor, mask: Tensor | None, context: CrossAttentionKV) -> Tensor:
        """Return logits (B,2): no match, match. One context row may serve several consecutive texts."""

    def image_context(self, image: Tensor) -> CrossAttentionKV:
        """Return keys and values of the images."""
        return self.project_kv(self.encode_image(image))

    def encode_text(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return a text's normalised feature (B,D), that of `[CLS]`."""
        return project(self.text_proj, self.text_states(ids, mask)[:, 0])

    @torch.no_grad()
    def extract_features(self, samples: dict[str, Any], mode: str = "multimodal") -> Output:
        """Return features of `image` (B,3,H,W) and/or `text_input` (B texts; the first `max_txt_len` tokens count).

        `image`: `image_embeds` and `image_embeds_proj`, normalised. BLIP's are of tokens, (B,1+N,E) and (B,1+N,D), of
        which token 0 is the whole image; BLIP-2's of queries, (B,Q,E) and (B,Q,D).
        `text`: `text_embeds` (B,T,E) and `text_embeds_proj` (B,T,D), normalised; token 0 is the whole text.
        `multimodal`: `multimodal_embeds`, BLIP's of the text's tokens (B,T,E), beside `image_embeds`, BLIP-2's of the
        queries (B,Q,E); they attend to image and text.
        """
        one_of("mode", mode, ("image", "text", "multimodal"))
        if mode == "text":
            states = self.text_states(*self.cut_texts(texts_of(samples, None)))
            return Output({"text_embeds": states, "text_embeds_proj": project(self.text_proj, states)})
        image = self.checked_image(samples, answering=True)
        if mode == "image":
            states = self.image_states(image)
            return Output({"image_embeds": states, "image_embeds_proj": project(self.vision_proj, states)})
        return Output(self.multimodal_states(image, *self.cut_texts(texts_of(samples, len(image)))))

    @torch.no_grad()
    def class_features(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        """Return each class's feature (C,D): the normalised mean of the features of its prompts, as CLIP's."""
        texts = [text for own in prompts for text in own]
        features = by_length(
            lambda part: self.encode_text(*self.cut_texts(part)), texts, at_once=TEXTS_PER_STEP
        ).float()
        means = [own.mean(dim=0) for own in features.split([len(own) for own in prompts])]
        return F.normalize(torch.stack(means), dim=-1)

    @torch.no_grad()
    def class_scores(
        self,
        samples: dict[str, Any],
        prompts: Sequence[Sequence[str]],
        features: Tensor,
        *,
        match_head: str = "itc",
        k_test: int = 0,
    ) -> Tensor:
        """Return the score (B,C) of each class, given as its `prompts` and their `class_features`, for each `image`.

        `itc`: the similarity of image and class. `itm`: the mean over the class's prompts of the log-probability of a
        match, of the `k_test` most similar classes (0: all); the others have -inf.
        """
        one_of("match_head", match_head, ("itc", "itm"))
        image = self.checked_image(samples, answering=True)
        tokens, image_feat = self.image_features(image)
        scores = self.full_similarity(image_feat, features)
        if match_head == "itc":
            return scores
        chosen = scores.topk(min(k_test or len(prompts), len(prompts)), dim=1).indices
        matched = torch.full_like(scores, float("-inf"))
        for row, classes in enumerate(chosen.tolist()):
            context = self.project_kv(tokens[row : row + 1])
            texts = [text for number in classes for text in prompts[number]]
            parts = [texts[start : start + TEXTS_PER_STEP] for start in range(0, len(texts), TEXTS_PER_STEP)]
            logits = torch.cat([self.matching_logits(*self.cut_texts(part), context) for part in parts])
            match = logits.float().log_softmax(dim=1)[:, 1]
            means = [own.mean() for own in match.split([len(prompts[number]) for number in classes])]
            matched[row, chosen[row]] = torch.stack(means).to(matched.dtype)
        return matched

    def cut_texts(self, texts: Sequence[str]) -> Texts:
        """Return ids and mask, cut to `max_txt_len` tokens; log a warning once per model if a text was cut."""
        ids, mask = self.tokenize(texts, max_length=self.max_txt_len)
        if ids.shape[1] >= self.max_txt_len:  # otherwise none was cut
            self.warn_of_cut_texts(texts)
        return ids, mask

    def warn_of_cut_texts(self, texts: Sequence[str]) -> None:
        """Log once per model how many of the texts are longer than `max_txt_len` tokens."""
        if self.has_warned_of_cut_texts:
            return
        lengths = [len(row) for row in self.tokenizer(list(texts), verbose=False).input_ids]
        num_cut = sum(length > self.max_txt_len for length in lengths)
        if num_cut:
            self.has_warned_of_cut_texts = True
            logger.warning(
                f"{num_cut} of {len(texts)} texts are longer than max_txt_len={self.max_txt_len} tokens (the longest "
                f"has {max(lengths)}), of which the rest is not read; raise model.max_txt_len. This is logged once."
            )


class FeatureModel(ImageTextModel):
    """Features of images, texts and pairs, before and after projection."""

    def forward(self, samples: dict[str, Any], mode: str = "multimodal") -> Output:
        return self.extract_features(samples, mode=mode)


class PairModel(ImageTextModel):
    """Scores pairs of images and texts by both the matching head and the contrast (task `matching`)."""

    @torch.no_grad()
    def match_scores(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        """Return `itm`, the matching head's probability of a match, and `itc`, the cosine similarity, of each text.

        `image` is (B,3,H,W), `text_input` B texts, or k times as many: the k texts of an image in a row. Scores are
        float32 (k*B).
        """
        image, texts = self.checked_image(samples, answering=True), texts_of(samples, None)
        if len(texts) % len(image):
            raise InputError(
                f"text_input: {len(texts)} texts do not divide among {len(image)} images: give each as many"
            )
        ids, mask = self.cut_texts(texts)
        tokens, image_feat = self.image_features(image)
        logits = self.matching_logits(ids, mask, self.project_kv(tokens))
        similarities = self.full_similarity(image_feat, self.encode_text(ids, mask))
        rows = torch.arange(len(texts), device=logits.device) // (len(texts) // len(image))
        return {"itm": logits.float().softmax(dim=-1)[:, 1], "itc": similarities[rows, torch.arange(len(texts))]}


class MatchingModel(PairModel):
    """Scores how well texts fit images."""

    def forward(self, samples: dict[str, Any], match_head: str = "itm") -> Tensor:  # type: ignore[override]  # LAVIS's
        """`itm`: logits (B,2) of each pair, `[:, 1]` for a match; `itc`: similarities of all images (rows) with all
        texts, whose number is that of the images for BLIP. The first `max_txt_len` tokens of a text count.
        """
        one_of("match_head", match_head, ("itm", "itc"))
        image = self.checked_image(samples, answering=True)
        is_paired = match_head == "itm" or self.one_text_per_image
        ids, mask = self.cut_texts(texts_of(samples, len(image) if is_paired else None))
        if match_head == "itm":
            return self.matching_logits(ids, mask, self.image_context(image))
        return self.full_similarity(self.image_features(image)[1], self.encode_text(ids, mask))
