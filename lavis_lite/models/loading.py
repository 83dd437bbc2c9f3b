"""The library's door: a model, by architecture and type, with the processors that make its inputs.

Surprising: `checkpoint=` replaces the type's own weights, which are then not even downloaded. A type that names only
`eval` processors has them as `train` too (they are deterministic), but never the other way round.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from lavis_lite.config_files import Layer, merge_layers, resolve
from lavis_lite.config_schema import Checker
from lavis_lite.config_sections import PROCESSOR_KEYS, check_processors, model_arguments, model_layer
from lavis_lite.registry import registry

logger = logging.getLogger(__name__)

Processors = dict[str, Callable[[Any], Any]]


def load_model(
    name: str,
    model_type: str,
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
) -> nn.Module:
    """Build a model and load its weights.

    `checkpoint` (a file or URL) is loaded instead of the type's own weights. Raises KeyError for an unknown name or
    type (with the nearest ones), FileNotFoundError for a missing file.
    """
    layers, tree = _packaged(name, model_type)
    return _build(tree["model"], layers, is_eval=is_eval, device=device, checkpoint=checkpoint)


def load_preprocess(config: Mapping[str, Any]) -> tuple[Processors, Processors]:
    """Build the image and text processors of a model YAML's `preprocess` section.

    Its form: `{vis_processor: {train: {name: ...}, eval: {name: ...}}, text_processor: ...}`. Returns two
    dictionaries with the keys "train" and "eval", as in LAVIS. "train" falls back to the `eval` block; a kind of
    which the section names nothing passes its input through. Raises ValueError for an unknown name or argument.
    """
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=True)
    layers = [Layer("preprocess", {"preprocess": dict(config)})]
    check_processors(config, Checker(layers), ("preprocess",))
    vis, text = (_processors(config.get(key) or {}) for key in PROCESSOR_KEYS)
    return vis, text


def load_model_and_preprocess(
    name: str,
    model_type: str,
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
) -> tuple[nn.Module, Processors, Processors]:
    """Return `load_model`'s model, and its type's image and text processors, each a dictionary with "train" and
    "eval".

    >>> model, vis_processors, txt_processors = load_model_and_preprocess("blip_caption", "base_coco", is_eval=True)
    >>> model.generate({"image": vis_processors["eval"](raw_image).unsqueeze(0)})
    """
    layers, tree = _packaged(name, model_type)
    model = _build(tree["model"], layers, is_eval=is_eval, device=device, checkpoint=checkpoint)
    return model, *load_preprocess(tree.get("preprocess", {}))


def _packaged(name: str, model_type: str) -> tuple[list[Layer], dict[str, Any]]:
    layers = [model_layer(name, model_type)]
    return layers, resolve(merge_layers(layers), layers)


def _build(
    section: Mapping[str, Any],
    layers: list[Layer],
    *,
    is_eval: bool,
    device: str | torch.device,
    checkpoint: str | Path | None,
) -> nn.Module:
    arguments = model_arguments(section, Checker(layers))
    if checkpoint is not None:
        arguments["checkpoint"] = str(checkpoint)
    model = registry.get_model_class(arguments["arch"]).from_config(arguments).to(device)
    if not any(arguments.get(key) for key in ("checkpoint", "finetuned", "pretrained")):
        logger.warning("%s/%s has no weights to load: they are random", arguments["arch"], arguments["model_type"])
    return model.train(not is_eval)


def _processors(blocks: Mapping[str, Any]) -> Processors:
    if not blocks:
        return {"train": _unchanged, "eval": _unchanged}
    built = {split: registry.get_processor_class(block["name"]).from_config(block) for split, block in blocks.items()}
    if "eval" in built:
        built.setdefault("train", built["eval"])
    return built


def _unchanged(item: Any) -> Any:
    return item
