"""BLIP's two-tower and matching models: feature extractor and image-text matching (BLIP, section 3.2)."""

from typing import Any

import torch
from torch import Tensor, nn

from lavis_lite.common.bounds import MAX_WIDTH, check_number
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.models.base import Output
from lavis_lite.models.batches import cut_texts
from lavis_lite.models.blip.base import BlipBase, project
from lavis_lite.models.inputs import (
    image_of,
    listed_texts,
    required,
    texts_of,
)
from lavis_lite.nn.attention import Context
from lavis_lite.nn.bert import BertModel


class BlipTowers(BlipBase):
    """Image and text encoder with projections into a common space of `embed_dim`; the text encoder can be grounded in
    the image.
    """

    def __init__(self, *, embed_dim: int = 256, **parts: Any) -> None:
        super().__init__(**parts)
        check_number("model.embed_dim", embed_dim, 1, MAX_WIDTH)
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
        (rows) with all texts. Of a text the first `max_txt_len` tokens count.
        """
        if match_head not in ("itm", "itc"):
            raise InputError(f"match_head {match_head!r} is not one of itm, itc")
        image = image_of(samples, answering=True)
        ids, mask = cut_texts(self, texts_of(samples, len(image)))
        tokens, image_feat = self.encode_image(image)
        if match_head == "itm":
            return self.matching_logits(ids, mask, self.text_encoder.project_context(tokens))
        return image_feat @ self.encode_text(ids, mask).t()


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
        """Features of `image` (B,3,H,W) and/or `text_input` (B texts, of which the first `max_txt_len` tokens count).

        `image`: `image_embeds` (B,1+N,E) and `image_embeds_proj` (B,1+N,embed_dim), normalised; token 0 is the whole
        image.
        `text`: `text_embeds` (B,T,E) and `text_embeds_proj` (B,T,embed_dim), normalised; token 0 is the whole text.
        `multimodal`: `image_embeds` and `multimodal_embeds` (B,T,E), the text's tokens grounded in the image.
        """
        if mode not in ("image", "text", "multimodal"):
            raise InputError(f"mode {mode!r} is not one of image, text, multimodal")
        if mode == "text":
            states = self.text_states(*cut_texts(self, given_texts(samples)))
            return Output({"text_embeds": states, "text_embeds_proj": project(self.text_proj, states)})
        image = image_of(samples, answering=True)
        if mode == "image":
            tokens, _ = self.encode_image(image)
            return Output({"image_embeds": tokens, "image_embeds_proj": project(self.vision_proj, tokens)})
        ids, mask = cut_texts(self, texts_of(samples, len(image)))
        tokens = self.visual_encoder(image)
        states = self.text_states(self.grounded(ids), mask, self.text_encoder.project_context(tokens))
        return Output({"image_embeds": tokens, "multimodal_embeds": states})


def given_texts(samples: dict[str, Any]) -> list[str]:
    """`text_input`, which may be as many texts as one likes; a single string is one text."""
    texts = required(samples, "text_input", "a text, or a list of texts")
    return listed_texts([texts] if isinstance(texts, str) else texts, "samples['text_input']")
