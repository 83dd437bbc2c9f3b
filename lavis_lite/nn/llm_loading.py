"""Load language models as transformers has them: folders, hub ids and the tiny ones of this package.

Note: everything that can be wrong is checked before the weights are read, which takes minutes. Dropout of a frozen
model is switched off. T5's tied or untied output layer follows the config file, which transformers 5 forgets when it
builds a T5 from its config alone.
"""

import copy
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from lavis_lite.common.bounds import one_of
from lavis_lite.common.config.adapters import lora_config
from lavis_lite.common.errors import InputError, MissingPackageError
from lavis_lite.nn.llm_sources import fetch, has_weights, is_composite, load_llm_tokenizer, locate, naming, read_config
from lavis_lite.nn.lora import add_lora, embedding_weight

INSIDE_COMPOSITE = {r"^language_model\.": ""}
"""Prefix of the language model's weights in a Hugging Face BLIP-2."""
QUANTIZATIONS = ("int8", "int4")
NOT_FOR_LORA = {"megatron_config", "runtime_config"}
"""Keys of peft's LoraConfig that are refused: they are for models of Megatron, and for offloading weights."""


def load_language_model(
    source: str | Path,
    *,
    dtype: torch.dtype,
    overrides: Mapping[str, Any] | None = None,
    pad_token: str | None = None,
    frozen: bool = False,
    quantization: str | None = None,
    lora: Mapping[str, Any] | None = None,
    grad_checkpoint: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal or encoder-decoder language model in `dtype`, and its tokenizer.

    Args:
        source: a packaged name (`tiny_opt`), a local folder or a hub id, also of a BLIP-2 of transformers, whose
            language model is then loaded. A folder without weights gives a model with random ones; so does the meta
            device, on which nothing is loaded.
        overrides: values that replace those of the config file.
        pad_token: added to tokenizer and vocabulary if the tokenizer has no such token.
        frozen: no parameter is trained, and dropout is off whatever the mode.
        quantization: "int8" or "int4" (needs bitsandbytes).
        lora: keyword arguments of peft's LoraConfig; only what peft trains is then trained, in float32.
        grad_checkpoint: recompute activations in the backward pass.

    Raises:
        FileNotFoundError: the folder or a file of the tokenizer or config is missing.
        ValueError: the config is not of a language model, or a setting is unknown or does not fit.
        ImportError: bitsandbytes or peft is needed and not installed.
    """
    config, untied = read_config(source, overrides)
    _check_extras(quantization, lora)
    tokenizer = load_llm_tokenizer(source)
    num_tokens, num_rows = tokenizer.vocab_size, config.get_text_config().vocab_size
    if num_tokens > num_rows:
        raise InputError(f"{source}: its tokenizer has {num_tokens} tokens, its language model only {num_rows}")
    if lora is not None or overrides:
        with torch.device("meta"):  # to find what does not fit before weights are read
            with naming(overrides or {}):
                sketch = _auto_class(config).from_config(copy.deepcopy(config))
            if lora is not None:
                add_lora(sketch, {**lora, "init_lora_weights": False})
    is_frozen = frozen or lora is not None
    if is_frozen:
        for name, value in config.to_dict().items():
            if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
                setattr(config, name, 0.0)
    model = _build(source, config, dtype=dtype, untied=untied, quantization=quantization)
    if pad_token is not None and tokenizer.add_special_tokens({"pad_token": pad_token}):
        _add_mean_row(model)
    if is_frozen:
        model.requires_grad_(False)
    if lora is not None:
        add_lora(model, lora)
    if grad_checkpoint:
        _checkpoint_activations(model)
    return model, tokenizer


def _check_extras(quantization: str | None, lora: Mapping[str, Any] | None) -> None:
    """Raise InputError for an unknown quantization and for settings of LoRA that do not work here, MissingPackageError
    without the package that a setting needs.
    """
    one_of("model.llm_quantization", quantization, (None, *QUANTIZATIONS))
    if lora is not None:
        for key in NOT_FOR_LORA & lora.keys():
            raise InputError(f"model.llm_lora.{key}: does not apply to models of transformers; leave it out")
        lora_config(lora)
    try:
        if quantization is not None:
            importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise MissingPackageError(f"model.llm_quantization: {quantization}: `pip install bitsandbytes`") from error


def _add_mean_row(model: PreTrainedModel) -> None:
    """Add a row to the vocabulary, the mean of the others."""
    known = len(embedding_weight(model))
    model.resize_token_embeddings(known + 1, mean_resizing=False)
    layers: tuple[Any, ...] = (model.get_input_embeddings(), model.get_output_embeddings())
    with torch.no_grad():
        for layer in layers:
            layer.weight[known:] = layer.weight[:known].mean(dim=0)


def _auto_class(config: PreTrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _build(
    source: str | Path, config: PreTrainedConfig, *, dtype: torch.dtype, untied: bool, quantization: str | None
) -> PreTrainedModel:
    """Return the model, loaded shard by shard in its own precision, or random; quantized weights on the GPU if there is
    one, on the meta device in `dtype`. InputError if some weights are missing, which would stay random.
    """
    auto = _auto_class(config)
    if quantization is not None and not has_weights(source):
        raise InputError(f"model.llm_quantization: {source} has no weights to quantize: leave it out")
    if torch.empty(0).is_meta or not has_weights(source):
        model = auto.from_config(config, dtype=dtype)
        head: Any = model.get_output_embeddings()
        if untied and head.weight is embedding_weight(model):
            head.weight = nn.Parameter(torch.empty_like(head.weight))
            nn.init.normal_(head.weight, std=head.in_features**-0.5)
    else:
        settings: dict[str, Any] = {"key_mapping": INSIDE_COMPOSITE} if is_composite(source) else {}
        if quantization is not None:
            four_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
            bits = BitsAndBytesConfig(**(four_bit if quantization == "int4" else {"load_in_8bit": True}))
            device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
            settings |= {"quantization_config": bits, "device_map": {"": device}}
        verbosity = hf_logging.get_verbosity()
        hf_logging.set_verbosity_error()  # it would list the other parts of a BLIP-2
        settings |= {"config": config, "dtype": dtype, "output_loading_info": True}
        try:
            model, report = fetch(auto.from_pretrained, locate(source), "the language model's weights", **settings)
        finally:
            hf_logging.set_verbosity(verbosity)
        if missing := sorted(report["missing_keys"]):
            raise InputError(f"{source} lacks {len(missing)} tensors of the language model: {', '.join(missing[:4])}")
    if untied:
        model.config.tie_word_embeddings = False  # saved like this, it loads like this again
    return model


def _checkpoint_activations(model: PreTrainedModel) -> None:
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:  # before transformers 5.2x
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    if getattr(model, "_require_grads_hooks", None):  # only reentrant checkpoints need them, and they do not pickle
        model.disable_input_require_grads()
