"""BLIP's two-tower and matching models: feature extractor and image-text matching (BLIP, section 3.2)."""

from typing import Any

import torch
from torch import Tensor, nn

from lavis_lite.errors import InputError
from lavis_lite.models.base import Output
from lavis_lite.models.blip_base import BlipBase, project, text_list
from lavis_lite.nn.attention import Context
from lavis_lite.nn.bert import BertModel
from lavis_lite.registry import registry


class BlipTowers(BlipBase):
    """Image and text encoder with projections into a common space of `embed_dim`; the text encoder can be grounded in
    the image.
    """

    def __init__(self, *, embed_dim: int = 256, **parts: Any) -> None:
        super().__init__(**parts)
        config = self.text_config()
        self.text_encoder = BertModel(config)
        self.vision_proj = nn.Linear(self.visual_encoder.config.width, embed_dim)
        self.text_proj = nn.Linear(config.hidden_size, embed_dim)

    def text_states(self, ids: Tensor, mask: Tensor, context: Context | None = None) -> Tensor:
        """States (B,T,E) of the texts, alone or grounded in images."""
        return self.text_encoder(ids, mask, context=context)[0]

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """An image's tokens (B,1+N,E) and its normalised feature (B,embed_dim)."""
        tokens = self.visual_encoder(image)
        return tokens, project(self.vision_proj, tokens[:, 0])

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """A text's normalised feature (B,embed_dim); the text keeps `[CLS]`."""
        return project(self.text_proj, self.text_states(ids, mask)[:, 0])

    def grounded(self, ids: Tensor) -> Tensor:
        """The texts as an image-grounded encoder reads them: `[ENC]` first."""
        ids = ids.clone()
        ids[:, 0] = self.encoder_start
        return ids


class BlipMatching(BlipTowers):
    """Towers and the head that tells whether a text belongs to an image."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.itm_head = nn.Linear(self.text_encoder.config.hidden_size, 2)

    def matching_logits(self, ids: Tensor, mask: Tensor, context: Context) -> Tensor:
        """(B,2): no match, match. One context row may serve several consecutive texts."""
        return self.itm_head(self.text_states(self.grounded(ids), mask, context)[:, 0])


@registry.register_model("blip_image_text_matching")
class BlipITM(BlipMatching):
    """Scores how well texts fit images."""

    def forward(self, samples: dict[str, Any], match_head: str = "itm") -> Tensor:
        """`itm`: logits (B,2) of each pair, `[:, 1]` for a match; `itc`: cosine similarities (B,B) of all images
        (rows) with all texts.
        """
        tokens, image_feat = self.encode_image(samples["image"])
        texts = text_list(samples["text_input"], len(tokens))
        ids, mask = self.tokenize(texts, max_length=self.max_txt_len)
        if match_head == "itm":
            return self.matching_logits(ids, mask, self.text_encoder.project_context(tokens))
        if match_head == "itc":
            return image_feat @ self.encode_text(ids, mask).t()
        raise InputError(f"match_head {match_head!r} is not one of itm, itc")


@registry.register_model("blip_feature_extractor")
class BlipFeatureExtractor(BlipTowers):
    """Features of images, texts and pairs, before and after projection."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.temp = nn.Parameter(torch.tensor(0.07))

    def forward(self, samples: dict[str, Any], mode: str = "multimodal") -> Output:
        return self.extract_features(samples, mode=mode)

    @torch.no_grad()
    def extract_features(self, samples: dict[str, Any], mode: str = "multimodal") -> Output:
        """Features of `image` (B,3,H,W) and/or `text_input` (B texts).

        `image`: `image_embeds` (B,1+N,E) and `image_embeds_proj` (B,1+N,embed_dim), normalised; token 0 is the whole
        image.
        `text`: `text_embeds` (B,T,E) and `text_embeds_proj` (B,T,embed_dim), normalised; token 0 is the whole text.
        `multimodal`: `image_embeds` and `multimodal_embeds` (B,T,E), the text's tokens grounded in the image.
        """
        needed = {"image": ("image",), "text": ("text_input",), "multimodal": ("image", "text_input")}
        if mode not in needed:
            raise InputError(f"mode {mode!r} is not one of {', '.join(needed)}")
        missing = [key for key in needed[mode] if samples.get(key) is None]
        if missing:
            raise InputError(f"features of mode {mode!r} need samples[{missing[0]!r}], which is missing")
        features = Output()
        if mode != "text":
            features["image_embeds"] = self.visual_encoder(samples["image"])
        if mode == "image":
            features["image_embeds_proj"] = project(self.vision_proj, features["image_embeds"])
        if mode == "text":
            texts = samples["text_input"]
            features["text_embeds"] = self.text_states(*self.tokenize([texts] if isinstance(texts, str) else texts))
            features["text_embeds_proj"] = project(self.text_proj, features["text_embeds"])
        if mode == "multimodal":
            ids, mask = self.tokenize(text_list(samples["text_input"], len(samples["image"])))
            context = self.text_encoder.project_context(features["image_embeds"])
            features["multimodal_embeds"] = self.text_states(self.grounded(ids), mask, context)
        return features
