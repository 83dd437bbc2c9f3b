"""Settings of adapters (LoRA, Hu et al. 2021): the keys of peft's LoraConfig, or those of a folder that peft wrote."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lavis_lite.common.bounds import MAX_WIDTH, check_number, check_numbers, one_of
from lavis_lite.common.errors import InputError, MissingFileError, MissingPackageError, SettingError
from lavis_lite.common.sources import download

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
"""Key of `llm_lora` besides those of LoraConfig: the folder with the adapters' weights."""
CONFIG_FILE = "adapter_config.json"
BIASES = ("none", "all", "lora_only")
NUMBERS = {"r": (1, MAX_WIDTH), "lora_alpha": (0.0, 1e6), "lora_dropout": (0.0, 1.0)}
"""Bounds of numbers in LoraConfig."""
PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
"""Keys of LoraConfig that map layers to numbers, and the number that these replace."""
NOT_ABOUT_ADAPTERS = (
    *("base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version", "auto_mapping"),
)
"""Keys of a peft folder's configuration that do not describe the adapters."""


def lora_settings(value: Mapping[str, Any] | str | Path | None) -> dict[str, Any] | None:
    """Return `llm_lora` as a mapping; of a folder that peft wrote, its configuration, and its path as `adapter`.

    Raises:
        FileNotFoundError: the folder is missing, or has no adapter_config.json.
        ValueError: the folder holds other adapters than LoRA's.
    """
    if not isinstance(value, str | Path):
        return None if value is None else dict(value)
    path = download.fetch_folder(value) / CONFIG_FILE
    if not path.is_file():
        raise MissingFileError(f"llm_lora: {value} holds no {CONFIG_FILE}: name a folder that peft wrote")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        kind = stored["peft_type"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"llm_lora: {path} is not a configuration of peft ({reason})") from error
    if kind != "LORA":
        raise InputError(f"llm_lora: {path} is of {kind} adapters; only LORA can be loaded")
    kept = {key: setting for key, setting in stored.items() if setting is not None and key not in NOT_ABOUT_ADAPTERS}
    if isinstance(kept.get("target_modules"), list):
        kept["target_modules"] = sorted(kept["target_modules"])  # peft saves a set
    return {**_without_defaults(kept), ADAPTER: str(value)}


def _without_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that differ from LoraConfig's defaults, without those of another version of peft."""
    defaults = lora_config({}).to_dict()
    unknown = sorted(settings.keys() - defaults.keys())
    if unknown:
        logger.warning(f"llm_lora: the installed peft does not know {', '.join(unknown)}, which are left out")
    return {key: value for key, value in settings.items() if key in defaults and defaults[key] != value}


def lora_config(lora: Mapping[str, Any]) -> Any:
    """Return peft's LoraConfig. ValueError for an unknown key or value, ImportError without peft."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingPackageError("llm_lora needs peft: `pip install peft`, or leave the setting out") from error
    settings = {key: value for key, value in lora.items() if key != ADAPTER}
    check_types(settings)
    try:
        config = LoraConfig(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"model.llm_lora: {error}; its keys are those of peft's LoraConfig") from error
    one_of("model.llm_lora.bias", config.bias, BIASES)
    return config


def check_types(settings: Mapping[str, Any]) -> None:
    """Raise SettingError about `model.llm_lora.<key>` for a value that peft would fail on, or misread."""
    section = "model.llm_lora"
    check_numbers(section, settings, **NUMBERS)
    for key, number in PATTERNS.items():
        pattern = settings.get(key)
        if pattern is not None and not isinstance(pattern, Mapping):
            raise SettingError(f"{section}.{key}", f"must be a mapping from layers to numbers, got {pattern!r}")
        for layer, value in (pattern or {}).items():
            check_number(f"{section}.{key}.{layer}", value, *NUMBERS[number])
    for expected, (fits, keys) in TYPES.items():
        for key in keys:
            if settings.get(key) is not None and not fits(settings[key]):
                raise SettingError(f"{section}.{key}", f"must be {expected}, got {settings[key]!r}")


def _is_list(value: Any, kind: type) -> bool:
    """Return whether this is a list, or another collection that peft takes, of such values."""
    return isinstance(value, list | tuple | set) and all(type(one) is kind for one in value)


def _is_rows(value: Any) -> bool:
    """Return whether this is a list of token ids, or a mapping from embeddings to such lists."""
    lists = value.values() if isinstance(value, Mapping) else [value]
    return all(_is_list(one, int) and all(row >= 0 for row in one) for one in lists)


TYPES: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "true or false": (
        lambda value: isinstance(value, bool),
        ("use_dora", "use_rslora", "use_qalora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"),
    ),
    "a text or a list of texts": (
        lambda value: isinstance(value, str) or _is_list(value, str),
        ("target_modules", "exclude_modules", "layers_pattern"),
    ),
    "a list of texts": (lambda value: _is_list(value, str), ("modules_to_save", "target_parameters")),
    "a whole number or a list of whole numbers": (
        lambda value: type(value) is int or _is_list(value, int),
        ("layers_to_transform",),
    ),
    "a list of tokens' ids, or a mapping from embeddings to such lists": (_is_rows, ("trainable_token_indices",)),
}
"""Values that keys of LoraConfig take, in words and as a test; peft checks the other keys."""
