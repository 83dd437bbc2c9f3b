"""BLIP's encoders of images and texts, and two models of them: feature extractor and image-text matching (BLIP, section
3.2).
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lavis_lite.common.bounds import MAX_WIDTH, check_number
from lavis_lite.common.registry import registry
from lavis_lite.models.blip.base import BlipBase
from lavis_lite.models.image_text import FeatureModel, ImageTextModel, MatchingModel, project, scored
from lavis_lite.nn.attention import CrossAttentionKV
from lavis_lite.nn.bert import BertModel
from lavis_lite.nn.video import visual_summary


class BlipMatching(BlipBase, ImageTextModel):
    """Image and text encoder with projections into a common space of `embed_dim`; the text encoder can be grounded in
    the image, for `itm_head`, which subclasses add.
    """

    one_text_per_image: ClassVar[bool] = True

    def __init__(self, *, embed_dim: int = 256, **parts: Any) -> None:
        super().__init__(**parts)
        check_number("model.embed_dim", embed_dim, 1, MAX_WIDTH)
        config = self.text_config()
        self.text_encoder = self.adapted(BertModel(config))
        self.vision_proj = nn.Linear(self.visual_encoder.width, embed_dim)
        self.text_proj = nn.Linear(config.hidden_size, embed_dim)

    def image_states(self, image: Tensor) -> Tensor:
        return self.encode_image(image)

    def image_features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens and normalised features; a video's is that of the mean over its frames."""
        tokens = self.encode_image(image)
        return tokens, project(self.vision_proj, visual_summary(self.visual_encoder, tokens, image))

    def text_states(self, ids: Tensor, mask: Tensor | None, context: CrossAttentionKV | None = None) -> Tensor:
        """Return states (B,T,E) of the texts, alone or, with `[ENC]` as first token, grounded in images."""
        if context is not None:
            ids = ids.clone()
            ids[:, 0] = self.encoder_start
        return self.text_encoder(ids, mask, context=context)[0]

    def multimodal_states(self, image: Tensor, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        tokens = self.encode_image(image)
        return {"image_embeds": tokens, "multimodal_embeds": self.text_states(ids, mask, self.project_kv(tokens))}

    def similarity(self, image_feat: Tensor, text_feat: Tensor) -> Tensor:
        return image_feat @ text_feat.t()

    def project_kv(self, tokens: Tensor) -> CrossAttentionKV:
        return self.text_encoder.project_kv(tokens)

    def matching_logits(self, ids: Tensor, mask: Tensor | None, context: CrossAttentionKV) -> Tensor:
        return scored(self.itm_head, self.text_states(ids, mask, context)[:, 0])


@registry.register_model("blip_image_text_matching")
class BlipITM(MatchingModel, BlipMatching):
    """Scores how well texts fit images."""

    reads_encoded: ClassVar[bool] = True

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.itm_head = nn.Linear(self.text_encoder.config.hidden_size, 2)


@registry.register_model("blip_feature_extractor")
class BlipFeatureExtractor(FeatureModel, BlipMatching):
    """Features of images, texts and pairs, before and after projection."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.temp = nn.Parameter(torch.tensor(0.07))
