"""BLIP's parameter names in Hugging Face's `BlipFor*` classes. The text transformers' are the same in both; only the
image encoder's differ.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from lavis_lite.common.sources.weights import LazyState
from lavis_lite.convert.names import VISION, VISION_BLOCK, Table

BLIP = Table(
    prefixes=(*VISION, ("visual_encoder.norm.", "vision_model.post_layernorm.")),
    inner={"visual_encoder.blocks.": VISION_BLOCK},
)
NOT_IN_HF = re.compile(r"_m\.|queue|^temp$|position_ids$")


def is_hf_blip(state: Mapping[str, Tensor]) -> bool:
    """Whether a state_dict comes from one of Hugging Face's Blip classes."""
    return any(name.startswith("vision_model.") for name in state)


def blip_from_hf(state: Mapping[str, Tensor]) -> LazyState:
    """A Hugging Face state_dict under LAVIS's names."""
    return LazyState.of(state).renamed(lambda name: BLIP.from_hf(name) or name)


def blip_to_hf(state: Mapping[str, Tensor]) -> LazyState:
    """A state_dict of ours under Hugging Face's names, without what its classes do not have (momentum twin, queues,
    temperature).
    """
    return LazyState.of(state).renamed(lambda name: None if NOT_IN_HF.search(name) else BLIP.to_hf(name) or name)
