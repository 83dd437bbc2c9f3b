"""Sources of language models (a packaged tiny one, a folder, the hub), their configs and tokenizers.

Note: the gated feed-forward of a T5 uses the exact GELU, as LAVIS has it (Flan-T5 was trained with the tanh
approximation; BLIP-2's published weights were trained against the exact one). A Hugging Face BLIP-2 is a source too,
for the language model in it.
"""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
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
"""Parameters of a model's `forward` that generation after an image needs."""
UNFIT = {
    "fsmt": "multiplies the embeddings that it is given by a factor of its own",
    "prophetnet": "reads one token at a time after its cache, and candidates have several",
}
"""Model types whose `forward` has the parameters, but computes something else."""
LARGEST_NUMBER = 1e7
"""In a language model's config; frequencies are the largest numbers."""
SIZE = re.compile(
    r"^(num|n)_\w*(layers?|heads?)$|_(dim|positions|position_embeddings)$|(hidden|intermediate|vocab|inner)_size$"
    r"|^(d|n)_[a-z]+$"
)
"""Names of a config's sizes, which are at least 1."""
COMPOSITES = {"blip-2", "instructblip", "instructblipvideo"}
"""Hugging Face's models that hold a language model; their folders serve as its source."""
NOT_BUILT = (
    *(TypeError, ValueError, ArithmeticError, AttributeError, LookupError, AssertionError, RuntimeError),
    StrictDataclassError,
)
"""Errors of transformers and torch for sizes that do not fit each other."""


def embedding_width(config: PreTrainedConfig) -> int:
    """Return the width of the embeddings that the model takes."""
    text = config.get_text_config()
    return getattr(text, "word_embed_proj_dim", None) or text.hidden_size


def forward_parameters(model_class: Any) -> frozenset[str]:
    """Return the parameters of a class's `forward`, which transformers documents, but lists in no attribute."""
    return frozenset(inspect.signature(model_class.forward).parameters)


def packaged_names() -> list[str]:
    """Return the names of this package's tiny models."""
    return sorted(path.parent.name for path in PACKAGED.glob("*/tokenizer.json"))


def locate(source: str | Path) -> str:
    """Return the folder of a packaged or local model, or the hub id. MissingFileError for a folder that is missing."""
    packaged = packaged_names()
    if str(source) in packaged:
        return str(PACKAGED / str(source))
    give = f"give a folder with config.json, tokenizer and weights, a hub id, or one of {', '.join(packaged)}"
    return str(download.local_folder(source, what="language model folder", give=give) or source)


def has_weights(source: str | Path) -> bool:
    """Return whether the model's weights can be fetched: the hub has them, a folder may not."""
    folder = Path(locate(source))
    return not folder.is_dir() or any(path for pattern in WEIGHT_FILES for path in folder.glob(pattern))


def load_llm_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer, which must have an end token; without a padding token, that serves as one."""
    tokenizer = fetch(AutoTokenizer.from_pretrained, locate(source), "the language model's tokenizer")
    if len(tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)) < 2:  # transformers 5 makes an empty one
        raise MissingFileError(f"{locate(source)}: holds no tokenizer.json, nor vocab and merges of a tokenizer")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{locate(source)}: tokenizer_config.json names no eos_token, which ends a text: add it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def is_composite(source: str | Path) -> bool:
    """Return whether the source is a Hugging Face BLIP-2 or InstructBLIP, which holds a language model."""
    return _config_file(source).get("model_type") in COMPOSITES


def read_config(source: str | Path, overrides: Mapping[str, Any] | None = None) -> tuple[PreTrainedConfig, bool]:
    """Return the config, and whether the file says that the output layer is not tied to the embeddings; raises as
    `load_language_model` does.
    """
    raw, overrides = _config_file(source), overrides or {}
    raw = raw["text_config"] if raw.get("model_type") in COMPOSITES else raw
    model_type = str(raw.get("model_type"))
    if model_type not in CONFIG_MAPPING:  # transformers' public table; AutoConfig would also read code of the hub
        raise InputError(f"{source}: config.json: transformers has no model_type {model_type!r}; update transformers")
    config_class = CONFIG_MAPPING[model_type]
    unknown = sorted(name for name in overrides if name not in raw and not hasattr(config_class(), name))
    if unknown:
        raise InputError(f"{source}: a {model_type} config has no {', '.join(unknown)} to override")
    _check_overrides(overrides, raw)
    raw = {name: value for name, value in raw.items() if "attn_implementation" not in name}  # may name code of the hub
    with naming(overrides):
        config = config_class.from_dict(raw | dict(overrides))
    check_number(f"{source}: the width of its embeddings", embedding_width(config), 1, MAX_WIDTH)
    _check_class(source, config)
    if getattr(config, "dense_act_fn", None) == "gelu_new":
        config.dense_act_fn = "gelu"
    raw |= overrides
    return config, raw.get("tie_word_embeddings") is False or getattr(config, "scale_decoder_outputs", True) is False


@contextlib.contextmanager
def naming(overrides: Mapping[str, Any]) -> Iterator[None]:
    """Turn an error of transformers about building the language model into one that names the overrides, if any."""
    try:
        yield
    except NOT_BUILT as error:
        if not overrides:
            raise
        given = ", ".join(f"{name}: {value!r}" for name, value in overrides.items())
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"model.llm: the language model cannot be built with {given} ({reason})") from error


def _check_overrides(overrides: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    """Raise InputError for a value that replaces a number and is not one, and for numbers beyond any model's; whether
    they fit each other is checked by building the model.
    """
    for name, value in overrides.items():
        are_numbers = (isinstance(one, Real) and not isinstance(one, bool) for one in (value, raw.get(name)))
        if value is None or not any(are_numbers):
            continue
        bounds: tuple[float, float] = (-LARGEST_NUMBER, LARGEST_NUMBER)
        if SIZE.search(name):
            bounds = (1, MAX_LAYERS if "layer" in name else int(LARGEST_NUMBER))
        elif "drop" in name:
            bounds = (0.0, 1.0)
        check_number(f"model.llm.{name}", value, *bounds)


def _check_class(source: str | Path, config: PreTrainedConfig) -> None:
    """Raise InputError unless the config is of a language model that can write after an image."""
    kind, reason = type(config), UNFIT.get(config.model_type)
    mapping: Any = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if config.is_encoder_decoder else MODEL_FOR_CAUSAL_LM_MAPPING
    reads_both_sides = kind in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False
    if kind not in mapping:
        reason = "is neither a causal nor an encoder-decoder language model"
    elif reads_both_sides and not config.is_encoder_decoder:
        reason = "reads a text from both sides, and would see the tokens that it is to predict"
    elif missing := sorted(NEEDED - forward_parameters(mapping[kind])):
        reason = f"cannot write after an image: {mapping[kind].__name__}.forward takes no {', '.join(missing)}"
    if reason is not None:
        raise InputError(f"{source}: a {config.model_type} {reason}: choose another language model")


def _config_file(source: str | Path) -> dict[str, Any]:
    return fetch(PreTrainedConfig.get_config_dict, locate(source), "the language model's config.json")[0]


def fetch(load: Callable[..., Any], source: str, what: str, **settings: Any) -> Any:
    """Return what a `from_pretrained` loads, from this machine or else from the hub. MissingFileError, which says
    `what`, without it.
    """
    try:
        return from_hub(load, source, **settings)
    except MissingFileError as error:
        raise MissingFileError(f"{what} could not be loaded from {source!r}: {error}") from error
