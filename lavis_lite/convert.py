"""Weights between LAVIS's layout, which is ours, and that of Hugging Face's `Blip*` classes: one table, read both
ways.

The text transformers' names are the same in both; only the image encoder's differ.
"""

import re
from collections.abc import Mapping

from torch import Tensor

BLIP_VISION = (
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("visual_encoder.norm.", "vision_model.post_layernorm."),
    ("visual_encoder.blocks.", "vision_model.encoder.layers."),
)
BLIP_BLOCK = (
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)
NOT_IN_HF = re.compile(r"_m\.|queue|^temp$|position_ids$")


def is_hf_blip(state: Mapping[str, Tensor]) -> bool:
    """Whether a state_dict comes from one of Hugging Face's Blip classes."""
    return any(name.startswith("vision_model.") for name in state)


def blip_from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Hugging Face state_dict under LAVIS's names."""
    return {rename(name, forward=False): tensor for name, tensor in state.items()}


def blip_to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of ours under Hugging Face's names, without what its classes do not have (momentum twin, queues,
    temperature).
    """
    return {rename(name, forward=True): tensor for name, tensor in state.items() if not NOT_IN_HF.search(name)}


def rename(name: str, *, forward: bool) -> str:
    """One parameter's name in the other layout (`forward`: to Hugging Face's)."""
    for ours, theirs in BLIP_VISION:
        old, new = (ours, theirs) if forward else (theirs, ours)
        if not name.startswith(old):
            continue
        name = new + name.removeprefix(old)
        for ours_part, theirs_part in BLIP_BLOCK if ours.endswith("blocks.") else ():
            name = name.replace(*((ours_part, theirs_part) if forward else (theirs_part, ours_part)))
        return name
    return name
