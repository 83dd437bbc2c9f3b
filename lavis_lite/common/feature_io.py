"""Files of features: the tokens (N,W) that another encoder computed of one sample, as `.npy` or `.safetensors`.

A `.safetensors` file may hold the features of many samples; `<file>#<tensor>` names one of them. A member of a shard,
or a cell of a table, holds those of one.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lavis_lite.common.errors import UnreadableSample
from lavis_lite.common.members import find_member
from lavis_lite.common.records import StoredImage

NUMPY, SAFETENSORS = ".npy", ".safetensors"
FEATURE_FILES = (NUMPY, SAFETENSORS)
"""Suffixes of the files."""


def is_feature_file(path: str | Path) -> bool:
    """Return whether a path names features, by its suffix."""
    return Path(feature_file(path)).suffix.lower() in FEATURE_FILES


def holds_features(content: bytes) -> bool:
    """Return whether a content is that of a file of features: NumPy's mark, or the header of safetensors."""
    return content.startswith(b"\x93NUMPY") or content[8:9] == b"{"


def feature_file(path: str | Path) -> str:
    """Return the path of a file of features without the name of a tensor in it."""
    stem, mark, _ = str(path).rpartition("#")
    return stem if mark and stem.lower().endswith(SAFETENSORS) else str(path)


def read_features(path: str | Path | StoredImage, *, width: int | None = None) -> Tensor:
    """Return features (N,W) as float32, of `width` W if it is given: of a file, or one in a shard or table.

    Raises UnreadableSample, naming the file, for one that is missing or broken, and as `checked_features`.
    """
    stored = path if isinstance(path, StoredImage) else find_member(path)
    file = Path(str(path) if stored else feature_file(str(path)))
    name = str(path)[len(str(file)) + 1 :]
    try:
        source = file if stored is None else stored.read()
        if not _is_numpy(source):
            found = _from_safetensors(source, str(file), name)
        else:
            content = io.BytesIO(source) if isinstance(source, bytes) else source
            found = torch.from_numpy(np.load(content, allow_pickle=False))
    except FileNotFoundError:
        problem = "check the dataset's build_info.images.storage, or remove the record"
        raise UnreadableSample(f"file of features not found: {file}; {problem}") from None
    except UnreadableSample:
        raise
    except (ValueError, TypeError, OSError, EOFError) as error:
        kinds = "write a numeric array by numpy.save(..., allow_pickle=False), or a .safetensors file"
        raise UnreadableSample(f"{file}: broken, or not an array of numbers ({error}); {kinds}") from error
    return checked_features(found, str(path), width=width, error=UnreadableSample)


def _is_numpy(source: Path | bytes) -> bool:
    """Return whether a file, by its suffix, or a content is NumPy's and not that of safetensors."""
    if isinstance(source, Path):
        return source.suffix.lower() != SAFETENSORS
    return source.startswith(b"\x93NUMPY")


def _from_safetensors(source: Path | bytes, file: str, name: str) -> Tensor:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    def one_of(names: Sequence[str]) -> str:
        if not name and len(names) != 1:
            is_file = isinstance(source, Path)
            advice = f"name one of them: {Path(file).name}#<tensor>" if is_file else "write one sample's alone"
            raise UnreadableSample(f"{file} holds {len(names)} tensors; {advice}")
        if name and name not in names:
            raise UnreadableSample(f"{file} has no tensor {name!r}; it has {', '.join(names[:5])}")
        return name or names[0]

    try:
        if isinstance(source, bytes):
            tensors = load(source)
            return tensors[one_of(list(tensors))]
        with safe_open(source, framework="pt") as content:
            return content.get_tensor(one_of(list(content.keys())))
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
