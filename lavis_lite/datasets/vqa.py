"""Visual question answering: LAVIS's records, the official question and annotation files, A-OKVQA, Visual Genome.

A split is one or more files, told apart by content: records, an answer list (a JSON list of strings), the official
questions ({questions: [...]}) and the official annotations ({annotations: [...]}).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lavis_lite.datasets.annotations import Record, as_list, as_records, read_json, read_records, require_fields
from lavis_lite.datasets.base import BaseBuilder, BaseDataset, identity
from lavis_lite.errors import InputError
from lavis_lite.registry import registry

_ANSWER_FIELDS = ("answer", "answers", "direct_answers")


class VQADataset(BaseDataset):
    """What training and evaluation share: `annotation`, and `answer_list` (list[str], or None without such a file)."""

    required = ("image", "question")

    def load(self) -> list[Record]:
        records, self.answer_list = load_questions(self.annotation_paths, self.required)
        return records


class VQATrainDataset(VQADataset):
    """Samples {image, text_input, answer, weight, n_answers}: the distinct answers, each weighted by its share; and
    `text_output`, one of them drawn by its share, anew each epoch, for models that learn to write one answer.

    A record whose answer is a single string (Visual Genome) gets the weight `answer_weight`: 1 in LAVIS, 0.2 in BLIP's
    repository.
    """

    def __init__(
        self,
        annotation_paths: Sequence[str | Path],
        vis_root: str | Path,
        *,
        split: str,
        vis_processor: Callable[[Any], Any] = identity,
        text_processor: Callable[[str], str] = identity,
        answer_weight: float = 1.0,
    ) -> None:
        super().__init__(
            annotation_paths, vis_root, split=split, vis_processor=vis_processor, text_processor=text_processor
        )
        self.answer_weight = answer_weight
        for index, record in enumerate(self.annotation):
            if not answers_of(record):
                raise InputError(
                    f"{', '.join(map(str, self.annotation_paths))}: record {index} has no answer to train on "
                    f"(field {' or '.join(map(repr, _ANSWER_FIELDS))}); fields there: {', '.join(map(repr, record))}"
                )

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.annotation[index]
        answers, weights = self.weighted_answers(record)
        return {
            "image": self.image(record["image"]),
            "text_input": self.text_processor(record["question"]),
            "answer": answers,
            "weight": weights,
            "n_answers": len(answers),
            "text_output": answers[0] if len(answers) == 1 else random.choices(answers, weights)[0],
            "instance_id": str(index),
        }

    def weighted_answers(self, record: Record) -> tuple[list[str], list[float]]:
        """The distinct answers in first-seen order, and their weights."""
        answers = answers_of(record)
        if isinstance(record.get("answer"), str):
            return answers, [self.answer_weight]
        counts = Counter(answers)
        return list(counts), [count / len(answers) for count in counts.values()]

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """`answer` (list) and `weight` (tensor) are flat over the batch; `n_answers` (B) says how many each has."""
        batch = super().collater(samples)
        batch["answer"] = [answer for answers in batch["answer"] for answer in answers]
        batch["weight"] = torch.tensor([weight for weights in batch["weight"] for weight in weights])
        batch["n_answers"] = torch.tensor(batch["n_answers"], dtype=torch.long)
        return batch


class VQAEvalDataset(VQADataset):
    """Samples {image, text_input, question_id, instance_id}; `annotation[i]["answers"]` has the answers (list[str])."""

    def arrange(self, records: list[Record]) -> list[Record]:
        arranged = []
        for index, record in enumerate(records):
            answers = answers_of({"answers": record.get("answers")}) or answers_of(record)
            extra = {"answers": answers} if answers else {}
            arranged.append({"question_id": index, **record, **extra})
        return arranged

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.annotation[index]
        return {
            "image": self.image(record["image"]),
            "text_input": self.text_processor(record["question"]),
            "question_id": record["question_id"],
            "instance_id": str(index),
        }


def answers_of(record: Record) -> list[str]:
    """The record's answers as strings, whatever the field is called and whether they are strings or {answer: ...}."""
    for name in _ANSWER_FIELDS:
        if record.get(name) is not None:
            return [str(a["answer"] if isinstance(a, dict) else a) for a in as_list(record[name])]
    return []


def load_questions(paths: Sequence[Path], required: Sequence[str]) -> tuple[list[Record], list[str] | None]:
    """Records and answer list of a split's files; official annotations are merged in by question id."""
    records: list[Record] = []
    official: list[Record] = []
    truths: dict[Any, Record] = {}
    answer_list: list[str] | None = None
    for path in paths:
        content = read_json(path) if path.suffix.lower() == ".json" else read_records(path)
        if isinstance(content, list) and content and all(isinstance(item, str) for item in content):
            answer_list = content
        elif isinstance(content, dict) and "questions" in content:
            official += _official_questions(content, path)
        elif isinstance(content, dict) and "annotations" in content:
            require_fields(content["annotations"], ("question_id", "answers"), f"{path} (annotations)")
            truths |= {truth["question_id"]: truth for truth in content["annotations"]}
        else:
            part = as_records(content, path)
            require_fields(part, required, path)
            records += part
    if not records:
        require_fields(official, required, ", ".join(map(str, paths)))
        records = official
    return [_with_truth(record, truths) for record in records], answer_list


def _official_questions(content: dict[str, Any], path: Path) -> list[Record]:
    """The official file's questions, with COCO's path of the image where a question has none."""
    questions = content["questions"]
    require_fields(questions, ("question_id", "question", "image_id|image"), f"{path} (questions)")
    subset = content.get("data_subtype")
    if not subset:
        return questions
    return [{"image": f"{subset}/COCO_{subset}_{q.get('image_id', 0):012d}.jpg", **q} for q in questions]


def _with_truth(record: Record, truths: dict[Any, Record]) -> Record:
    truth = truths.get(record.get("question_id"))
    if truth is None:
        return record
    return record | {key: truth[key] for key in ("answers", "question_type", "answer_type") if key in truth}


@registry.register_builder("coco_vqa")
@registry.register_builder("vg_vqa")
@registry.register_builder("ok_vqa")
@registry.register_builder("aok_vqa")
@registry.register_builder("gqa")
@registry.register_builder("vqa")
@dataclass(kw_only=True)
class VQABuilder(BaseBuilder):
    """Records {image, question, answer (string or list)[, question_id]}, and optionally an answer list file."""

    answer_weight: float = 1.0

    train_dataset = VQATrainDataset
    eval_dataset = VQAEvalDataset

    def dataset_options(self, split: str) -> dict[str, Any]:
        return {"answer_weight": self.answer_weight} if split == "train" else {}
