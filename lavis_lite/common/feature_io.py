"""Files of features: the tokens (N,W) that another encoder computed of one sample, as `.npy` or `.safetensors`.

A `.safetensors` file may hold the features of many samples; `<file>#<tensor>` names one of them.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lavis_lite.common.errors import UnreadableSample

NUMPY, SAFETENSORS = ".npy", ".safetensors"
FEATURE_FILES = (NUMPY, SAFETENSORS)
"""Suffixes of the files."""


def is_feature_file(path: str | Path) -> bool:
    """Return whether a path names features, by its suffix."""
    return Path(feature_file(path)).suffix.lower() in FEATURE_FILES


def feature_file(path: str | Path) -> str:
    """Return the path of a file of features without the name of a tensor in it."""
    stem, mark, _ = str(path).rpartition("#")
    return stem if mark and stem.lower().endswith(SAFETENSORS) else str(path)


def read_features(path: str | Path, *, width: int | None = None) -> Tensor:
    """Return features (N,W) as float32, of `width` W if it is given.

    Raises UnreadableSample, naming the file, for one that is missing or broken, and as `checked_features`.
    """
    file = Path(feature_file(path))
    name = str(path)[len(str(file)) + 1 :]
    try:
        if file.suffix.lower() == SAFETENSORS:
            found = _from_safetensors(file, name)
        else:
            found = torch.from_numpy(np.load(file, allow_pickle=False))
    except FileNotFoundError:
        problem = "check the dataset's build_info.images.storage, or remove the record"
        raise UnreadableSample(f"file of features not found: {file}; {problem}") from None
    except (ValueError, TypeError, OSError, EOFError) as error:
        kinds = "write a numeric array by numpy.save(..., allow_pickle=False), or a .safetensors file"
        raise UnreadableSample(f"{file}: broken, or not an array of numbers ({error}); {kinds}") from error
    return checked_features(found, str(path), width=width, error=UnreadableSample)


def _from_safetensors(file: Path, name: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            names = list(content.keys())
            if not name and len(names) != 1:
                raise UnreadableSample(f"{file} holds {len(names)} tensors; name one of them: {file.name}#<tensor>")
            if name and name not in names:
                raise UnreadableSample(f"{file} has no tensor {name!r}; it has {', '.join(names[:5])}")
            return content.get_tensor(name or names[0])
    except SafetensorError as error:
        raise UnreadableSample(f"{file}: broken, or not a .safetensors file ({error}); write it again") from error


def checked_features(
    features: Tensor, where: str, *, width: int | None = None, error: Callable[[str], Exception]
) -> Tensor:
    """Return features (N,W) as float32; raise an `error` for another shape, type or width, and for nan or infinity."""
    shape = tuple(features.shape)
    if features.dim() != 2 or 0 in shape:
        raise error(f"{where}: features have shape {shape}; they must be (tokens, width), with at least one token")
    if not features.is_floating_point():
        raise error(f"{where}: features are of {features.dtype}; they must be floating point")
    if width is not None and shape[1] != width:
        raise error(f"{where}: features have width {shape[1]}, the model takes {width}; set model.vit.width={shape[1]}")
    features = features.float()
    if not bool(features.isfinite().all()):
        raise error(f"{where}: features hold nan or infinity (float32); compute them again, or remove the record")
    return features
