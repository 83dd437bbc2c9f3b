"""The model of a pipeline, by `architecture/type`, checkpoint, Hugging Face folder or hub id."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lavis_lite.common import dist
from lavis_lite.common.config.zoo import model_zoo
from lavis_lite.common.errors import InputError, UnknownNameError
from lavis_lite.common.precision import resolve_precision, use_faster_products
from lavis_lite.common.registry import did_you_mean
from lavis_lite.models.base import BaseModel
from lavis_lite.models.loading import from_pretrained, load_model_and_preprocess


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in evaluation mode with its processors, on its device."""

    model: BaseModel
    process_image: Callable[[Any], Any]
    process_text: Callable[[str], str]
    device: torch.device
    dtype: torch.dtype


def load(
    model: str, *, checkpoint: str | None = None, device: str = "auto", precision: str = "auto", **overrides: Any
) -> Loaded:
    """Load a model for inference.

    `model` is `architecture/type` of the zoo, whose weights `checkpoint` replaces; or a checkpoint of train.py, a
    Hugging Face folder or a hub id. `overrides` replace keys of the model section. `precision` is as `run.precision`.

    Raises:
        UnknownNameError: an architecture without its type, or with an unknown one.
        InputError, MissingFileError, UnreachableError: as `load_model` and `from_pretrained`.
    """
    on = dist.resolve_device(device)
    dtype = resolve_precision(precision, on)
    use_faster_products()
    arch, _, kind = model.partition("/")
    if arch in model_zoo:
        types = model_zoo.types(arch)
        if kind not in types:
            problem = f"{kind!r} is unknown" if kind else "the type is missing"
            example = f"{arch}/{(difflib.get_close_matches(kind, types, n=1) or types)[0]}"
            raise UnknownNameError(
                f"model {model}: {problem}. {did_you_mean(kind, types)} Write {example}, for example"
            )
        loaded = load_model_and_preprocess(arch, kind, is_eval=True, device=on, checkpoint=checkpoint, **overrides)
    else:
        for near in difflib.get_close_matches(arch, model_zoo.names(), n=1, cutoff=0.8):
            if kind in model_zoo.types(near) and not Path(model).exists():
                raise UnknownNameError(f"model {model}: unknown architecture {arch!r}. Did you mean {near}/{kind}?")
        if Path(model).name == Path(model).stem == model and not Path(model).exists():
            near = did_you_mean(model, model_zoo.names())
            raise UnknownNameError(f"model {model}: no architecture and no file. {near} `lavis-lite models` has all")
        if checkpoint is not None:
            raise InputError(f"model {model}: checkpoint replaces the weights of architecture/type; give one of them")
        found = from_pretrained(model, processors=True, is_eval=True, device=on, **overrides)
        assert isinstance(found, tuple), "processors were asked for"
        loaded = found
    built, images, texts = loaded
    return Loaded(model=built, process_image=images["eval"], process_text=texts["eval"], device=on, dtype=dtype)
