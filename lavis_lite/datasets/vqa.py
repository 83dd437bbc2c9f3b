"""Visual question answering: LAVIS's records, the official question and annotation files, A-OKVQA, Visual Genome."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from lavis_lite.common.records import ANSWERS, TRUTHS, Record
from lavis_lite.common.registry import registry
from lavis_lite.datasets.base import BaseBuilder, BaseDataset
from lavis_lite.datasets.readers import Reader, SplitFiles
from lavis_lite.datasets.readers.questions import ANSWER_FIELDS, answers_of, question_fields, read_answer_list


class VQADataset(BaseDataset):
    """Questions in training and evaluation, with `answer_list`; None without such a file."""

    required: tuple[str, ...] = ("image", "question")
    reader = "questions"
    answer_list: list[str] | None

    def load(self, files: SplitFiles, reader: Reader) -> list[Record]:
        self.answer_list = read_answer_list(files.paths)
        return super().load(files, reader)


class VQATrainDataset(VQADataset):
    """Samples {image, text_input, answer, weight, n_answers}: the distinct answers, each weighted by its share; and
    `text_output`, one of them drawn by its share, anew each epoch, for models that learn to write one answer.

    A record whose answer is a single string (Visual Genome) gets the weight `answer_weight`: 1 in LAVIS, 0.2 in BLIP's
    repository.
    """

    required = (*VQADataset.required, "|".join(ANSWER_FIELDS))
    fields = question_fields(ANSWERS)

    def __init__(self, *files: Any, answer_weight: float = 1.0, **options: Any) -> None:
        super().__init__(*files, **options)
        self.answer_weight = answer_weight

    def entries(self, record: Record, index: int) -> dict[str, Any]:
        answers, weights = self.weighted_answers(record)
        return {
            "text_input": self.text_processor(record["question"]),
            "answer": answers,
            "weight": weights,
            "n_answers": len(answers),
            "text_output": answers[0] if len(answers) == 1 else random.choices(answers, weights)[0],
        }

    def weighted_answers(self, record: Record) -> tuple[list[str], list[float]]:
        """Return the distinct answers in first-seen order, and their weights."""
        answers = answers_of(record)
        if isinstance(record.get("answer"), str | int | float):
            return answers, [self.answer_weight]
        counts = Counter(answers)
        return list(counts), [count / len(answers) for count in counts.values()]

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch with `answer` (list) and `weight` (tensor) flat, and how many each has, `n_answers` (B)."""
        batch = super().collater(samples)
        batch["answer"] = [answer for answers in batch["answer"] for answer in answers]
        batch["weight"] = torch.tensor([weight for weights in batch["weight"] for weight in weights])
        batch["n_answers"] = torch.tensor(batch["n_answers"], dtype=torch.long)
        return batch


class VQAEvalDataset(VQADataset):
    """Samples {image, text_input, question_id, instance_id}; `annotation[i]["answers"]` has the answers (list[str])."""

    fields = question_fields(TRUTHS)

    def arrange(self, records: list[Record]) -> list[Record]:
        arranged = []
        for index, record in enumerate(records):
            answers = answers_of({"answers": record.get("answers")}) or answers_of(record)
            arranged.append({"question_id": index, **record} | ({"answers": answers} if answers else {}))
        return arranged

    def entries(self, record: Record, index: int) -> dict[str, Any]:
        return {"text_input": self.text_processor(record["question"]), "question_id": record["question_id"]}


@registry.register_builder("vqa")
@dataclass(kw_only=True)
class VQABuilder(BaseBuilder):
    """Records {image, question, answer (string or list)[, question_id]}, and optionally an answer list file."""

    answer_weight: float = 1.0

    train_dataset = VQATrainDataset
    eval_dataset = VQAEvalDataset
