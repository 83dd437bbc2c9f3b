"""Settings of several sections that must agree: processors with the model, prompts with datasets' instructions.

A processor block without `image_size`, `mean` or `std` takes the model's; another image size, and a caption prompt
other than the model's, are errors.

Prompts have one order; the first source that fits a dataset counts, and no prompt is put inside another:
1. `run.prompt`; 2. `model.prompt`, where the project gives another than the model type; 3. the dataset's
`instructions`; 4. the model type's prompt, for datasets without instructions. Two explicit prompts of one kind (for
questions, with `{}`; for captions, without) are an error, and so are explicit instructions with an explicit prompt.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from lavis_lite.common.config import zoo
from lavis_lite.common.config.files import Layer, layer_of, merge_layers
from lavis_lite.common.config.schema import REQUIRED, Checker, KeyPath, schema_of
from lavis_lite.common.config.sections import builder_name, check_processors
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry

logger = logging.getLogger(__name__)


def model_setting(model: Mapping[str, Any], key: str) -> Any:
    """Return a key of a model section, or the constructor's default; None if the architecture has no such key."""
    parameter = schema_of(registry.get_model_class(model["arch"]))[0].get(key)
    default = None if parameter is None or parameter.default is REQUIRED else parameter.default
    return model.get(key, default)


# Processors and the model


def follow_model(
    blocks: Mapping[str, Any], model: Mapping[str, Any], checker: Checker, path: KeyPath
) -> dict[str, Any]:
    """Return the processor blocks of the section at `path` (`preprocess` or a dataset), completed from `model`.

    Raises ConfigError, naming both keys, for an image size or a caption prompt other than the model's.
    """
    blocks = dict(blocks)
    if blocks.get("vis_processor"):
        blocks["vis_processor"] = dict(blocks["vis_processor"])
        statistics = registry.get_model_class(model["arch"]).image_statistics(model) or {}  # else CLIP's, the default
        expected = model_setting(model, "image_size")
        own = {"image_size": expected, **statistics}
        for split, block in blocks["vis_processor"].items():
            size, schema = block.get("image_size"), schema_of(registry.get_processor_class(block["name"]))[0]
            if None not in (size, expected) and size != expected:
                text = f"{size} is not model.image_size, which is {expected}: leave it out to take the model's"
                raise checker.error((*path, "vis_processor", split, "image_size"), text)
            missing = [key for key in own if key in schema and block.get(key) is None and own[key] is not None]
            blocks["vis_processor"][split] = {**block, **{key: own[key] for key in missing}}
    captions = (blocks.get("text_processor") or {}).get("train") or {}
    if _contradicts(captions, model):
        own_prompt, expected = captions["prompt"], model_setting(model, "prompt")
        text = f"{own_prompt!r} is not model.prompt, which is {expected!r}: set both to one text"
        raise checker.error((*path, "text_processor", "train", "prompt"), text)
    return blocks


