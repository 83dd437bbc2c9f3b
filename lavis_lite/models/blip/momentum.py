"""Contrast with momentum encoders, feature queues and hard negatives, for pretraining and retrieval finetuning.

With `queue_size` 0 the contrast is within the batch: the candidates are the momentum features of all ranks' current
samples, and nothing older. With a queue they are this rank's samples and the queue, as published.

Note: momentum encoders, queues and the clamp of the temperature are updated inside `forward`, before the backward pass,
as the published models were trained; but only where gradients are enabled, so that evaluating a loss changes nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_lite.common import dist
from lavis_lite.common.bounds import check_number
from lavis_lite.models.base import Output
from lavis_lite.models.batches import Texts, fetch_texts, in_compute_type, match_pairs, selected
from lavis_lite.models.blip.matching import BlipMatching
from lavis_lite.models.image_text import PairModel, project
from lavis_lite.nn.attention import CrossAttentionKV
from lavis_lite.nn.bert import BertModel
from lavis_lite.nn.learning import TEMPERATURE_LIMITS, contrast_metrics
from lavis_lite.nn.losses import draw_negatives, momentum_targets, soft_cross_entropy
from lavis_lite.nn.momentum import enqueue, update_momentum
from lavis_lite.nn.video import frame_tokens, visual_summary
from lavis_lite.nn.vision import ImageEncoder

MAX_QUEUE = 10**7
"""Features in the queue, 10 GB of 256 numbers each."""
MOMENTUM_PARTS = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")


class MomentumFeatures(NamedTuple):
    """Momentum features of this rank's batch, (B,E) each, and of all candidates, (E,N) each: the `num_current` of the
    current batch, and the queues.
    """

    image: Tensor
    text: Tensor
    image_all: Tensor
    text_all: Tensor
    num_current: int


class StepParts(NamedTuple):
    """Tensors of a training step, of which LAVIS's outputs have more than the losses."""

    image: Tensor
    tokens: Tensor
    texts: Texts
    features: tuple[Tensor, Tensor]
    momentum: MomentumFeatures
    hard: Tensor
    alpha: float
    pairs: Tensor


