"""Which prompt a dataset is asked with. Of several sources one counts, and none is put inside another:

1. `run.prompt`; 2. `model.prompt`, where the project gives another than the model type; 3. the dataset's
`instructions`; 4. the model type's prompt, for datasets without instructions. An explicit prompt replaces a template
where it can: one with `{}` where there is a question to put there, one without where captions are learned. Two explicit
ones of one kind are an error.
"""

import logging
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from lavis_lite import zoo
from lavis_lite.config_agreement import setting
from lavis_lite.config_files import load_yaml
from lavis_lite.config_schema import Checker
from lavis_lite.config_sections import model_layer
from lavis_lite.datasets.templates import GAP, Templates, load_templates
from lavis_lite.errors import InputError
from lavis_lite.registry import registry

logger = logging.getLogger(__name__)

ASKED = ("question", "instruction", "statement", "text", "caption")
"""Fields that an instruction is about, the first that a template has: what fills the `{}` of an explicit prompt."""


def replaced_instructions(
    task: Mapping[str, Any],
    model: Mapping[str, Any],
    datasets: Mapping[str, Mapping[str, Any]],
    types: Mapping[str, str],
    checker: Checker,
) -> dict[str, dict[str, Any]]:
    """Return the `instructions` of those datasets of which an explicit prompt replaces the template; log each.

    Raises ConfigError, naming both keys, for two explicit prompts, or one and explicit instructions.
    """
    explicit = {"run.prompt": task.get("prompt") or "", "model.prompt": given_model_prompt(model)}
    prompts = {key: prompt for key, prompt in explicit.items() if prompt}
    _check_one(prompts, checker)
    replaced = {}
    for name, section in datasets.items():
        default = _packaged_instructions(section.get("builder", name), types.get(name, "default"))
        if default is None or not prompts:
            continue
        instructions = section.get("instructions", default)
        templates = load_templates(instructions)
        found = {key: _as_template(prompt, templates, key, name) for key, prompt in prompts.items()}
        key = next((key for key, template in found.items() if template is not None), None)
        if key is None:
            logger.info(f"datasets.{name} keeps its instructions: {' and '.join(prompts)} cannot stand for them")
            continue
        if instructions != default:
            text = f"{key} is given too, {prompts[key]!r}: set one of them"
            raise checker.error(("datasets", name, "instructions"), text)
        logger.info(f"datasets.{name} is asked with {key} {prompts[key]!r} instead of its instructions")
        replaced[name] = {"base": instructions, "train": [found[key]], "eval": found[key]}
    return replaced


def given_model_prompt(model: Mapping[str, Any]) -> str:
    """Return `model.prompt` where the project gives another than the model type has; "" where it does not."""
    prompt = setting(model, "prompt") or ""
    if not prompt or not getattr(registry.get_model_class(model["arch"]), "prompt_begins_captions", False):
        return ""
    arch, own = model["arch"], {"arch": model["arch"]}
    if model.get("model_type") in zoo.model_zoo.types(arch):
        own = model_layer(arch, model["model_type"]).tree["model"]
    return "" if prompt == setting(own, "prompt") else prompt


def _check_one(prompts: Mapping[str, str], checker: Checker) -> None:
    """Raise ConfigError if both keys hold a prompt for questions, or both one for captions, and not the same."""
    kinds = {("{}" in prompt, prompt.strip()) for prompt in prompts.values()}
    if len(kinds) == 2 and len({is_question for is_question, _ in kinds}) == 1:
        run, model = prompts.values()
        raise checker.error(("run", "prompt"), f"{run!r} and model.prompt, {model!r}, are two prompts: set one of them")


def _packaged_instructions(builder: str, kind: str) -> Any:
    """The `instructions` that a dataset's type has; None for a builder that takes none."""
    builder_class = registry.get_builder_class(builder)
    default = next((f.default for f in fields(builder_class) if f.name == "instructions"), MISSING)
    if default is MISSING:
        return None
    if kind not in zoo.dataset_zoo.types(builder):
        return default
    section = load_yaml(zoo.dataset_config_path(builder, kind))["datasets"][builder] or {}
    return section.get("instructions", default)


def _as_template(prompt: str, templates: Templates, key: str, name: str) -> str | None:
    """The prompt with the fields of these templates in its gaps; None if it cannot stand for them."""
    gaps = {gap for template in (*templates.train, templates.eval) for gap in GAP.findall(template)}
    asked = next((field for field in ASKED if field in gaps - {templates.output}), None)
    count = prompt.count("{}")
    if count == 0:
        return prompt if templates.output == "caption" else None
    if asked is None:
        return None
    for names in ((asked,), ("ocr_tokens", asked), (asked, "options")):
        if len(names) == count and gaps >= set(names):
            head, *rest = prompt.split("{}")
            return head + "".join(f"{{{field}}}{part}" for field, part in zip(names, rest, strict=True))
    raise InputError(
        f"{key}={prompt!r} has {count} '{{}}', and datasets.{name} has only {', '.join(sorted(gaps))} for them"
    )