def _contradicts(block: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    """Return whether a text processor puts another prompt before training captions than the model's.

    The model leaves its prompt out of the loss and generates from it.
    """
    if not registry.get_model_class(model["arch"]).prompt_begins_captions or block.get("name") != "blip_caption":
        return False
    own, expected = ((text or "").strip() for text in (block.get("prompt"), model_setting(model, "prompt")))
    return bool(own and expected) and "{}" not in expected and own != expected


def preprocess_of(model: Mapping[str, Any], preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `preprocess` section with the image size and caption prompt of a model section, whatever it has itself.

    For callers who name only the model. Raises ConfigError for an unknown processor or argument.
    """
    checker = Checker([Layer("preprocess", {"preprocess": dict(preprocess)})])
    check_processors(preprocess, checker, ("preprocess",))
    blocks = dict(preprocess)
    blocks["vis_processor"] = {
        split: {key: value for key, value in block.items() if key != "image_size"}
        for split, block in (blocks.get("vis_processor") or {}).items()
    }
    texts = blocks.get("text_processor") or {}
    if _contradicts(texts.get("train") or {}, model):
        prompt = f"{model_setting(model, 'prompt').strip()} "
        blocks["text_processor"] = {**texts, "train": {**texts["train"], "prompt": prompt}}
    return follow_model(blocks, model, checker, ("preprocess",))


def linked(layer: Layer) -> Layer:
    """Return a layer whose processors refer to the model's `image_size` and `prompt` where both are equal.

    A job's config.yaml states each of them twice; an option then changes both.
    """
    model, tree = layer.tree.get("model") or {}, dict(layer.tree)
    if "preprocess" in tree:
        tree["preprocess"] = linked_section(tree["preprocess"], model)
    if "datasets" in tree:
        tree["datasets"] = {name: linked_section(body, model) for name, body in tree["datasets"].items()}
    return replace(layer, tree=tree)


def linked_section(section: Any, model: Mapping[str, Any]) -> Any:
    """Return a section whose processors refer to the model's image size and prompt where they are equal.

    A prompt may differ in the spaces around it, which the processor adds.
    """
    if not isinstance(section, Mapping):
        return section
    section = dict(section)
    for kind, key in (("vis_processor", "image_size"), ("text_processor", "prompt")):
        blocks, own = section.get(kind), model.get(key)
        if own and isinstance(blocks, Mapping):
            section[kind] = dict(blocks)
            for split, block in blocks.items():
                value = block.get(key) if isinstance(block, Mapping) else None
                if value is not None and str(value).strip() == str(own).strip():
                    section[kind][split] = {**block, key: str(value).replace(str(own), f"${{model.{key}}}")}
    return section


# Prompts and instructions


@runtime_checkable
class InstructionBuilder(Protocol):
    """A builder of a dataset with `instructions`."""

    @staticmethod
    def with_prompt(instructions: Any, prompt: str) -> dict[str, Any] | None:
        """Return the instructions with a prompt in place of their templates; None if it does not fit them."""


def replaced_instructions(
    task: Mapping[str, Any],
    model: Mapping[str, Any],
    datasets: Mapping[str, Mapping[str, Any]],
    types: Mapping[str, str],
    checker: Checker,
) -> dict[str, dict[str, Any]]:
    """Return the `instructions` of each dataset whose template an explicit prompt replaces; log a line for each.

    Raises ConfigError, naming both keys, for two explicit prompts, and for one with explicit instructions.
    """
    prompts = explicit_prompts(task, model, checker)
    replaced: dict[str, dict[str, Any]] = {}
    for name, section in datasets.items():
        builder_class = registry.get_builder_class(builder_name(name, section))
        if not prompts or not issubclass(builder_class, InstructionBuilder):
            continue
        builder, kind = section.get("builder", name), types.get(name, "default")
        packaged = zoo.packaged_dataset(builder, kind) if kind in zoo.dataset_zoo.types(builder) else {}
        default = packaged.get("instructions", schema_of(builder_class)[0]["instructions"].default)
        instructions = section.get("instructions", default)
        key, found = _first_that_fits(builder_class, instructions, prompts, checker)
        if found is None:
            logger.info(f"datasets.{name} keeps its instructions: {' and '.join(prompts)} cannot replace them")
        elif instructions == default:
            logger.info(f"datasets.{name}: {key} {prompts[key]!r} replaces its instructions")
            replaced[name] = found
        elif key != "model.prompt" or not _is_of_checkpoint(checker):
            text = f"{key} is given too, {prompts[key]!r}: set one of them"
            raise checker.error(("datasets", name, "instructions"), text)
    return replaced


def explicit_prompts(task: Mapping[str, Any], model: Mapping[str, Any], checker: Checker) -> dict[str, str]:
    """Return the prompts that the project gives, by key, in their order. ConfigError for two of one kind."""
    arch, own_prompt = model["arch"], model_setting(model, "prompt")
    of_type: Mapping[str, Any] = {"arch": arch}
    if model.get("model_type") in zoo.model_zoo.types(arch):
        of_type = merge_layers(zoo.model_layers(arch, model["model_type"]))["model"]
    is_given = registry.get_model_class(arch).prompt_begins_captions and own_prompt != model_setting(of_type, "prompt")
    given = {"run.prompt": task.get("prompt"), "model.prompt": own_prompt if is_given else None}
    prompts = {key: prompt for key, prompt in given.items() if prompt}
    is_question = {"{}" in prompt for prompt in prompts.values()}
    if len({prompt.strip() for prompt in prompts.values()}) == 2 and len(is_question) == 1:
        run, own = prompts.values()
        if _is_of_checkpoint(checker):
            return {"run.prompt": run}
        raise checker.error(("run", "prompt"), f"{run!r} and model.prompt, {own!r}, are two prompts: set one of them")
    return prompts


def _is_of_checkpoint(checker: Checker) -> bool:
    """Return whether `model.prompt` comes from the checkpoint; any prompt of the project then replaces it."""
    layer = layer_of(checker.layers, ("model", "prompt"))
    return layer is not None and layer.is_trained


def _first_that_fits(
    builder: type[InstructionBuilder], instructions: Any, prompts: Mapping[str, str], checker: Checker
) -> tuple[str, dict[str, Any] | None]:
    """Return the key of the first prompt that can replace the instructions, and the result; "" and None if none can."""
    for key, prompt in prompts.items():
        try:
            found = builder.with_prompt(instructions, prompt)
        except InputError as error:
            raise checker.error(tuple(key.split(".")), str(error)) from None
        if found is not None:
            return key, found
    return "", None
