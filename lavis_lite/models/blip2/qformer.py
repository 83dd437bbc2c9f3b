"""BLIP-2's first stage: the Q-Former learns to read images by contrast, matching and generation (BLIP-2, section 3.2).

One pass of the image encoder and one projection of its tokens to keys and values serve all three; the queries' pass
serves contrast and, as cached prefix, generation. On several ranks contrast and negatives are with all ranks' samples,
so that the ranks together do what one process would do with the joined batch; of images and texts only the drawn
negatives travel.

Surprising: as in LAVIS, the contrast of an image with all texts teaches the image only, and the reverse: what it is
compared with counts as given, in a world of one too. `gather_with_grad` gives the whole gradient.

Letters: B samples, N samples of all ranks, Q queries, T text tokens, S image tokens, E width, D width of the common
space.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lavis_lite.common import dist
from lavis_lite.common.registry import registry
from lavis_lite.models.base import Output
from lavis_lite.models.batches import (
    Texts,
    check_prompts,
    fetch_texts,
    generate_continuations,
    in_compute_type,
    stack_texts,
    warn_of_cut_texts,
)
from lavis_lite.models.blip.base import project
from lavis_lite.models.blip2.matching import Blip2Matching
from lavis_lite.models.inputs import (
    image_of,
    integers,
    optional_texts,
    texts_of,
)
from lavis_lite.models.reranking import Retriever, similarity_matrices
from lavis_lite.nn.attention import Context, KeyValue
from lavis_lite.nn.decoding import GenerationConfig, ScoredText, Step, select_cache
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
class Blip2Qformer(Blip2Matching):
    """Pretraining's first stage, retrieval (finetuning and search) and captions by the Q-Former itself.

    With `gather_with_grad` the contrast's gradient flows to both sides of each comparison.
    """

    generation: ClassVar[GenerationConfig] = GenerationConfig(num_beams=3, max_length=30, min_length=10)

    def __init__(self, *, gather_with_grad: bool = False, **parts: Any) -> None:
        super().__init__(**parts)
        self.gather = dist.all_gather_with_grad if gather_with_grad else dist.all_gather

    def forward(self, samples: dict[str, Any]) -> Output:
        """`image` (B,3,H,W), `text_input` list[str]; the loss is the sum of `loss_itc`, `loss_itm` and `loss_lm`.

        With `image_id` (B,) all texts of one image are positives, as in retrieval finetuning.
        """
        image = image_of(samples)
        texts = self.tokenize(texts_of(samples, len(image)), max_length=self.max_txt_len)
        tokens = self.encode_image(image)
        context = self.Qformer.project_context(tokens)
        states, cache = self.Qformer(self.query_tokens, context=context)

        image_feat, text_feat = project(self.vision_proj, states), self.encode_text(*texts)
        i2t, t2i = self.contrast(image_feat, text_feat)
        targets = self.targets(samples, len(tokens))
        loss_itc = contrastive_loss(i2t, t2i, targets)
        negatives = self.draw_negatives(i2t, t2i, targets > 0)
        pairs = self.pair_logits(tokens, context, texts, negatives)
        loss_itm = matching_loss(pairs, len(tokens))
        loss_lm = self.generation_loss(texts, cache)
        return Output(
            {
                "loss": loss_itc + loss_itm + loss_lm,
                "loss_itc": loss_itc.detach(),
                "loss_itm": loss_itm.detach(),
                "loss_lm": loss_lm.detach(),
                **contrast_metrics(i2t, t2i, targets > 0, image_feat, text_feat, self.temp),
                "acc_itm": matching_accuracy(pairs, len(tokens)),
            }
        )

    def contrast(self, image_feat_BQD: Tensor, text_feat_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of this rank's images over all ranks' texts and of its texts over all images, (B,N) each."""
        i2t = best_query_similarity(image_feat_BQD, self.gather(text_feat_BD))
        t2i = best_query_similarity(self.gather(image_feat_BQD), text_feat_BD).t()
        return i2t / self.temp, t2i / self.temp

    def targets(self, samples: dict[str, Any], num_samples: int) -> Tensor:
        """Which of all ranks' samples belong to each of this rank's, row-normalised (B,N): those of the same image, or
        without ids just itself.
        """
        if "image_id" in samples:
            own = integers(samples, "image_id", num_samples, "the index of each image", self.device)
        else:
            own = torch.arange(num_samples, device=self.device) + dist.rank() * num_samples
        return same_id_targets(own, dist.all_gather(own))

    @torch.no_grad()
    def draw_negatives(self, i2t: Tensor, t2i: Tensor, is_positive: Tensor) -> tuple[Tensor, Tensor]:
        """For each text a negative image and for each image a negative text, rows (B,) of all ranks' samples; likelier
        the more similar.
        """
        images = draw_negatives(negative_weights(t2i, is_positive), is_positive)
        texts = draw_negatives(negative_weights(i2t, is_positive), is_positive)
        return images, texts

    def pair_logits(self, tokens: Tensor, context: Context, texts: Texts, negatives: tuple[Tensor, Tensor]) -> Tensor:
        """Match or no match (3B,2), of the pairs, of each text with a negative image and of each image with a negative
        text.

        An image's keys and values serve its own text and the negative one without being copied.
        """
        negative_image, negative_text = negatives
        num_samples = len(tokens)
        if dist.world_size() == 1:
            other = context.select(negative_image)
        else:
            other = self.Qformer.project_context(dist.fetch_rows(in_compute_type(tokens), negative_image))
        both = stack_texts(texts, fetch_texts(texts, negative_text, max_length=self.max_txt_len))
        ids, mask = (part.unflatten(0, (2, num_samples)).transpose(0, 1).flatten(0, 1) for part in both)
        own = self.matching_logits(ids, mask, context).unflatten(0, (num_samples, 2))
        return torch.cat([own[:, 0], self.matching_logits(*texts, other), own[:, 1]])

    def generation_loss(self, texts: Texts, cache: Sequence[KeyValue]) -> Tensor:
        """Language-model loss of the texts behind the queries, of which `cache` has the keys and values."""
        ids, mask = texts
        ids = ids.clone()
        ids[:, 0] = self.decoder_start
        states, _ = self.Qformer(None, ids, mask, past=cache)
        return language_modeling_loss(self.Qformer.logits(states), self.labels(ids))

    def generate(
        self, samples: dict[str, Any], *, return_scores: bool = False, **changes: Any
    ) -> list[str | ScoredText]:
        """Return captions of `image` (B,3,H,W), `num_captions` of each in turn, without the prompt.

        `samples["prompt"]`, one text or one per sample, is how they begin. `changes` replace settings of
        `generation`. With `return_scores` the captions are pairs (text, score); see `Decoded`.
        """
        config = self.decoding(self.generation.changed(**changes), return_scores=return_scores)
        image = image_of(samples, answering=True)
        prompts = optional_texts(samples, "prompt", len(image))
        prefix = self.image_prefix(image)

        def step_of(rows: list[int]) -> Step:
            return self.step(select_cache(prefix, torch.tensor(rows, device=self.device)))

        return generate_continuations(prompts, self, step_of, config)

    def check_generate(self, samples: dict[str, Any], **changes: Any) -> None:
        prompts = optional_texts(samples, "prompt", len(image_of(samples)))
        check_prompts(prompts, self, self.decoding(self.generation.changed(**changes)))

    @torch.no_grad()
    def image_prefix(self, image: Tensor) -> list[KeyValue]:
        """Return the queries' keys and values for the images (B,3,H,W); text is decoded after them."""
        return self.Qformer(self.query_tokens, context=self.image_context(image))[1]

    def step(self, prefix: Sequence[KeyValue]) -> Step:
        """One decoding step of a text whose every token counts, behind the queries."""

        def step(new_ids: Tensor, cache: Sequence[KeyValue] | None, length: int) -> tuple[Tensor, list[KeyValue]]:
            mask = new_ids.new_ones(len(new_ids), length)
            states, cache = self.Qformer(None, new_ids, mask, past=prefix if cache is None else cache)
            return self.Qformer.logits(states[:, -1]), cache

        return step

    def compute_sim_matrix(self, loader: DataLoader, k_test: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores (images, texts) and (texts, images) of an evaluation set, -100 where not among the `k_test` most
        similar; with `k_test` 0 the similarities of all pairs.
        """

        def encode_image(image: Tensor) -> tuple[Tensor, Tensor]:
            tokens = self.encode_image(image)
            return tokens, self.encode_queries(self.Qformer.project_context(tokens))

        warn_of_cut_texts(self, loader.dataset.text)
        retriever = Retriever(
            device=self.device,
            tokenize=partial(self.tokenize, max_length=self.max_txt_len),
            encode_text=self.encode_text,
            encode_image=encode_image,
            similarity=best_query_similarity,
            project_context=self.Qformer.project_context,
            matching_logits=self.matching_logits,
        )
        return similarity_matrices(retriever, loader, k_test)
