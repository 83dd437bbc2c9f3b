"""`shapes` as instruction data, one file per task group, for mixtures and for groups that are held out.

The annotations of a group are added to the folder of `shapes` when it is first used, from the scenes that are there. A
group's answers are balanced for each kind of question, so the text alone says nothing about the answer.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter, defaultdict
from pathlib import Path

from lavis_lite.common.errors import InputError
from lavis_lite.common.prompts import lettered
from lavis_lite.common.records import Record
from lavis_lite.datasets.annotations import as_list, read_json
from lavis_lite.datasets.shapes.build import image_name, not_written
from lavis_lite.datasets.shapes.groups import Instruction, InstructionGenerator
from lavis_lite.datasets.shapes.scene import Scene, ShapesConfig

FORMAT = 1  # goes up when the same config gives other instructions
PER_IMAGE = 2
"""Instructions of a group per image."""


def ensure_instructions(config: ShapesConfig, folder: Path, group: str, split: str) -> Path:
    """Return the group's annotation file in the built folder of the config; write it if it is missing.

    Raises InputError if the config's scenes allow no such instruction.
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
    """Return the group's records, up to PER_IMAGE for each scene (by image id)."""
    generator, balance = InstructionGenerator(config), Balance()
    records: list[Record] = []
    for index, (image_id, scene) in enumerate(scenes.items()):
        rng = random.Random(f"{config.seed}/instruct {group}/{split}/{index}")
        for number, made in enumerate(balance.choose(generator.make(group, scene, rng))):
            shared = {"image": image_name(split, index), "question_id": image_id * 100 + number, **made.fields}
            answer = {"answer": made.candidates[made.label], "candidates": list(made.candidates), "label": made.label}
            records.append(shared | answer)
    return records


class Balance:
    """Chooses instructions so that, among those of one kind, no answer is much more frequent than another."""

    def __init__(self) -> None:
        self.chosen: defaultdict[str, Counter[int]] = defaultdict(Counter)

    def choose(self, made: list[Instruction]) -> list[Instruction]:
        """Return up to PER_IMAGE of them, those with the rarest answers so far, as far as the balance allows."""
        found: list[Instruction] = []
        while made and len(found) < PER_IMAGE:
            rarest = min(made, key=lambda one: self.chosen[one.kind][one.label])
            made.remove(rarest)
            if self.allows(rarest):
                self.chosen[rarest.kind][rarest.label] += 1
                found.append(rarest)
        return found

    def allows(self, one: Instruction) -> bool:
        """Return whether one more leaves its answer at most a tenth (and three) ahead of the rarest of its kind."""
        balanced = range(len(one.candidates)) if one.balanced is None else one.balanced
        counts = self.chosen[one.kind]
        return one.label in balanced and counts[one.label] <= 1.1 * min(counts[label] for label in balanced) + 2


def as_plain_text(record: Record) -> tuple[str, str | None]:
    """Return a record of any `shapes` dataset as text alone: (caption, None), or (question with its context, answer).

    Of several captions or answers it is the most frequent one.
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
