"""BLIP's encoders of images and texts, and two models of them: feature extractor and image-text matching (BLIP, section
3.2).
"""

from typing import Any

import torch
from torch import Tensor, nn

from lavis_lite.common.bounds import MAX_WIDTH, check_number
from lavis_lite.common.registry import registry
from lavis_lite.models.base import Output
from lavis_lite.models.blip.base import BlipBase
from lavis_lite.models.image_text import extract_features, match, project
from lavis_lite.nn.attention import CrossAttentionKV
from lavis_lite.nn.bert import BertModel


class BlipMatching(BlipBase):
    """Image and text encoder with projections into a common space of `embed_dim`; the text encoder can be grounded in
    the image, for `itm_head`, which subclasses add.
    """

    itm_head: nn.Linear

    def __init__(self, *, embed_dim: int = 256, **parts: Any) -> None:
        super().__init__(**parts)
        check_number("model.embed_dim", embed_dim, 1, MAX_WIDTH)
        config = self.text_config()
        self.text_encoder = BertModel(config)
        self.vision_proj = nn.Linear(self.visual_encoder.width, embed_dim)
        self.text_proj = nn.Linear(config.hidden_size, embed_dim)

    def text_states(self, ids: Tensor, mask: Tensor, context: CrossAttentionKV | None = None) -> Tensor:
        """Return states (B,T,E) of the texts, alone or grounded in images."""
        return self.text_encoder(ids, mask, context=context)[0]

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return a text's normalised feature (B,embed_dim); the text keeps `[CLS]`."""
        return project(self.text_proj, self.text_states(ids, mask)[:, 0])

    def image_features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return an image's tokens (B,1+N,E) and its normalised feature (B,embed_dim)."""
        tokens = self.visual_encoder(image)
        return tokens, project(self.vision_proj, tokens[:, 0])

    def similarity(self, image_feat: Tensor, text_feat: Tensor) -> Tensor:
        """Return cosine similarities (images, texts)."""
        return image_feat @ text_feat.t()

    def project_kv(self, tokens: Tensor) -> CrossAttentionKV:
        """Return keys and values of the images' tokens."""
        return self.text_encoder.project_kv(tokens)

    def image_context(self, image: Tensor) -> CrossAttentionKV:
        """Return keys and values of the images."""
        return self.project_kv(self.visual_encoder(image))

    def grounded(self, ids: Tensor) -> Tensor:
        """Return the texts with `[ENC]` first, as the image-grounded encoder reads them."""
        ids = ids.clone()
        ids[:, 0] = self.encoder_start
        return ids

    def matching_logits(self, ids: Tensor, mask: Tensor, context: CrossAttentionKV) -> Tensor:
        """Return logits (B,2): no match, match. One context row may serve several consecutive texts."""
        return self.itm_head(self.text_states(self.grounded(ids), mask, context)[:, 0])

    def image_states(self, image: Tensor) -> Tensor:
        """Return the images' tokens (B,1+N,E)."""
        return self.visual_encoder(image)

    def multimodal_states(self, image: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return the images' tokens, and the texts' states (B,T,E) grounded in them."""
        tokens = self.visual_encoder(image)
        states = self.text_states(self.grounded(ids), mask, self.project_kv(tokens))
        return {"image_embeds": tokens, "multimodal_embeds": states}


@registry.register_model("blip_image_text_matching")
class BlipITM(BlipMatching):
    """Scores how well texts fit images."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.itm_head = nn.Linear(self.text_encoder.config.hidden_size, 2)

    def forward(self, samples: dict[str, Any], match_head: str = "itm") -> Tensor:  # type: ignore[override]  # LAVIS's
        """`itm`: logits (B,2) of each pair, `[:, 1]` for a match; `itc`: cosine similarities (B,B) of all images
        (rows) with all texts. The first `max_txt_len` tokens of a text count.
        """
        return match(self, samples, match_head, one_text_per_image=True)


@registry.register_model("blip_feature_extractor")
class BlipFeatureExtractor(BlipMatching):
    """Features of images, texts and pairs, before and after projection."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.temp = nn.Parameter(torch.tensor(0.07))

    def forward(self, samples: dict[str, Any], mode: str = "multimodal") -> Output:
        return self.extract_features(samples, mode=mode)

    def extract_features(self, samples: dict[str, Any], mode: str = "multimodal") -> Output:
        """Return features of `image` (B,3,H,W) and/or `text_input` (B texts; the first `max_txt_len` tokens count).

        `image`: `image_embeds` (B,1+N,E) and `image_embeds_proj` (B,1+N,embed_dim), normalised; token 0 is the whole
        image.
        `text`: `text_embeds` (B,T,E) and `text_embeds_proj` (B,T,embed_dim), normalised; token 0 is the whole text.
        `multimodal`: `image_embeds` and `multimodal_embeds` (B,T,E), the text's tokens grounded in the image.
        """
        return extract_features(self, samples, mode)
