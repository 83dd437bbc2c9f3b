"""Contrast with momentum encoders, feature queues and hard negatives, for pretraining and retrieval finetuning.

With `queue_size` 0 the contrast is within the batch: the candidates are the momentum features of all ranks' current
samples, and nothing older. With a queue they are this rank's samples and the queue, as published.

Note: momentum encoders, queues and the clamp of the temperature are updated inside `forward`, before the backward pass,
as the published models were trained; but only where gradients are enabled, so that evaluating a loss changes nothing.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_lite.common import dist
from lavis_lite.common.bounds import check_number
from lavis_lite.models.batches import in_compute_type, stack_texts
from lavis_lite.models.blip.matching import BlipMatching
from lavis_lite.models.image_text import project
from lavis_lite.nn.attention import CrossAttentionKV
from lavis_lite.nn.bert import BertModel
from lavis_lite.nn.learning import TEMPERATURE_LIMITS, contrast_metrics
from lavis_lite.nn.losses import draw_negatives, momentum_targets, soft_cross_entropy
from lavis_lite.nn.momentum import (
    ModulePair,
    add_momentum_encoders,
    copy_parameters,
    enqueue,
    momentum_pairs,
    update_momentum,
)
from lavis_lite.nn.vision import BlipViT

MAX_QUEUE = 10**7
"""Features in the queue, 10 GB of 256 numbers each."""
MOMENTUM_PARTS = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")


class MomentumFeatures(NamedTuple):
    """Momentum features of this rank's batch, (B,E) each, and of all candidates, (E,N) each: the current batch, of
    which this rank's first sample is column `start`, and the queues.
    """

    image: Tensor
    text: Tensor
    image_all: Tensor
    text_all: Tensor
    start: int
    num_current: int


class Pool(NamedTuple):
    """Candidates for hard negatives: images' tokens (this rank's: only those drawn are sent), texts, features; `start`
    is the row of this rank's first pair.
    """

    tokens: Tensor
    ids: Tensor
    mask: Tensor
    image_feat: Tensor
    text_feat: Tensor
    start: int
    is_local: bool


class BlipMomentum(BlipMatching):
    """A matching model with momentum encoders (`*_m`) and feature queues."""

    visual_encoder_m: BlipViT
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
        check_number("model.momentum", momentum, 0.0, 1.0)
        check_number("model.alpha", alpha, 0.0, 1.0)
        self.itm_head = nn.Linear(self.text_encoder.config.hidden_size, 2)
        self.momentum, self.alpha, self.negative_all_rank = momentum, alpha, negative_all_rank
        self.temp = nn.Parameter(torch.tensor(0.07))
        add_momentum_encoders(self, MOMENTUM_PARTS)
        self.register_buffer("image_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def momentum_pairs(self) -> list[ModulePair]:
        """Return the (online, momentum) modules."""
        return momentum_pairs(self, MOMENTUM_PARTS)

    def after_loading(self, state: Mapping[str, Tensor]) -> None:
        """Copy the weights to the momentum encoders if the file has none (LAVIS saves none, and left them stale)."""
        if not any(name.startswith("visual_encoder_m.") for name in state):
            copy_parameters(self.momentum_pairs())

    def clamp_temperature(self) -> None:
        """Keep the temperature within [0.001, 0.5]."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                self.temp.clamp_(*TEMPERATURE_LIMITS)

    @property
    def has_queue(self) -> bool:
        """Whether features of earlier batches are candidates too."""
        return self.image_queue.shape[1] > 0

    def candidates(self, own: Tensor) -> Tensor:
        """Return the samples of the current batch that this rank's are compared with, along the first dimension: its
        own or, without a queue, all ranks'.
        """
        return own if self.has_queue else dist.all_gather(own)

    @torch.no_grad()
    def momentum_features(self, image: Tensor, ids: Tensor, mask: Tensor, *, update: bool) -> MomentumFeatures:
        """Update the momentum encoders and compute their features."""
        if update:
            update_momentum(self.momentum_pairs(), self.momentum)
        image_feat = project(self.vision_proj_m, self.visual_encoder_m(image)[:, 0])
        text_feat = project(self.text_proj_m, self.text_encoder_m(ids, mask)[0][:, 0])
        images, texts = self.candidates(image_feat).t(), self.candidates(text_feat).t()
        return MomentumFeatures(
            image_feat,
            text_feat,
            torch.cat([images, self.image_queue], dim=1),
            torch.cat([texts, self.text_queue], dim=1),
            start=0 if self.has_queue else dist.rank() * len(image_feat),
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

    @torch.no_grad()
    def enqueue_features(self, momentum: MomentumFeatures, **more: tuple[Tensor, Tensor]) -> None:
        """Put all ranks' momentum features (and other columns) into the queues, if there are queues."""
        if not self.has_queue:
            return
        queues = [
            (self.image_queue, dist.all_gather(momentum.image).t()),
            (self.text_queue, dist.all_gather(momentum.text).t()),
            *((queue, dist.all_gather(columns)[None]) for queue, columns in more.values()),
        ]
        enqueue(queues, self.queue_ptr)

    def pool(self, tokens: Tensor, ids: Tensor, mask: Tensor, image_feat: Tensor, text_feat: Tensor) -> Pool:
        """Return the candidates for hard negatives: this rank's pairs or, with `negative_all_rank`, every rank's."""
        if not self.negative_all_rank or dist.world_size() == 1:
            return Pool(tokens, ids, mask, image_feat.detach(), text_feat.detach(), 0, is_local=True)
        padding = (0, self.max_txt_len - ids.shape[1])
        return Pool(
            tokens,
            dist.all_gather(F.pad(ids, padding, value=self.tokenizer.pad_token_id)),
            dist.all_gather(F.pad(mask, padding)),
            dist.all_gather(image_feat.detach()),
            dist.all_gather(text_feat.detach()),
            dist.rank() * len(ids),
            is_local=False,
        )

    def pair_logits(
        self,
        tokens: Tensor,
        ids: Tensor,
        mask: Tensor,
        pool: Pool,
        negatives: tuple[Tensor, Tensor],
        context: CrossAttentionKV,
    ) -> Tensor:
        """Return matching logits (3B,2) of the pairs, of each text with a negative image and of each image with a
        negative text.

        `negatives` are the drawn rows of the pool, (B,) images and (B,) texts; `context` holds this rank's images.
        """
        negative_image, negative_text = negatives
        if pool.is_local:
            other = context.select(negative_image)
        else:
            other = self.project_kv(dist.fetch_rows(in_compute_type(pool.tokens), negative_image))
        texts = stack_texts((ids, mask), (ids, mask), (pool.ids[negative_text], pool.mask[negative_text]))
        return self.matching_logits(*texts, context.append(other).append(context))

    @torch.no_grad()
    def draw_negatives(
        self, image_feat: Tensor, text_feat: Tensor, pool: Pool, positive: Tensor, floor: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Draw for each text a negative image and for each image a negative text, rows of the pool; similar ones are
        likelier.
        """
        t2i = (text_feat @ pool.image_feat.t() / self.temp).softmax(dim=1) + floor
        i2t = (image_feat @ pool.text_feat.t() / self.temp).softmax(dim=1) + floor
        return draw_negatives(t2i, positive), draw_negatives(i2t, positive)
