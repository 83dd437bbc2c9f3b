"""BLIP in Hugging Face's layout, the `BlipFor*` classes: only the image encoder's parameters have other names."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lavis_lite.common.config.sections import BERT_TO_MED
from lavis_lite.common.sources.weights import LazyState
from lavis_lite.models.hf import (
    VISION,
    VISION_BLOCK,
    Classes,
    HFAdapter,
    NameTable,
    image_processor,
    read_sizes,
    transformers_class,
    write_sizes,
)
from lavis_lite.nn.losses import LABEL_SMOOTHING
from lavis_lite.nn.vision import BlipViT

if TYPE_CHECKING:
    from lavis_lite.models.blip.base import BlipBase

NAMES = NameTable(
    prefixes=(*VISION, ("visual_encoder.norm.", "vision_model.post_layernorm.")),
    inner={"visual_encoder.blocks.": VISION_BLOCK},
)
NOT_IN_HF = re.compile(r"_m\.|queue|^temp$|position_ids$")
"""Momentum encoders, queues and the temperature."""


def is_hf_blip(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state_dict comes from one of Hugging Face's Blip classes."""
    return any(name.startswith("vision_model.") for name in state)


def blip_from_hf(state: Mapping[str, Tensor]) -> LazyState:
    """Return a Hugging Face state_dict under LAVIS's names."""
    return LazyState.of(state).renamed(lambda name: NAMES.inverse.to_hf(name) or name)


def blip_to_hf(state: Mapping[str, Tensor]) -> LazyState:
    """Return a state_dict of ours under Hugging Face's names, without the tensors that its classes lack (momentum
    encoders, queues, temperature).
    """
    return LazyState.of(state).renamed(lambda name: None if NOT_IN_HF.search(name) else NAMES.to_hf(name) or name)


class BlipAdapter(HFAdapter["BlipBase"]):
    classes: ClassVar[Classes] = {
        "BlipForConditionalGeneration": ("blip_caption",),
        "BlipForQuestionAnswering": ("blip_vqa",),
        "BlipForImageTextRetrieval": ("blip_image_text_matching", "blip_retrieval"),
    }
    encoder = BlipViT

    def own_section(self, config: Mapping[str, Any], folder: Path, *, arch: str) -> dict[str, Any]:
        return {"tokenizer": str(folder), "med": read_sizes(config["text_config"], BERT_TO_MED)}

    def config(self, model: "BlipBase", *, arch: str) -> Any:
        name = self.hf_class(arch)
        text = write_sizes(model.text_config(), BERT_TO_MED) | {
            "bos_token_id": model.decoder_start,
            "sep_token_id": model.tokenizer.sep_token_id,
            "eos_token_id": model.tokenizer.sep_token_id,
            "pad_token_id": model.tokenizer.pad_token_id,
            "label_smoothing": LABEL_SMOOTHING,
        }
        sizes = {}
        if name == "BlipForImageTextRetrieval":
            sizes["image_text_hidden_size"] = len(model.get_parameter("text_proj.weight"))
        vision = self.vision_sizes(model.visual_encoder)
        return transformers_class(name).config_class(
            text_config=text, vision_config=vision, label_smoothing=LABEL_SMOOTHING, **sizes
        )

    def processor(self, model: "BlipBase", config: Any) -> Any:
        from transformers import BlipProcessor

        return BlipProcessor(image_processor(model.visual_encoder), copy.deepcopy(model.tokenizer))

    def from_hf(self, state: Mapping[str, Tensor], model: "BlipBase") -> LazyState:
        return blip_from_hf(state)

    def to_hf(self, own: Mapping[str, Tensor], model: "BlipBase", config: Any) -> LazyState:
        return blip_to_hf(own)