class BlipMomentum(BlipMatching, PairModel):
    """A matching model with momentum encoders (`*_m`) and feature queues."""

    visual_encoder_m: ImageEncoder
    text_encoder_m: BertModel
    vision_proj_m: nn.Linear
    text_proj_m: nn.Linear
    image_queue: Tensor
    text_queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        *,
        queue_size: int = 57600,
        momentum: float = 0.995,
        alpha: float = 0.4,
        negative_all_rank: bool = False,
        embed_dim: int = 256,
        **parts: Any,
    ) -> None:
        super().__init__(embed_dim=embed_dim, **parts)
        check_number("model.queue_size", queue_size, 0, MAX_QUEUE)
        self.itm_head = nn.Linear(self.text_encoder.config.hidden_size, 2)
        self.negative_all_rank = negative_all_rank
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.add_momentum_encoders(MOMENTUM_PARTS, momentum=momentum, alpha=alpha)
        self.register_buffer("image_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @property
    def has_queue(self) -> bool:
        """Return whether features of earlier batches are candidates too."""
        return self.image_queue.shape[1] > 0

    def candidates(self, own: Tensor) -> Tensor:
        """Return the samples of the current batch that this rank's are compared with, along the first dimension: its
        own or, without a queue, all ranks'.
        """
        return own if self.has_queue else dist.all_gather(own)

    def momentum_tokens(self, image: Tensor) -> Tensor:
        """Return the momentum encoder's tokens (B,S,E)."""
        return frame_tokens(self.visual_encoder_m, image)

    @torch.no_grad()
    def momentum_features(self, image: Tensor, ids: Tensor, mask: Tensor | None, *, update: bool) -> MomentumFeatures:
        """Update the momentum encoders (and clamp the temperature) and compute their features."""
        if update:
            self.temp.clamp_(*TEMPERATURE_LIMITS)
            update_momentum(self.momentum_pairs(), self.momentum)
        image_feat = project(
            self.vision_proj_m, visual_summary(self.visual_encoder_m, self.momentum_tokens(image), image)
        )
        text_feat = project(self.text_proj_m, self.text_encoder_m(ids, mask)[0][:, 0])
        images, texts = self.candidates(image_feat).t(), self.candidates(text_feat).t()
        return MomentumFeatures(
            image_feat,
            text_feat,
            torch.cat([images, self.image_queue], dim=1),
            torch.cat([texts, self.text_queue], dim=1),
            num_current=images.shape[1],
        )

    def contrastive_loss(
        self, image_feat: Tensor, text_feat: Tensor, momentum: MomentumFeatures, hard: Tensor, alpha: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the image-text contrast against batch and queue with soft labels, and its metrics within the batch;
        `hard` (B,N) are the row-normalised hard targets.
        """
        with torch.no_grad():
            i2t_targets = momentum_targets(momentum.image @ momentum.text_all / self.temp, hard, alpha)
            t2i_targets = momentum_targets(momentum.text @ momentum.image_all / self.temp, hard, alpha)
        i2t = image_feat @ momentum.text_all / self.temp
        t2i = text_feat @ momentum.image_all / self.temp
        loss = (soft_cross_entropy(i2t, i2t_targets) + soft_cross_entropy(t2i, t2i_targets)) / 2
        current = slice(0, momentum.num_current)
        positive = hard[:, current] > 0
        return loss, contrast_metrics(i2t[:, current], t2i[:, current], positive, image_feat, text_feat, self.temp)

    def with_parts(self, output: Output, parts: StepParts, **more: Callable[[], Any]) -> Output:
        """Return the output with LAVIS's `sims` and `intermediate_output`, computed when they are read.

        `sims` are similarities (B,N) and targets of the contrast, with the temperature at that time. Of
        `intermediate_output`, embeddings of images and texts, also of the momentum encoders, are computed anew, so
        they have another dropout than the losses; `itm_logits` (3B,2) and `more` are the step's own.
        """

        def sims() -> Output:
            (image_feat, text_feat), momentum = parts.features, parts.momentum
            with torch.no_grad():
                own = {
                    "i2t": (image_feat, momentum.image, momentum.text_all),
                    "t2i": (text_feat, momentum.text, momentum.image_all),
                }
                found: dict[str, Tensor] = {}
                for name, (feat, feat_m, others) in own.items():
                    found[f"sim_{name}"], found[f"sim_{name}_m"] = (
                        feat @ others / self.temp,
                        feat_m @ others / self.temp,
                    )
                    found[f"sim_{name}_targets"] = momentum_targets(found[f"sim_{name}_m"], parts.hard, parts.alpha)
            return Output(found)

        def intermediate_output() -> Output:
            own = {name: function() for name, function in more.items()}
            with torch.no_grad():
                is_match = torch.arange(len(parts.pairs), device=parts.pairs.device) < len(parts.tokens)
                return Output(
                    image_embeds=parts.tokens,
                    text_embeds=self.text_states(*parts.texts),
                    image_embeds_m=self.momentum_tokens(parts.image),
                    text_embeds_m=self.text_encoder_m(*parts.texts)[0],
                    itm_logits=parts.pairs,
                    itm_labels=is_match.long(),
                    **own,
                )

        return output.later(sims=sims, intermediate_output=intermediate_output)

    @torch.no_grad()
    def enqueue_features(self, momentum: MomentumFeatures, *more: tuple[Tensor, Tensor]) -> None:
        """Put all ranks' momentum features (and other rows) into the queues, if there are queues."""
        if not self.has_queue:
            return
        queues = [(self.image_queue, momentum.image), (self.text_queue, momentum.text), *more]
        enqueue([(queue, dist.all_gather(rows).t()) for queue, rows in queues], self.queue_ptr)

    def negative_candidates(self, own: Tensor) -> Tensor:
        """Return the rows of the samples among which hard negatives are drawn: this rank's or, with
        `negative_all_rank`, every rank's.
        """
        return dist.all_gather(own) if self.negative_all_rank else own.detach()

    def pair_logits(
        self, tokens: Tensor, texts: Texts, negatives: tuple[Tensor, Tensor], context: CrossAttentionKV
    ) -> Tensor:
        """Return matching logits (3B,2) of the pairs, of each text with a negative image and of each image with a
        negative text.

        `negatives` are drawn rows of `negative_candidates`, (B,) images and (B,) texts; `context` holds this rank's
        images. Of other ranks' samples only those drawn are sent.
        """
        negative_image, negative_text = negatives
        if self.negative_all_rank and dist.world_size() > 1:
            other = self.project_kv(dist.gather_rows(in_compute_type(tokens), negative_image))
            wrong = fetch_texts(texts, negative_text, max_length=self.max_txt_len)
        else:
            other = context.select(negative_image)
            wrong = selected(texts, negative_text)
        return match_pairs(self.matching_logits, texts, (other, wrong), context)

    @torch.no_grad()
    def draw_negatives(
        self, image_feat: Tensor, text_feat: Tensor, others: tuple[Tensor, Tensor], positive: Tensor, floor: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Draw for each text a negative image and for each image a negative text, rows of `negative_candidates`;
        similar ones are likelier. `others` are this rank's features of images and texts as candidates.
        """
        images, texts = map(self.negative_candidates, others)
        t2i = (text_feat @ images.t() / self.temp).softmax(dim=1) + floor
        i2t = (image_feat @ texts.t() / self.temp).softmax(dim=1) + floor
        return draw_negatives(t2i, positive), draw_negatives(i2t, positive)
