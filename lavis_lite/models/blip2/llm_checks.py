"""Checks of settings and checkpoints against the language model, made before its weights are read."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
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
    """Return the language model's config. InputError if the family does not have its type, or without a source."""
    if not source:
        raise InputError(f"model.{family.prefix}_model: missing; give a folder, a hub id or a packaged tiny one")
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


def check_fit(state: Mapping[str, Tensor], config: PreTrainedConfig, *, prefix: str, source: str, llm: str) -> None:
    """Raise InputError if a checkpoint was made with a language model of another width or vocabulary."""
    width, vocabulary = embedding_width(config), config.get_text_config().vocab_size
    advice = f"set model.{prefix}_model to the one that it was made with"
    for name in state:
        if name == f"{prefix}_proj.weight" and len(state[name]) != width:
            raise InputError(
                f"{source} was made for a language model of width {len(state[name])}, but {llm} has {width}: {advice}"
            )
        is_vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight", "shared.weight"))
        if name.startswith(f"{prefix}_model.") and is_vocabulary and not 0 <= len(state[name]) - vocabulary <= 1:
            raise InputError(
                f"{source} was made with a vocabulary of {len(state[name])} tokens ({name}), but {llm} has "
                f"{vocabulary}: {advice}"
            )
