"""BLIP-2's first stage without its losses: features of images, texts and pairs, and image-text matching (BLIP-2,
section 3.2).

Letters: B samples, Q queries, T text tokens, S image tokens, E width of the Q-Former, D width of the common space.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lavis_lite.common.bounds import MAX_WIDTH, check_number
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.models.base import Output
from lavis_lite.models.batches import cut_texts
from lavis_lite.models.blip.base import project
from lavis_lite.models.blip.matching import given_texts
from lavis_lite.models.blip2.base import Blip2Base
from lavis_lite.models.inputs import image_of, texts_of
from lavis_lite.nn.attention import Context
from lavis_lite.nn.losses import best_query_similarity


class Blip2Matching(Blip2Base):
    """Q-Former with projections into a common space of `embed_dim` and the head that tells whether a text belongs to
    an image. All of the first stage's models have all of its weights.
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
        """States (B,T,E) of texts that are read alone."""
        return self.Qformer(None, ids, mask)[0]

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """A text's normalised feature (B,D), that of `[CLS]`."""
        return project(self.text_proj, self.text_states(ids, mask)[:, 0])

    def encode_queries(self, context: Context) -> Tensor:
        """An image's normalised features (B,Q,D), one a query."""
        return project(self.vision_proj, self.query_states(context))

    def matching_logits(self, ids: Tensor, mask: Tensor, context: Context) -> Tensor:
        """(B,2): no match, match; the mean over the queries, who see image and text, in float32: rounded to bf16, many
        candidates of a query would score the same. One context row may serve several consecutive texts.
        """
        return self.itm_head(self.query_states(context, ids, mask)).float().mean(dim=1)

    def forward(self, samples: dict[str, Any], mode: str = "multimodal") -> Output:
        return self.extract_features(samples, mode=mode)

    @torch.no_grad()
    def extract_features(self, samples: dict[str, Any], mode: str = "multimodal") -> Output:
        """Features of `image` (B,3,H,W) and/or `text_input` (B texts, of which the first `max_txt_len` tokens count).

        `image`: `image_embeds` (B,Q,E) and `image_embeds_proj` (B,Q,D), normalised; an image's likeness to a text is
        that of its best query.
        `text`: `text_embeds` (B,T,E) and `text_embeds_proj` (B,T,D), normalised; token 0 is the whole text.
        `multimodal`: `multimodal_embeds` (B,Q,E), the queries that saw image and text.
        """
        if mode not in ("image", "text", "multimodal"):
            raise InputError(f"mode {mode!r} is not one of image, text, multimodal")
        if mode == "text":
            states = self.text_states(*cut_texts(self, given_texts(samples)))
            return Output({"text_embeds": states, "text_embeds_proj": project(self.text_proj, states)})
        image = image_of(samples, answering=True)
        texts = texts_of(samples, len(image)) if mode == "multimodal" else []
        context = self.image_context(image)
        if mode == "image":
            states = self.query_states(context)
            return Output({"image_embeds": states, "image_embeds_proj": project(self.vision_proj, states)})
        return Output({"multimodal_embeds": self.query_states(context, *cut_texts(self, texts))})

    def image_context(self, image: Tensor) -> Context:
        """Keys and values of the images."""
        return self.Qformer.project_context(self.encode_image(image))


@registry.register_model("blip2_feature_extractor")
class Blip2FeatureExtractor(Blip2Matching):
    """Features of images, texts and pairs, before and after projection."""


@registry.register_model("blip2_image_text_matching")
class Blip2ITM(Blip2Matching):
    """Scores how well texts fit images."""

    def forward(self, samples: dict[str, Any], match_head: str = "itm") -> Tensor:
        """`itm`: logits (B,2) of each pair, `[:, 1]` for a match; `itc`: similarities (images, texts) of all images
        with all texts, of which there may be more or fewer than images. Of a text the first `max_txt_len` tokens count.
        """
        if match_head not in ("itm", "itc"):
            raise InputError(f"match_head {match_head!r} is not one of itm, itc")
        image = image_of(samples, answering=True)
        texts = texts_of(samples, len(image)) if match_head == "itm" else given_texts(samples)
        ids, mask = cut_texts(self, texts)
        context = self.image_context(image)
        if match_head == "itm":
            return self.matching_logits(ids, mask, context)
        return best_query_similarity(self.encode_queries(context), self.encode_text(ids, mask))
