"""What settings say about the language model, checked before its weights are read."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from lavis_lite.common.errors import InputError
from lavis_lite.models.blip2.base import weight_dtype
from lavis_lite.models.blip2.families import LLMFamily
from lavis_lite.models.blip2.llm_tokenizer import LLMTokenizer
from lavis_lite.nn.llm_sources import embedding_width, read_config
from lavis_lite.nn.lora import trains_whole_parts

TINY_WIDTH = 512
"""Below it `llm_precision: auto` follows the config file; at and above it, it is bf16."""


def family_config(family: LLMFamily, source: str, overrides: dict[str, Any] | None) -> PreTrainedConfig:
    """Return the language model's config. InputError if the family does not have its type."""
    config, _ = read_config(source, overrides)
    if family.model_types and config.model_type not in family.model_types:
        takes = " or ".join(family.model_types)
        found = f"{source} is a {config.model_type}, not a {takes}"
        raise InputError(f"model.{family.prefix}_model: {found}: use arch blip2_llm (llm_model)")
    return config


def llm_dtype(
    precision: str, config: PreTrainedConfig, *, frozen: bool, lora: Mapping[str, Any] | None = None
) -> torch.dtype:
    """Return the language model's precision. InputError as `weight_dtype`."""
    is_trained = not frozen or trains_whole_parts(lora)
    is_tiny = config.dtype == torch.float32 and embedding_width(config) < TINY_WIDTH
    auto = torch.float32 if is_tiny or is_trained else torch.bfloat16
    return weight_dtype("llm_precision", precision, auto=auto, is_trained=is_trained)


def start_id(config: PreTrainedConfig, tokenizer: LLMTokenizer) -> int:
    """Return the token that generation starts from."""
    name = "decoder_start_token_id" if config.is_encoder_decoder else "bos_token_id"
    found = (getattr(part, name, None) for part in (config, config.get_text_config()))
    return next((i for i in found if i is not None), (*tokenizer.prefix_ids, tokenizer.end_id)[0])
