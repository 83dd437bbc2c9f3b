"""Dialogues about images whose every question comes with candidate answers (Visual Dialog's discriminative setting)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from lavis_lite.common.bounds import check_number
from lavis_lite.common.errors import InputError
from lavis_lite.common.records import Record
from lavis_lite.common.registry import registry
from lavis_lite.datasets.instruct import InstructBuilder, InstructDataset

MAX_CANDIDATES = 10_000


class DialogDataset(InstructDataset):
    """Samples {image, caption, text_input (the dialogue up to the question), candidates, instance_id}.

    In training the candidates are the right answer and `num_negatives` others, drawn anew each time, and `label` is the
    index of the right one, 0. In evaluation they are all, and there is `question_id`.
    """

    reader = "records"
    required = ("candidates",)

    def __init__(self, *files: Any, num_negatives: int = 1, **options: Any) -> None:
        self.num_negatives: int = check_number("num_negatives", num_negatives, 1, MAX_CANDIDATES)
        super().__init__(*files, **options)

    def check(self, record: Record, first: Record) -> None:
        super().check(record, first)
        if self.training and len(record["candidates"]) <= self.num_negatives:
            found = f"has {len(record['candidates'])} candidates, and num_negatives={self.num_negatives} of them"
            raise InputError(f"{found} must be wrong: lower num_negatives")

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample, record = super().__getitem__(index), self.annotation[index]
        caption = record.get("caption") or ""
        sample["caption"] = self.text_processor(self.choose(caption) if isinstance(caption, list) else caption)
        if not self.training:
            return sample
        del sample["text_output"]
        right, options = record["label"], record["candidates"]
        wrong = random.sample([number for number in range(len(options)) if number != right], self.num_negatives)
        return sample | {"candidates": [options[number] for number in (right, *wrong)], "label": 0}


@registry.register_builder("visual_dialog")
@dataclass(kw_only=True)
class DialogBuilder(InstructBuilder):
    """Visual Dialog's files, or records {image, caption, history, question, candidates, label}."""

    instructions: str | dict[str, Any] = "visdial_dialog"
    num_negatives: int = 1
    """Wrong answers beside the right one in a training sample."""

    train_dataset = DialogDataset
    eval_dataset = DialogDataset
