"""BLIP-2's first stage without its losses: features of images, texts and pairs, and image-text matching (BLIP-2,
section 3.2).

Letters: B samples, Q queries, T text tokens, S image tokens, E width of the Q-Former, D width of the common space.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lavis_lite.common.bounds import MAX_WIDTH, check_number
from lavis_lite.common.registry import registry
from lavis_lite.models.base import Output
from lavis_lite.models.blip2.base import Blip2Base
from lavis_lite.models.image_text import extract_features, match, project
from lavis_lite.nn.attention import CrossAttentionKV
from lavis_lite.nn.losses import best_query_similarity


class Blip2Matching(Blip2Base):
    """Q-Former with projections into a common space of `embed_dim` and the image-text matching head. All models of the
    first stage have all of its weights.
    """

    learns_answers: ClassVar[bool] = False
    qformer_has_lm_head = True

    def __init__(self, *, embed_dim: int = 256, **parts: Any) -> None:
        super().__init__(**parts)
        check_number("model.embed_dim", embed_dim, 1, MAX_WIDTH)
        width = self.Qformer.config.hidden_size
        self.vision_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(width, embed_dim)
        self.itm_head = nn.Linear(width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))

    def text_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return states (B,T,E) of texts read alone."""
        return self.Qformer(None, ids, mask)[0]

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return a text's normalised feature (B,D), that of `[CLS]`."""
        return project(self.text_proj, self.text_states(ids, mask)[:, 0])

    def encode_queries(self, context: CrossAttentionKV) -> Tensor:
        """Return an image's normalised features (B,Q,D), one per query."""
        return project(self.vision_proj, self.query_states(context))

    def image_features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return an image's tokens (B,S,E') and its queries' normalised features (B,Q,D)."""
        tokens = self.encode_image(image)
        return tokens, self.encode_queries(self.project_kv(tokens))

    def similarity(self, image_feat: Tensor, text_feat: Tensor) -> Tensor:
        """Return the similarity (images, texts) of each text to an image's best query."""
        return best_query_similarity(image_feat, text_feat)

    def project_kv(self, tokens: Tensor) -> CrossAttentionKV:
        """Return keys and values of the images' tokens."""
        return self.Qformer.project_kv(tokens)

    def image_context(self, image: Tensor) -> CrossAttentionKV:
        """Return keys and values of the images."""
        return self.project_kv(self.encode_image(image))

    def matching_logits(self, ids: Tensor, mask: Tensor, context: CrossAttentionKV) -> Tensor:
        """Return logits (B,2): no match, match; the mean over the queries, which attend to image and text. One context
        row may serve several consecutive texts.

        The mean is float32: rounded to bf16, many candidates of an image would score the same.
        """
        return self.itm_head(self.query_states(context, ids, mask)).float().mean(dim=1)

    def image_states(self, image: Tensor) -> Tensor:
        """Return the queries' states (B,Q,E)."""
        return self.query_states(self.image_context(image))

    def multimodal_states(self, image: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return the states (B,Q,E) of the queries, which attend to image and text."""
        return {"multimodal_embeds": self.query_states(self.image_context(image), ids, mask)}

    def extract_features(self, samples: dict[str, Any], mode: str = "multimodal") -> Output:
        """Return features of `image` (B,3,H,W) and/or `text_input` (B texts; the first `max_txt_len` tokens count).

        `image`: `image_embeds` (B,Q,E) and `image_embeds_proj` (B,Q,D), normalised; an image's similarity to a text is
        that of its best query.
        `text`: `text_embeds` (B,T,E) and `text_embeds_proj` (B,T,D), normalised; token 0 is the whole text.
        `multimodal`: `multimodal_embeds` (B,Q,E), of queries that attend to image and text.
        """
        return extract_features(self, samples, mode)


@registry.register_model("blip2_feature_extractor")
class Blip2FeatureExtractor(Blip2Matching):
    """Features of images, texts and pairs, before and after projection."""

    def forward(self, samples: dict[str, Any], mode: str = "multimodal") -> Output:
        return self.extract_features(samples, mode=mode)


@registry.register_model("blip2_image_text_matching")
class Blip2ITM(Blip2Matching):
    """Scores how well texts fit images."""

    def forward(self, samples: dict[str, Any], match_head: str = "itm") -> Tensor:  # type: ignore[override]  # LAVIS's
        """`itm`: logits (B,2) of each pair, `[:, 1]` for a match; `itc`: similarities (images, texts) of all images
        with all texts, whose numbers may differ. The first `max_txt_len` tokens of a text count.
        """
        return match(self, samples, match_head, one_text_per_image=False)
