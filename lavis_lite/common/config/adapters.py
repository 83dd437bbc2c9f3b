"""Settings of adapters (LoRA, Hu et al. 2021): the keys of peft's LoraConfig, or those of a folder that peft wrote."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis_lite.common.bounds import MAX_WIDTH, check_number, check_numbers, one_of
from lavis_lite.common.config.schema import MAX_WHOLE, Checker, Parameter, Schema
from lavis_lite.common.errors import InputError, MissingFileError, MissingPackageError
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
TYPES: Schema = {
    **dict.fromkeys(("use_dora", "use_rslora", "use_qalora", "lora_bias"), Parameter(bool | None)),
    **dict.fromkeys(("fan_in_fan_out", "ensure_weight_tying"), Parameter(bool | None)),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), Parameter(str | list[str] | None)),
    **dict.fromkeys(("modules_to_save", "target_parameters"), Parameter(list[str] | None)),
    **dict.fromkeys(PATTERNS, Parameter(dict[str, Any] | None)),
    "layers_to_transform": Parameter(int | list[int] | None),
    "trainable_token_indices": Parameter(list[int] | dict[str, list[int]] | None),
}
"""Types of keys of LoraConfig that peft does not check."""
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
    """Raise InputError about `model.llm_lora.<key>` for a value that peft would fail on, or misread."""
    section = "model.llm_lora"
    check_numbers(section, settings, **NUMBERS)
    as_lists = {key: list(value) if isinstance(value, set) else value for key, value in settings.items()}
    checked = Checker([]).section(as_lists, TYPES, tuple(section.split(".")), open_ended=True)
    for key, number in PATTERNS.items():
        for layer, value in (checked.get(key) or {}).items():
            check_number(f"{section}.{key}.{layer}", value, *NUMBERS[number])
    rows = checked.get("trainable_token_indices") or []
    for row in (row for one in (rows.values() if isinstance(rows, dict) else [rows]) for row in one):
        check_number(f"{section}.trainable_token_indices", row, 0, MAX_WHOLE)
