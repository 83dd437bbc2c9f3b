"""BLIP-2's first stage: train the Q-Former by contrast, matching and generation (BLIP-2, section 3.2).

One pass of the image encoder and one projection of its tokens to keys and values serve all three losses; the queries'
pass serves contrast and, as cached prefix, generation. On several ranks contrast and negatives are with all ranks'
samples, so that the ranks together compute what one process would with the joined batch; of images and texts only the
drawn negatives are sent.

Note: as in LAVIS, the contrast of an image with all texts has a gradient for the image only, and the reverse: the other
side of the comparison is a constant, on one rank too. `gather_with_grad` gives the whole gradient.

Letters: B samples, N samples of all ranks, Q queries, T text tokens, S image tokens, E width, D width of the common
space.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavis_lite.common import dist
from lavis_lite.common.registry import registry
from lavis_lite.models.base import Output
from lavis_lite.models.batches import Texts, fetch_texts, in_compute_type, match_pairs
from lavis_lite.models.blip2.matching import Blip2Matching
from lavis_lite.models.captions import CaptionModel
from lavis_lite.models.image_text import project, training_output
from lavis_lite.models.inputs import integers, texts_of
from lavis_lite.models.reranking import GalleryLoader, similarity_matrices
from lavis_lite.nn.attention import CrossAttentionKV, KeyValueCache
from lavis_lite.nn.decoding import Step
from lavis_lite.nn.learning import contrast_metrics, matching_accuracy
from lavis_lite.nn.losses import (
    best_query_similarity,
    contrastive_loss,
    draw_negatives,
    language_modeling_loss,
    matching_loss,
    negative_weights,
    same_id_targets,
)


@registry.register_model("blip2")
class Blip2Qformer(Blip2Matching, CaptionModel):
    """Pretraining's first stage, retrieval (finetuning and search) and captions by the Q-Former itself.

    With `gather_with_grad` the contrast's gradient flows to both sides of each comparison.
    """

    def __init__(self, *, gather_with_grad: bool = False, **parts: Any) -> None:
        super().__init__(**parts)
        self.gather = dist.all_gather_with_grad if gather_with_grad else dist.all_gather

    def forward(self, samples: dict[str, Any]) -> Output:
        """`image` (B,3,H,W), `text_input` list[str]; the loss is the sum of `loss_itc`, `loss_itm` and `loss_lm`.

        With `image_id` (B,) all texts of one image are positives, as in retrieval finetuning.
        """
        image = self.checked_image(samples)
        texts = texts_of(samples, len(image))
        ids, mask, predicted = self.tokenize_to_predict(texts, max_length=self.max_txt_len)
        tokens = self.encode_image(image)
        context = self.project_kv(tokens)
        states, cache = self.Qformer(self.query_tokens, context=context)

        image_feat, text_feat = project(self.vision_proj, states), self.encode_text(ids, mask)
        i2t, t2i = self.contrast(image_feat, text_feat)
        targets = self.targets(samples, len(tokens))
        loss_itc = contrastive_loss(i2t, t2i, targets)
        negatives = self.draw_negatives(i2t, t2i, targets > 0)
        pairs = self.pair_logits(tokens, context, (ids, mask), negatives)
        metrics = contrast_metrics(i2t, t2i, targets > 0, image_feat, text_feat, self.temp)

        decoder_ids = ids.clone()
        decoder_ids[:, 0] = self.decoder_start
        written, _ = self.Qformer(None, decoder_ids, past=cache)  # after the queries; padding comes after all labels
        return training_output(
            {**metrics, "acc_itm": matching_accuracy(pairs, len(tokens))},
            itc=loss_itc,
            itm=matching_loss(pairs, len(tokens)),
            lm=language_modeling_loss(self.Qformer.logits(predicted.states(written)), predicted.labels),
        )

    def contrast(self, image_feat_BQD: Tensor, text_feat_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of this rank's images over all ranks' texts and of its texts over all images, (B,N) each."""
        i2t = best_query_similarity(image_feat_BQD, self.gather(text_feat_BD))
        t2i = best_query_similarity(self.gather(image_feat_BQD), text_feat_BD).t()
        return i2t / self.temp, t2i / self.temp

    def targets(self, samples: dict[str, Any], num_samples: int) -> Tensor:
        """Return which of all ranks' samples match each of this rank's, row-normalised (B,N): those of the same image,
        or only itself without `image_id`.
        """
        if "image_id" in samples:
            own = integers(samples, "image_id", num_samples, "the index of each image", self.device)
        else:
            own = torch.arange(num_samples, device=self.device) + dist.rank() * num_samples
        return same_id_targets(own, dist.all_gather(own))

    @torch.no_grad()
    def draw_negatives(self, i2t: Tensor, t2i: Tensor, is_positive: Tensor) -> tuple[Tensor, Tensor]:
        """Draw for each text a negative image and for each image a negative text, rows (B,) of all ranks' samples;
        similar ones are likelier.
        """
        images = draw_negatives(negative_weights(t2i, is_positive), is_positive)
        texts = draw_negatives(negative_weights(i2t, is_positive), is_positive)
        return images, texts

    def pair_logits(
        self, tokens: Tensor, context: CrossAttentionKV, texts: Texts, negatives: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return matching logits (3B,2) of the pairs, of each text with a negative image and of each image with a
        negative text.
        """
        negative_image, negative_text = negatives
        if dist.world_size() == 1:
            other = context.select(negative_image)
        else:
            other = self.project_kv(dist.gather_rows(self.of_equal_length(in_compute_type(tokens)), negative_image))
        wrong = fetch_texts(texts, negative_text, max_length=self.max_txt_len)
        return match_pairs(self.matching_logits, texts, (other, wrong), context)

    def caption_context(self, image: Tensor) -> KeyValueCache:
        """Return the queries' keys and values for the images (B,3,H,W); text is decoded after them."""
        return self.Qformer(self.query_tokens, context=self.image_context(image))[1]

    def step(self, context: KeyValueCache) -> Step:
        def step(new_ids: Tensor, cache: KeyValueCache | None) -> tuple[Tensor, KeyValueCache]:
            states, cache = self.Qformer(None, new_ids, past=context if cache is None else cache)
            return self.Qformer.logits(states[:, -1]), cache

        return step

    def compute_sim_matrix(self, loader: GalleryLoader, k_test: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scores (images, texts) and (texts, images) of an evaluation set, -100 where not among the `k_test`
        most similar; with `k_test` 0 the similarities of all pairs.
        """
        return similarity_matrices(self, loader, k_test)
