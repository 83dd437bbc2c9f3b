"""`shapes` as instruction data, one dataset a task group, for mixtures and for groups that are held out.

The annotations of a group are added to the folder of `shapes` when it's first used, from the scenes that are there. A
group's answers are balanced for each kind of question, so that the text alone tells nothing.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lavis_lite.common.errors import InputError
from lavis_lite.common.records import Record
from lavis_lite.common.registry import registry
from lavis_lite.common.wording import lettered
from lavis_lite.datasets.annotations import as_list, load_annotations, read_json
from lavis_lite.datasets.base import BaseBuilder
from lavis_lite.datasets.instruct import InstructBuilder
from lavis_lite.datasets.shapes.build import image_name, not_written
from lavis_lite.datasets.shapes.builders import ShapesBuilder
from lavis_lite.datasets.shapes.groups import Ask, GroupAsker
from lavis_lite.datasets.shapes.scene import Scene, ShapesConfig
from lavis_lite.datasets.templates import with_prompt

FORMAT = 1  # goes up when the same config gives other instructions
PER_IMAGE = 2  # instructions of a group
TEMPLATES = {
    "caption": "shapes_caption",
    "color": "shapes_question",
    "count": "shapes_question",
    "relation": "shapes_question",
    "yesno": "shapes_question",
    "options": "shapes_options",
    "statement": "shapes_statement",
    "dialogue": "shapes_dialogue",
}
"""The groups, and their packaged templates."""


@dataclass(kw_only=True)
class ShapesInstructBuilder(ShapesBuilder, InstructBuilder):
    """One task group of `shapes`: registered as shapes_instruct_<group>."""

    instructions: str | dict[str, Any] = ""
    """The group's own templates, unless others are named."""

    group: ClassVar[str]
    reader = staticmethod(load_annotations)
    prepare = BaseBuilder.prepare

    @classmethod
    def with_prompt(cls, instructions: str | Path | Mapping[str, Any], prompt: str) -> dict[str, Any] | None:
        """As `templates.with_prompt`, for the group's own templates where none are named."""
        return with_prompt(instructions or TEMPLATES[cls.group], prompt)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.instructions = self.instructions or TEMPLATES[self.group]

    def annotation_paths(self, split: str) -> list[Path]:
        if self.group == "caption":
            return [self.folder() / "annotations" / f"caption_{split}.json"]
        return [ensure_instructions(self, self.folder(), self.group, split)]


for _group in TEMPLATES:
    _name = f"ShapesInstruct{_group.capitalize()}Builder"
    _builder = type(_name, (ShapesInstructBuilder,), {"group": _group, "__module__": __name__})
    registry.register_builder(f"shapes_instruct_{_group}")(_builder)


def ensure_instructions(config: ShapesConfig, folder: Path, group: str, split: str) -> Path:
    """The group's annotation file in the built folder of the config, written if it isn't there.

    Raises ValueError if the config's scenes allow no such instruction.
    """
    path = folder / "annotations" / f"instruct_{group}_{split}_{FORMAT}.json"
    if path.is_file():
        return path
    scenes = {int(key): Scene.from_dict(scene) for key, scene in read_json(folder / f"scenes_{split}.json").items()}
    records = make_records(config, scenes, group, split)
    if not records:
        raise InputError(f"shapes: no scene of {split} allows instructions of the group {group}; raise max_objects")
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        aside.write_text(json.dumps(records, separators=(",", ":")), encoding="utf-8")
        return aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise not_written(path, error) from error


def make_records(config: ShapesConfig, scenes: dict[int, Scene], group: str, split: str) -> list[Record]:
    """The group's records, up to PER_IMAGE for each scene (by image id)."""
    asker, balance = GroupAsker(config), Balance()
    records = []
    for index, (image_id, scene) in enumerate(scenes.items()):
        rng = random.Random(f"{config.seed}/instruct {group}/{split}/{index}")
        for number, ask in enumerate(balance.choose(asker.ask(group, scene, rng))):
            shared = {"image": image_name(split, index), "question_id": image_id * 100 + number, **ask.fields}
            chosen = {"answer": ask.candidates[ask.label], "candidates": list(ask.candidates), "label": ask.label}
            records.append(shared | chosen)
    return records


class Balance:
    """Chooses instructions so that, among those of one kind, no answer is much more frequent than another."""

    def __init__(self) -> None:
        self.chosen: defaultdict[str, Counter[int]] = defaultdict(Counter)

    def choose(self, asks: list[Ask]) -> list[Ask]:
        """Up to PER_IMAGE of them, those with the rarest answers so far; none that would tip the balance."""
        found: list[Ask] = []
        while asks and len(found) < PER_IMAGE:
            ask = min(asks, key=lambda ask: self.chosen[ask.kind][ask.label])
            asks.remove(ask)
            if self.allows(ask):
                self.chosen[ask.kind][ask.label] += 1
                found.append(ask)
        return found

    def allows(self, ask: Ask) -> bool:
        """Whether one more would leave the answer at most a tenth (and three) ahead of the rarest of its kind."""
        balanced = range(len(ask.candidates)) if ask.balanced is None else ask.balanced
        counts = self.chosen[ask.kind]
        return ask.label in balanced and counts[ask.label] <= 1.1 * min(counts[label] for label in balanced) + 2


def spoken(record: Record) -> tuple[str, str | None]:
    """A record of any `shapes` dataset as text alone: (caption, None), or (everything that is asked, its answer).

    Of several captions or answers it's the most frequent one.
    """
    if record.get("caption") is not None:
        return _most_frequent(record["caption"]), None
    parts = [record.get("history"), record.get("question")]
    if record.get("statement"):
        parts.append(f"true or false? {record['statement']}")
    if record.get("options"):
        parts.append(lettered(record["options"]))
    return " ".join(part for part in parts if part), _most_frequent(record["answer"])


def _most_frequent(texts: str | list[str]) -> str:
    return Counter(as_list(texts)).most_common(1)[0][0]
