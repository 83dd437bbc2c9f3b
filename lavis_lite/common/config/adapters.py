"""Settings of adapters (LoRA, Hu et al. 2021): the keys of peft's LoraConfig, or those of a folder that peft wrote."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis_lite.common.bounds import MAX_WIDTH, check_number, check_numbers
from lavis_lite.common.config.schema import Checker, Parameter, Schema, schema_of
from lavis_lite.common.errors import InputError, MissingPackageError
from lavis_lite.common.sources import download
from lavis_lite.common.sources.folders import read_json_mapping

logger = logging.getLogger(__name__)

ADAPTER_KEYS = ("llm_lora", "qformer_lora", "vit_lora", "text_lora")
"""Keys of a model section that add adapters to a part."""
ADAPTER = "adapter"
"""Key of `llm_lora` besides those of LoraConfig: the folder with the adapters' weights."""
CONFIG_FILE = "adapter_config.json"
NUMBERS = {"r": (1, MAX_WIDTH), "lora_alpha": (0.0, 1e6), "lora_dropout": (0.0, 1.0)}
"""Bounds of numbers in LoraConfig."""
PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
"""Keys of LoraConfig that map layers to numbers, and the number that these replace."""
TYPES: Schema = {"lora_alpha": Parameter(float), "init_lora_weights": Parameter(bool | str)}
"""Types of keys of LoraConfig whose annotations are narrower than the values that peft takes."""
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
    stored = read_json_mapping(path)
    if stored.get("peft_type") != "LORA":
        raise InputError(f"llm_lora: {path} is of {stored.get('peft_type')} adapters; only LORA can be loaded")
    defaults = lora_config({}).to_dict()
    given = {key: value for key, value in stored.items() if value is not None and key not in NOT_ABOUT_ADAPTERS}
    if isinstance(given.get("target_modules"), list):
        given["target_modules"] = sorted(given["target_modules"])  # peft saves a set
    if unknown := sorted(given.keys() - defaults.keys()):
        logger.warning(f"llm_lora: the installed peft does not know {', '.join(unknown)}, which are left out")
    kept = {key: value for key, value in given.items() if key in defaults and defaults[key] != value}
    return {**kept, ADAPTER: str(value)}


def lora_config(lora: Mapping[str, Any], *, section: str = "model.llm_lora") -> Any:
    """Return peft's LoraConfig. ValueError for an unknown key or value, ImportError without peft."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingPackageError(f"{section} needs peft: `pip install peft`, or leave the setting out") from error
    settings: dict[str, Any] = {
        key: list(one) if isinstance(one, set) else one for key, one in lora.items() if key != ADAPTER
    }
    check_numbers(section, settings, **NUMBERS)
    Checker([]).section(settings, schema_of(LoraConfig)[0] | TYPES, tuple(section.split(".")))
    for key, number in PATTERNS.items():
        for layer, value in (settings.get(key) or {}).items():
            check_number(f"{section}.{key}.{layer}", value, *NUMBERS[number])
    try:
        return LoraConfig(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"{section}: {error}; its keys are those of peft's LoraConfig") from error
