"""Instruction templates as data: `configs/prompts/<name>.yaml`, or a user's file in the same form.

A template's placeholders are names of a record's fields: "Question: {question} Short answer:". In training one template
is drawn at random for each sample (InstructBLIP, section 2.2); in evaluation there is one fixed template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis_lite.common.bounds import one_of
from lavis_lite.common.config.files import load_yaml
from lavis_lite.common.config.zoo import CONFIGS
from lavis_lite.common.errors import InputError, MissingFileError, UnknownNameError
from lavis_lite.common.registry import did_you_mean

PLACEHOLDER = re.compile(r"\{(\w+)\}")
KEYS = ("source", "base", "output", "train", "eval")
PROMPTS = CONFIGS / "prompts"
SUBJECTS = ("question", "instruction", "statement", "text", "caption")
"""The fields that instructions are about; the first that a template names fills the `{}` of an explicit prompt."""


@dataclass(frozen=True, kw_only=True)
class Templates:
    """The instructions of one kind of task, and the field of a record that is learned (`output`)."""

    train: tuple[str, ...]
    eval: str
    output: str = "answer"
    source: str = ""


def fill(template: str, fields: Mapping[str, Any]) -> str:
    """Return the template with every `{name}` replaced by that field; other braces, also in the fields, are text.

    Raises KeyError, with the fields that are there, for a field that is None or missing.
    """

    def value(found: re.Match[str]) -> str:
        if fields.get(found[1]) is None:
            there = ", ".join(key for key, value in fields.items() if value is not None)
            raise UnknownNameError(f"the template {template!r} needs the field {found[1]!r}; the record has {there}")
        return str(fields[found[1]])

    return PLACEHOLDER.sub(value, template)


def load_templates(name: str | Path | Mapping[str, Any]) -> Templates:
    """Return templates by their packaged name, from a YAML file, or given as a mapping.

    Keys: `train` (a list) and `eval`, of which one alone is used for both; `output`, the field that is learned;
    `source`, where they are from; `base`, a name or file whose keys are the defaults.
    Raises FileNotFoundError for an unknown name, InputError for another form.
    """
    content = dict(name) if isinstance(name, Mapping) else load_yaml(_file(name))
    where = "instructions" if isinstance(name, Mapping) else str(name)
    for key in content:
        one_of(f"{where}: key", key, KEYS)
    base = content.pop("base", None)
    return _templates(content if base is None else vars(load_templates(base)) | content, where)


def with_prompt(instructions: str | Path | Mapping[str, Any], prompt: str) -> dict[str, Any] | None:
    """Return instructions of which an explicit prompt is the one template; None if it cannot replace them.

    Its `{}` takes the raw question; of two, the first takes the words in the image or the second the options. Without
    `{}` it replaces the templates of captions. Raises ValueError for more placeholders than there are fields.
    """
    templates = load_templates(instructions)
    names = set(PLACEHOLDER.findall("".join((*templates.train, templates.eval))))
    subject = next((field for field in SUBJECTS if field in names - {templates.output}), None)
    count = prompt.count("{}")

    def one_template(template: str) -> dict[str, Any]:
        return {"base": instructions, "train": [template], "eval": template}

    if count == 0:
        return one_template(prompt) if templates.output == "caption" else None
    if subject is None:
        return None
    for wanted in ((subject,), ("ocr_tokens", subject), (subject, "options")):
        if len(wanted) == count and names >= set(wanted):
            head, *rest = prompt.split("{}")
            parts = (f"{{{name}}}{part}" for name, part in zip(wanted, rest, strict=True))
            return one_template(head + "".join(parts))
    raise InputError(f"{prompt!r} has {count} '{{}}', and instructions with {', '.join(sorted(names))} fill only some")


def _file(name: str | Path) -> Path:
    """Return the YAML of that packaged name, or the file itself."""
    path = Path(name)
    known = sorted(p.stem for p in PROMPTS.glob("*.yaml"))
    if str(name) in known:
        return PROMPTS / f"{name}.yaml"
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        advice = f"{did_you_mean(str(name), known)} Or give the path of a YAML file with output, train and eval"
        raise MissingFileError(f"no instruction templates {str(name)!r}. {advice}")
    return path


def _templates(content: Mapping[str, Any], where: str) -> Templates:
    """Return the keys of one file as Templates. Raises InputError for an invalid template."""
    train, default = content.get("train"), content.get("eval")
    train = [default] if train is None and default is not None else train
    if not isinstance(train, list | tuple) or not train:
        raise InputError(f"{where}: `train` must be a list of at least one template, got {train!r}")
    default = train[0] if default is None else default
    for template in (*train, default):
        if not isinstance(template, str):
            raise InputError(f'{where}: a template must be a text; put it into quotes, as "{{question}}": {template!r}')
        if "{}" in template:
            raise InputError(f"{where}: placeholders are named, as {{question}}, not '{{}}': {template!r}")
    output = content.get("output", "answer")
    if any(output in PLACEHOLDER.findall(template) for template in (*train, default)):
        raise InputError(f"{where}: the field {output!r} is learned, so no template may contain it")
    return Templates(train=tuple(train), eval=default, output=output, source=str(content.get("source", "")))
