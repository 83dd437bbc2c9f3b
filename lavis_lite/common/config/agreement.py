"""Settings that must agree: images with what the image encoder takes, captions with the prompt that they begin with.

A processor block that leaves out `image_size`, `mean` or `std` takes the model's. Another image size than the model's,
and a caption prompt other than the model's, are errors.
"""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lavis_lite.common.config.files import Layer
from lavis_lite.common.config.schema import Checker, schema_of
from lavis_lite.common.config.sections import check_processors
from lavis_lite.common.registry import registry


def follow_model(
    blocks: Mapping[str, Any], model: Mapping[str, Any], checker: Checker, path: tuple[str, ...]
) -> dict[str, Any]:
    """Return the processor blocks of the section at `path` (`preprocess` or a dataset's), completed from `model`.

    Raises ConfigError, naming both keys, for an image size or a caption prompt that contradicts the model's.
    """
    blocks = dict(blocks)
    if blocks.get("vis_processor"):
        wanted = image_settings(model)
        blocks["vis_processor"] = {
            split: _completed(block, wanted, checker, (*path, "vis_processor", split))
            for split, block in blocks["vis_processor"].items()
        }
    captions = (blocks.get("text_processor") or {}).get("train") or {}
    if _contradicts(captions, model):
        own, expected = captions["prompt"], model_setting(model, "prompt")
        text = f"{own!r} is not model.prompt, which is {expected!r}: set both to one text"
        raise checker.error((*path, "text_processor", "train", "prompt"), text)
    return blocks


def linked(layer: Layer) -> Layer:
    """Return a layer whose processors refer to the model's `image_size` and `prompt` where it states both alike, as a
    job's config.yaml does: then an option changes both.
    """
    model, tree = layer.tree.get("model") or {}, dict(layer.tree)
    if "preprocess" in tree:
        tree["preprocess"] = linked_section(tree["preprocess"], model)
    if "datasets" in tree:
        tree["datasets"] = {name: linked_section(body, model) for name, body in tree["datasets"].items()}
    return replace(layer, tree=tree)


def linked_section(section: Any, model: Mapping[str, Any]) -> Any:
    """Return a section of processors that refer to the model's image size and prompt where they are the same, a prompt
    with the spaces that the processor puts around it.
    """
    if not isinstance(section, Mapping):
        return section
    section = dict(section)
    for kind, key in (("vis_processor", "image_size"), ("text_processor", "prompt")):
        blocks, stated = section.get(kind), model.get(key)
        if stated and isinstance(blocks, Mapping):
            section[kind] = {
                split: {**block, key: _reference(block[key], stated, key)}
                if isinstance(block, Mapping) and key in block
                else block
                for split, block in blocks.items()
            }
    return section


def _reference(value: Any, stated: Any, key: str) -> Any:
    """Return a value that refers to the model's `key`, which is `stated`; the value itself if it is another one."""
    if value == stated:
        return f"${{model.{key}}}"
    if isinstance(value, str) and isinstance(stated, str) and value.strip() == stated.strip():
        return value.replace(stated, f"${{model.{key}}}")
    return value


def preprocess_of(model: Mapping[str, Any], preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `preprocess` section that goes with a model section, for callers who name the model only: image size
    and caption prompt are the model's, whatever the section says. ConfigError for an unknown processor or argument.
    """
    checker = Checker([Layer("preprocess", {"preprocess": dict(preprocess)})])
    check_processors(preprocess, checker, ("preprocess",))
    blocks = dict(preprocess)
    images = blocks.get("vis_processor") or {}
    blocks["vis_processor"] = {
        split: {key: value for key, value in block.items() if key != "image_size"} for split, block in images.items()
    }
    texts = blocks.get("text_processor") or {}
    if _contradicts(texts.get("train") or {}, model):
        prompt = f"{model_setting(model, 'prompt').strip()} "
        blocks["text_processor"] = {**texts, "train": {**texts["train"], "prompt": prompt}}
    return follow_model(blocks, model, checker, ("preprocess",))


def image_settings(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model section says of its images: `image_size`, and `mean` and `std` where the encoder has its own.

    An architecture without such a setting says nothing. CLIP's mean and std are the processors' defaults.
    """
    model_class = registry.get_model_class(model["arch"])
    statistics = getattr(model_class, "image_statistics", lambda section: None)(model)
    settings = {"image_size": model_setting(model, "image_size"), **(statistics or {})}
    return {key: value for key, value in settings.items() if value is not None}


def model_setting(model: Mapping[str, Any], key: str) -> Any:
    """Return a key of a model section, or the constructor's default; None if the architecture has no such key."""
    parameter = inspect.signature(registry.get_model_class(model["arch"])).parameters.get(key)
    default = None if parameter is None or parameter.default is parameter.empty else parameter.default
    return model.get(key, default)


def _completed(block: Mapping[str, Any], wanted: Mapping[str, Any], checker: Checker, path: tuple[str, ...]) -> Any:
    schema, _ = schema_of(registry.get_processor_class(block["name"]))
    missing = {key: value for key, value in wanted.items() if key in schema and block.get(key) is None}
    size = block.get("image_size")
    if size is not None and "image_size" in wanted and size != wanted["image_size"]:
        raise checker.error(
            (*path, "image_size"),
            f"{size} is not model.image_size, which is {wanted['image_size']}: leave it out to take the model's",
        )
    return {**block, **missing}


def _contradicts(block: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    """Whether a text processor begins training captions with another prompt than the model's, which the model leaves
    out of the loss and generates from.
    """
    begins = getattr(registry.get_model_class(model["arch"]), "prompt_begins_captions", False)
    if not begins or block.get("name") != "blip_caption":
        return False
    own, expected = ((text or "").strip() for text in (block.get("prompt"), model_setting(model, "prompt")))
    return bool(own and expected) and "{}" not in expected and own != expected
