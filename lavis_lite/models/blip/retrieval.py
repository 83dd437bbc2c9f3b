"""BLIP retrieval finetuning: contrast and matching; captions of one image are all positives (BLIP, section 5.1)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavis_lite.common.registry import registry
from lavis_lite.models.base import Output
from lavis_lite.models.blip.base import ramp
from lavis_lite.models.blip.momentum import BlipMomentum, StepParts
from lavis_lite.models.image_text import training_output
from lavis_lite.models.inputs import image_of, integers, texts_of
from lavis_lite.models.reranking import GalleryLoader, similarity_matrices
from lavis_lite.nn.learning import matching_accuracy
from lavis_lite.nn.losses import matching_loss, same_id_targets, similarity


@registry.register_model("blip_retrieval")
class BlipRetrieval(BlipMomentum):
    """Ranks images for texts and texts for images: by features, then the best `k_test` by the matching head."""

    idx_queue: Tensor

    def __init__(self, *, queue_size: int = 57600, max_txt_len: int = 35, **parts: Any) -> None:
        super().__init__(queue_size=queue_size, max_txt_len=max_txt_len, **parts)
        self.register_buffer("idx_queue", torch.full((1, queue_size), -100))

    def forward(self, samples: dict[str, Any]) -> Output:
        """`image` (B,3,H,W) or videos (B,3,F,H,W), `text_input` list[str], `image_id` (B,); the loss is the sum of
        `loss_itc` and `loss_itm`.
        """
        update = torch.is_grad_enabled()
        image = image_of(samples, video=True)
        ids, mask = self.tokenize(texts_of(samples, len(image)), max_length=self.max_txt_len)
        image_id = integers(samples, "image_id", len(image), "the index of each image", self.device)
        tokens, image_feat = self.image_features(image)
        text_feat = self.encode_text(ids, mask)

        momentum = self.momentum_features(image, ids, mask, update=update)
        hard = same_id_targets(image_id, torch.cat([self.candidates(image_id), self.idx_queue[0]]))
        alpha = ramp(samples, self.alpha, num_epochs=2)
        loss_itc, metrics = self.contrastive_loss(image_feat, text_feat, momentum, hard, alpha)
        if update:
            self.enqueue_features(momentum, (self.idx_queue, image_id[:, None]))

        positive = image_id[:, None] == self.negative_candidates(image_id)
        negatives = self.draw_negatives(image_feat, text_feat, (image_feat, text_feat), positive)
        pairs = self.pair_logits(tokens, (ids, mask), negatives, self.project_kv(tokens))
        metrics["acc_itm"] = matching_accuracy(pairs, len(ids))
        output = training_output(metrics, itc=loss_itc, itm=matching_loss(pairs, len(ids)))
        parts = StepParts(image, tokens, (ids, mask), (image_feat, text_feat), momentum, hard, alpha, pairs)
        return self.with_parts(output, parts)

    def similarity(self, image_feat: Tensor, text_feat: Tensor) -> Tensor:
        """Return cosine similarities (images, texts) in float32, which ranks more finely than bf16."""
        return similarity(image_feat, text_feat)

    def compute_sim_matrix(self, loader: GalleryLoader, k_test: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scores (images, texts) and (texts, images) of an evaluation set, -100 where not among the `k_test`
        most similar; with `k_test` 0 the similarities of all pairs.
        """
        return similarity_matrices(self, loader, k_test)
