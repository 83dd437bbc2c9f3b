"""Hugging Face folders: the files that hold the weights, and what the JSON files say.

A folder that `lavis_lite.convert` wrote has two more files, which transformers does not read: `lavis_lite.json`
(architecture and settings) and `lavis_lite.safetensors` (tensors without a place in transformers' class).
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis_lite.common.errors import InputError, MissingFileError

logger = logging.getLogger(__name__)

WEIGHT_FILES = tuple(
    f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")
)
"""Names of the weight file or its index, in the order of preference."""
EXTRA_FILE = "lavis_lite.safetensors"
"""Tensors under LAVIS's names."""
SETTINGS_FILE = "lavis_lite.json"
INVALID = (ValueError, KeyError, AttributeError, TypeError, RecursionError)
"""Raised while a damaged JSON file is read."""


def weight_files(folder: Path) -> list[Path]:
    """Return all files with weights: the file or its shards, and `EXTRA_FILE`.

    Raises:
        FileNotFoundError: the folder has no weight file, or a shard is missing.
        ValueError: the index is damaged.
    """
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise MissingFileError(f"{folder}: holds no {' or '.join(WEIGHT_FILES)}: give a folder of model weights")
    paths = shards(found) if found.suffix == ".json" else [found]
    return [*paths, folder / EXTRA_FILE] if (folder / EXTRA_FILE).is_file() else paths


def shards(index: Path) -> list[Path]:
    """Return the files that an index names, sorted.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: the index is damaged, or names a file outside its folder.
    """
    try:
        names = sorted(set(read_json_mapping(index)["weight_map"].values()))
        outside = [name for name in names if name != Path(name).name or name == ".."]
    except INVALID as error:
        raise InputError(f"{index}: not an index of weight files ({type(error).__name__}: {error})") from error
    if outside:
        raise InputError(f"{index} names {outside[0]!r}, which is not a plain file name: its files lie beside it")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        lacking = f"{len(missing)} of the {len(names)} weight files that {index.name} names: {', '.join(missing[:3])}"
        raise MissingFileError(f"{index.parent}: lacks {lacking}. Download them again")
    return [index.parent / name for name in names]


def read_json_mapping(path: Path) -> dict[str, Any]:
    """Return a JSON file's content. FileNotFoundError if it is missing, ValueError if it is not a mapping."""
    if not path.is_file():
        raise MissingFileError(f"{path.parent} has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping, found a {type(content).__name__}")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json. FileNotFoundError or ValueError if it is missing or damaged."""
    return read_json_mapping(folder / "config.json")


def read_settings(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """Return the architecture and the sections `model` and `preprocess` of `SETTINGS_FILE`, or None and empty ones.
    ValueError for a damaged file.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return None, {"model": {}, "preprocess": {}}
    try:
        stored = read_json_mapping(path)
        return stored["arch"], {"model": dict(stored["settings"]), "preprocess": dict(stored.get("preprocess") or {})}
    except INVALID as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}): delete it to do without") from error


def read_image_settings(folder: Path, image_size: int) -> dict[str, Any]:
    """Return `mean` and `std` of preprocessor_config.json or processor_config.json, as far as they are given.

    Logs a warning if the file's image size is not `image_size`, the model's, which is used.
    """
    found: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            content = read_json_mapping(folder / name)
            found |= content.get("image_processor") or content
    size = found.get("size")
    if isinstance(size, Mapping):
        size = size.get("height", size.get("shortest_edge"))
    if isinstance(size, int) and size != image_size:
        logger.warning(f"{folder} has images of {size} pixels in its preprocessor, and the model takes {image_size}")
    return {ours: found[key] for key, ours in (("image_mean", "mean"), ("image_std", "std")) if key in found}
