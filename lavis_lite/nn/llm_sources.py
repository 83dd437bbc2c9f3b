"""Where a language model comes from: a packaged tiny one, a folder or the hub; its config and its tokenizer.

What is surprising: the gated feed-forward of a T5 uses the exact GELU, as LAVIS has it (Flan-T5 was trained with the
tanh approximation; BLIP-2's published weights were trained against the exact one). A Hugging Face BLIP-2 is a source
too, for the language model in it.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from lavis_lite.common.bounds import MAX_LAYERS, MAX_WIDTH, check_number
from lavis_lite.common.errors import InputError, MissingFileError
from lavis_lite.common.sources import download
from lavis_lite.common.sources.hub import from_hub

PACKAGED = Path(__file__).parents[1] / "configs" / "llms"
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
NEEDED = {"inputs_embeds", "attention_mask", "past_key_values"}
"""What a model's `forward` must take."""
UNFIT = {
    "fsmt": "multiplies embeddings that it is given by a factor of its own",
    "prophetnet": "reads one token at a time behind what it has read, and candidates have several",
}
"""Classes that have what is needed by their signature, and yet are of no use."""
LARGEST_NUMBER = 1e7
"""In a language model's config, where frequencies are the largest."""
SIZE = re.compile(
    r"^(num|n)_\w*(layers?|heads?)$|_(dim|positions|position_embeddings)$|(hidden|intermediate|vocab|inner)_size$"
    r"|^(d|n)_[a-z]+$"
)
"""Names of a config's sizes, which are at least 1."""
COMPOSITES = {"blip-2", "instructblip", "instructblipvideo"}
"""Hugging Face's models that hold a language model; their folders serve as its source."""


