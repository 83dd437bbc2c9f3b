"""Contrast with a momentum twin, feature queues and hard negatives, shared by pretraining and retrieval finetuning.

Surprising: twin, queues and the clamp of the temperature are updated inside `forward`, before the backward pass, as
the published models were trained; but only where gradients are enabled, so that evaluating a loss changes nothing.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_lite import dist
from lavis_lite.models.batches import in_compute_type, stack_texts
from lavis_lite.models.blip_base import project
from lavis_lite.models.blip_matching import BlipMatching
from lavis_lite.nn.attention import Context
from lavis_lite.nn.losses import draw_negatives, matching_labels, momentum_targets, soft_cross_entropy
from lavis_lite.nn.momentum import copy_parameters, enqueue, update_momentum

TWINS = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")


class MomentumFeatures(NamedTuple):
    """The twin's features of this rank's batch, (B,E) each, and with the queues behind them, (E,N) each."""

    image: Tensor
    text: Tensor
    image_all: Tensor
    text_all: Tensor


class BlipMomentum(BlipMatching):
    """A matching model with its momentum twin (`*_m`) and feature queues."""

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
        self.momentum, self.alpha, self.negative_all_rank = momentum, alpha, negative_all_rank
        self.temp = nn.Parameter(torch.tensor(0.07))
        for name in TWINS:
            twin = deepcopy(getattr(self, name))
            self.add_module(f"{name}_m", twin.requires_grad_(False))
        self.register_buffer("image_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def twins(self) -> list[tuple[nn.Module, nn.Module]]:
        """(online, momentum) modules."""
        return [(getattr(self, name), getattr(self, f"{name}_m")) for name in TWINS]

    def after_loading(self, state: Mapping[str, Tensor]) -> None:
        """A file without the twin (LAVIS saves none) starts it as a copy; LAVIS left it stale."""
        if not any(name.startswith("visual_encoder_m.") for name in state):
            copy_parameters(self.twins())

    def clamp_temperature(self) -> None:
        """Keep the temperature within [0.001, 0.5]."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                self.temp.clamp_(0.001, 0.5)

    @torch.no_grad()
    def momentum_features(self, image: Tensor, ids: Tensor, mask: Tensor, *, update: bool) -> MomentumFeatures:
        """Move the twin and compute its features."""
        if update:
            update_momentum(self.twins(), self.momentum)
        image_feat = project(self.vision_proj_m, self.visual_encoder_m(image)[:, 0])
        text_feat = project(self.text_proj_m, self.text_encoder_m(ids, mask)[0][:, 0])
        return MomentumFeatures(
            image_feat,
            text_feat,
            torch.cat([image_feat.t(), self.image_queue], dim=1),
            torch.cat([text_feat.t(), self.text_queue], dim=1),
        )

    def contrastive_loss(
        self, image_feat: Tensor, text_feat: Tensor, twin: MomentumFeatures, hard: Tensor, alpha: float
    ) -> Tensor:
        """Image-text contrast against batch and queue with soft labels; `hard` (B,N) are the row-normalised hard
        targets.
        """
        with torch.no_grad():
            i2t_targets = momentum_targets(twin.image @ twin.text_all / self.temp, hard, alpha)
            t2i_targets = momentum_targets(twin.text @ twin.image_all / self.temp, hard, alpha)
        loss_i2t = soft_cross_entropy(image_feat @ twin.text_all / self.temp, i2t_targets)
        loss_t2i = soft_cross_entropy(text_feat @ twin.image_all / self.temp, t2i_targets)
        return (loss_i2t + loss_t2i) / 2

    @torch.no_grad()
    def enqueue_features(self, twin: MomentumFeatures, **more: tuple[Tensor, Tensor]) -> None:
        """Put all ranks' momentum features (and other columns) into the queues."""
        queues = [
            (self.image_queue, dist.all_gather(twin.image).t()),
            (self.text_queue, dist.all_gather(twin.text).t()),
            *((queue, dist.all_gather(columns)[None]) for queue, columns in more.values()),
        ]
        enqueue(queues, self.queue_ptr)

    def pool(self, tokens: Tensor, ids: Tensor, mask: Tensor, image_feat: Tensor, text_feat: Tensor) -> "Pool":
        """The candidates for hard negatives: this rank's pairs or, with `negative_all_rank`, every rank's."""
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

    def matching_loss(
        self,
        tokens: Tensor,
        ids: Tensor,
        mask: Tensor,
        pool: "Pool",
        negatives: tuple[Tensor, Tensor],
        context: Context,
    ) -> Tensor:
        """Match or no match, of the pairs, of each text with a negative image and of each image with a negative text.

        `negatives` are the drawn rows of the pool, (B,) images and (B,) texts; `context` is that of `tokens`, this
        rank's images.
        """
        negative_image, negative_text = negatives
        if pool.is_local:
            other = context.select(negative_image)
        else:
            other = self.text_encoder.project_context(dist.fetch_rows(in_compute_type(pool.tokens), negative_image))
        texts = stack_texts((ids, mask), (ids, mask), (pool.ids[negative_text], pool.mask[negative_text]))
        logits = self.matching_logits(*texts, context.append(other).append(context))
        return F.cross_entropy(logits, matching_labels(len(ids), 2 * len(ids), logits.device))

    @torch.no_grad()
    def draw_negatives(
        self, image_feat: Tensor, text_feat: Tensor, pool: "Pool", positive: Tensor, floor: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """For each text a negative image and for each image a negative text, rows of the pool; likelier the more
        similar.
        """
        t2i = (text_feat @ pool.image_feat.t() / self.temp).softmax(dim=1) + floor
        i2t = (image_feat @ pool.text_feat.t() / self.temp).softmax(dim=1) + floor
        return draw_negatives(t2i, positive), draw_negatives(i2t, positive)


class Pool(NamedTuple):
    """Candidates for hard negatives: images' tokens (this rank's: only those drawn travel), texts, features; `start` is
    the row of this rank's first pair.
    """

    tokens: Tensor
    ids: Tensor
    mask: Tensor
    image_feat: Tensor
    text_feat: Tensor
    start: int
    is_local: bool
