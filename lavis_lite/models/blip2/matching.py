"""BLIP-2's first stage without its losses: features of images, texts and pairs, and image-text matching (BLIP-2,
section 3.2).

Letters: B samples, Q queries, T text tokens, S image tokens, E width of the Q-Former, D width of the common space.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lavis_lite.common.bounds import MAX_WIDTH, check_number
from lavis_lite.common.registry import registry
from lavis_lite.models.blip2.base import Blip2Base
from lavis_lite.models.image_text import FeatureModel, MatchingModel, PairModel, project, scored
from lavis_lite.nn.attention import CrossAttentionKV
from lavis_lite.nn.losses import best_query_similarity


class Blip2Matching(Blip2Base, PairModel):
    """Q-Former with projections into a common space of `embed_dim` and the image-text matching head. All models of the
    first stage have all of its weights.
    """

    learns_answers: ClassVar[bool] = False
    one_text_per_image: ClassVar[bool] = False
    qformer_has_lm_head = True

    def __init__(self, *, embed_dim: int = 256, **parts: Any) -> None:
        super().__init__(**parts)
        check_number("model.embed_dim", embed_dim, 1, MAX_WIDTH)
        width = self.Qformer.config.hidden_size
        self.vision_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(width, embed_dim)
        self.itm_head = nn.Linear(width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))

    def image_states(self, image: Tensor) -> Tensor:
        """Return the queries' states (B,Q,E)."""
        return self.query_states(self.image_context(image))

    def image_features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.encode_image(image)
        return tokens, project(self.vision_proj, self.query_states(self.project_kv(tokens)))

    def text_states(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        return self.Qformer(None, ids, mask)[0]

    def multimodal_states(self, image: Tensor, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        return {"multimodal_embeds": self.query_states(self.image_context(image), ids, mask)}

    def similarity(self, image_feat: Tensor, text_feat: Tensor) -> Tensor:
        """Return the similarity (images, texts) of each text to an image's best query."""
        return best_query_similarity(image_feat, text_feat)

    def matching_logits(self, ids: Tensor, mask: Tensor | None, context: CrossAttentionKV) -> Tensor:
        """Return logits (B,2): no match, match; the mean over the queries, which attend to image and text. One context
        row may serve several consecutive texts.

        The mean is float32: rounded to bf16, many candidates of an image would score the same.
        """
        return scored(self.itm_head, self.query_states(context, ids, mask)).float().mean(dim=1)


@registry.register_model("blip2_feature_extractor")
class Blip2FeatureExtractor(FeatureModel, Blip2Matching):
    """Features of images, texts and pairs, before and after projection."""


@registry.register_model("blip2_image_text_matching")
class Blip2ITM(MatchingModel, Blip2Matching):
    """Scores how well texts fit images."""