def language_model_config(source: str | Path, overrides: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """The config of a language model; raises as `load_language_model` does."""
    return read_config(source, overrides or {})[0]


def embedding_width(config: PreTrainedConfig) -> int:
    """Width of the embeddings that the model takes."""
    text = config.get_text_config()
    return getattr(text, "word_embed_proj_dim", None) or text.hidden_size


def packaged_names() -> list[str]:
    """Return the names of this package's tiny models."""
    return sorted(path.parent.name for path in PACKAGED.glob("*/tokenizer.json"))


def locate(source: str | Path) -> str:
    """The folder of a packaged or local model, or the hub id. FileNotFoundError for a folder that is not there."""
    if str(source) in packaged_names():
        return str(PACKAGED / str(source))
    give = (
        "give a folder with config.json, tokenizer and weights, a hub id, or one of the package's tiny models "
        f"({', '.join(packaged_names())})"
    )
    return str(download.local_folder(source, what="language model folder", give=give) or source)


def has_weights(source: str | Path) -> bool:
    """Whether the model's weights can be fetched: a folder has them or not, the hub has them."""
    folder = Path(locate(source))
    return not folder.is_dir() or any(True for pattern in WEIGHT_FILES for _ in folder.glob(pattern))


def load_llm_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which must have an end token; where it has no padding token, that serves as one."""
    what = "tokenizer (tokenizer.json, or vocab and merges)"
    tokenizer = _fetch(AutoTokenizer.from_pretrained, source, what)
    if len(tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)) < 2:  # transformers 5 makes an empty one
        raise _missing(what, locate(source), "its files are not there")
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{locate(source)}: the tokenizer names no end token, so that no text would ever end: give it an eos_token "
            "in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def is_composite(source: str | Path) -> bool:
    """Whether the source is a Hugging Face BLIP-2 or InstructBLIP, which holds a language model."""
    return _fetch(PreTrainedConfig.get_config_dict, source, "config.json")[0].get("model_type") in COMPOSITES


def read_config(source: str | Path, overrides: Mapping[str, Any]) -> tuple[PreTrainedConfig, bool]:
    """The config, and whether the file says that the output layer is not tied to the embeddings."""
    raw, _ = _fetch(PreTrainedConfig.get_config_dict, source, "config.json")
    raw = raw["text_config"] if raw.get("model_type") in COMPOSITES else raw
    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{source}: model_type {model_type!r} in its config.json is no class of the installed transformers: "
            "choose a causal or encoder-decoder language model, or update transformers"
        )
    config_class = CONFIG_MAPPING[model_type]
    unknown = sorted(name for name in overrides if name not in raw and not hasattr(config_class(), name))
    if unknown:
        raise InputError(f"{source}: a {model_type} config has no {', '.join(unknown)} to override")
    _check_overrides(overrides, raw)
    raw = {name: value for name, value in raw.items() if "attn_implementation" not in name}  # may name code of the hub
    raw |= overrides
    try:
        config = config_class.from_dict(raw)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        if not overrides:
            raise
        raise refused(overrides, error) from error
    check_number(f"{source}: the width of its embeddings", embedding_width(config), 1, MAX_WIDTH)
    untied = raw.get("tie_word_embeddings") is False or getattr(config, "scale_decoder_outputs", True) is False
    if not config.is_encoder_decoder and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{source}: a {model_type} is neither a causal nor an encoder-decoder language model")
    if config.is_encoder_decoder and type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise InputError(f"{source}: the encoder-decoder {model_type} does not write text given text")
    _check_class(source, config)
    if getattr(config, "dense_act_fn", None) == "gelu_new":
        config.dense_act_fn = "gelu"
    return config, untied


def refused(overrides: Mapping[str, Any], error: Exception) -> InputError:
    """Return the error about overrides with which transformers cannot build the language model."""
    given = ", ".join(f"{name}: {value!r}" for name, value in overrides.items())
    reason = " ".join(str(error).split())
    return InputError(f"model.llm: the language model cannot be built with {given} ({type(error).__name__}: {reason})")


def _check_overrides(overrides: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    """InputError for what is no number where the file has one, and for numbers beyond any model's; whether they fit
    each other is checked by building it.
    """
    for name, value in overrides.items():
        if value is None or not (_is_number(value) or _is_number(raw.get(name))):
            continue
        bounds: tuple[float, float] = (-LARGEST_NUMBER, LARGEST_NUMBER)
        if SIZE.search(name):
            bounds = (1, MAX_LAYERS if "layer" in name else int(LARGEST_NUMBER))
        elif "drop" in name:
            bounds = (0.0, 1.0)
        check_number(f"model.llm.{name}", value, *bounds)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_class(source: str | Path, config: PreTrainedConfig) -> None:
    """ValueError if the model's class lacks what we need, or reads both ways, as BERT does unless told otherwise."""
    is_two_way = type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False
    if is_two_way and not config.is_encoder_decoder:
        raise InputError(
            f"{source}: a {config.model_type} reads a text from both sides, and would see what it is to write: choose "
            "a causal or encoder-decoder language model"
        )
    if config.model_type in UNFIT:
        raise InputError(f"{source}: a {config.model_type} {UNFIT[config.model_type]}: choose another language model")
    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    lacking = sorted(NEEDED - inspect.signature(mapping[type(config)].forward).parameters.keys())
    if lacking:
        raise InputError(
            f"{source}: transformers' {mapping[type(config)].__name__} takes no {', '.join(lacking)}, without which it "
            "cannot go on behind an image: choose another language model"
        )


def _fetch(load: Callable[..., Any], source: str | Path, what: str) -> Any:
    """Return what a `from_pretrained` gives, from this machine or else from the hub."""
    place = locate(source)
    try:
        return from_hub(load, place)
    except MissingFileError as error:
        raise _missing(what, place, error) from error


def _missing(what: str, place: str, reason: object) -> MissingFileError:
    return MissingFileError(
        f"the language model's {what} could not be loaded from {place}: {reason}. "
        "Without a network, give a folder that holds config.json, the tokenizer's files and the weights."
    )
