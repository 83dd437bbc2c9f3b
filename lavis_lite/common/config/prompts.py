"""The one order of prompts. The first source that fits a dataset counts, and no prompt is put inside another:

1. `run.prompt`; 2. `model.prompt`, where the project gives another than the model type; 3. the dataset's
`instructions`; 4. the model type's prompt, for datasets without instructions. Two explicit prompts of one kind (for
questions, with `{}`; for captions, without) are an error, as are explicit instructions beside an explicit prompt.
"""

import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lavis_lite.common.config import zoo
from lavis_lite.common.config.agreement import model_setting
from lavis_lite.common.config.files import origin
from lavis_lite.common.config.schema import Checker
from lavis_lite.common.config.sections import builder_name, model_layer, packaged_dataset
from lavis_lite.common.config.trained import CHECKPOINT_ORIGIN
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry

logger = logging.getLogger(__name__)


def replaced_instructions(
    task: Mapping[str, Any],
    model: Mapping[str, Any],
    datasets: Mapping[str, Mapping[str, Any]],
    types: Mapping[str, str],
    checker: Checker,
) -> dict[str, dict[str, Any]]:
    """Return the `instructions` of each dataset whose template an explicit prompt replaces; log a line for each.

    Raises ConfigError, naming both keys, for two explicit prompts, or one beside explicit instructions.
    """
    prompts = explicit_prompts(task, model, checker)
    replaced = {}
    for name, section in datasets.items():
        builder = section.get("builder", name)
        builder_class = registry.get_builder_class(builder_name(name, section))
        if not prompts or not hasattr(builder_class, "with_prompt"):
            continue
        default = _packaged_instructions(builder_class, builder, types.get(name, "default"))
        instructions = section.get("instructions", default)
        key, found = _first_that_fits(builder_class, instructions, prompts, checker)
        if found is None:
            logger.info(f"datasets.{name} keeps its instructions: {' and '.join(prompts)} cannot replace them")
            continue
        if instructions != default and key == "model.prompt" and _is_of_checkpoint(checker):
            continue
        if instructions != default:
            text = f"{key} is given too, {prompts[key]!r}: set one of them"
            raise checker.error(("datasets", name, "instructions"), text)
        logger.info(f"datasets.{name}: {key} {prompts[key]!r} replaces its instructions")
        replaced[name] = found
    return replaced


def explicit_prompts(task: Mapping[str, Any], model: Mapping[str, Any], checker: Checker) -> dict[str, str]:
    """Return the prompts that the project gives, by their keys, in their order. ConfigError for two of one kind."""
    given = {"run.prompt": task.get("prompt") or "", "model.prompt": _given_model_prompt(model)}
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
    return origin(checker.layers, ("model", "prompt")).startswith(CHECKPOINT_ORIGIN)


def _given_model_prompt(model: Mapping[str, Any]) -> str:
    """Return `model.prompt` if it is another than the model type's, else ""."""
    arch, prompt = model["arch"], model_setting(model, "prompt") or ""
    if not prompt or not getattr(registry.get_model_class(arch), "prompt_begins_captions", False):
        return ""
    own: Mapping[str, Any] = {"arch": arch}
    if model.get("model_type") in zoo.model_zoo.types(arch):
        own = model_layer(arch, model["model_type"]).tree["model"]
    return "" if prompt == model_setting(own, "prompt") else prompt


def _packaged_instructions(builder_class: type, builder: str, kind: str) -> Any:
    """Return the `instructions` of a dataset's type; the builder's default where the type names none."""
    section: Mapping[str, Any] = {}
    if kind in zoo.dataset_zoo.types(builder):
        section = packaged_dataset(builder, kind)
    default = next(field.default for field in fields(builder_class) if field.name == "instructions")
    return section.get("instructions", default)


def _first_that_fits(
    builder_class: Any, instructions: Any, prompts: Mapping[str, str], checker: Checker
) -> tuple[str, dict[str, Any] | None]:
    """Return the first key whose prompt can replace the instructions, and what it makes of them; None if none can."""
    for key, prompt in prompts.items():
        try:
            found = builder_class.with_prompt(instructions, prompt)
        except InputError as error:
            raise checker.error(tuple(key.split(".")), str(error)) from None
        if found is not None:
            return key, found
    return "", None
