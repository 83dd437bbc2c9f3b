"""Visual question answering: LAVIS's records, the official question and annotation files, A-OKVQA, Visual Genome.

A split is one or more files, told apart by content: records, an answer list (a JSON list of strings), the official
questions ({questions: [...]}) and the official annotations ({annotations: [...]}).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lavis_lite.common.errors import InputError
from lavis_lite.common.records import (
    ANSWERS,
    GROUP,
    ID,
    PATH,
    TEXT,
    TRUTHS,
    VALUES,
    Kind,
    Record,
    RecordCheck,
    renaming_advice,
    shown,
)
from lavis_lite.common.registry import registry
from lavis_lite.datasets.annotations import (
    as_list,
    as_records,
    check_records,
    read_json,
    read_records,
    section,
)
from lavis_lite.datasets.base import BaseBuilder, BaseDataset

_ANSWER_FIELDS = ("answer", "answers", "direct_answers")
Sources = list[tuple[str | Path, int]]


def question_fields(answers: Kind) -> dict[str, Kind]:
    """The fields of a question, with the kind of its answers."""
    return {
        **{"image": PATH, "question": TEXT, "question_id": ID, "instance_id": ID},
        **dict.fromkeys(_ANSWER_FIELDS, answers),
        **{"question_type": GROUP, "answer_type": GROUP},
    }


class VQADataset(BaseDataset):
    """What training and evaluation share: `annotation`, and `answer_list` (list[str], or None without such a file)."""

    required = ("image", "question")

    def load(self) -> list[Record]:
        records, self.sources, self.answer_list = load_questions(self.annotation_paths, self.record_check)
        return records


class VQATrainDataset(VQADataset):
    """Samples {image, text_input, answer, weight, n_answers}: the distinct answers, each weighted by its share; and
    `text_output`, one of them drawn by its share, anew each epoch, for models that learn to write one answer.

    A record whose answer is a single string (Visual Genome) gets the weight `answer_weight`: 1 in LAVIS, 0.2 in BLIP's
    repository.
    """

    fields = question_fields(ANSWERS)

    def __init__(
        self,
        annotation_paths: Sequence[str | Path],
        vis_root: str | Path,
        *,
        answer_weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(annotation_paths, vis_root, **options)
        self.answer_weight = answer_weight

    def without_blank(self, records: list[Record]) -> list[Record]:
        """As BaseDataset's. Raises ValueError for a record without any answer to train on."""
        for number, record in enumerate(records):
            given = [record[name] for name in _ANSWER_FIELDS if record.get(name) is not None]
            if not given or (given[0] == [] and self.blank_texts == "error"):
                there = ", ".join(map(repr, record)) + ("" if given else renaming_advice(record, ["answer"]))
                raise InputError(
                    f"{self.place(number)} has no answer to train on (field {' or '.join(map(repr, _ANSWER_FIELDS))}); "
                    f"fields there: {there}"
                )
        self.record_check = replace(self.record_check, required=(*self.required, "|".join(_ANSWER_FIELDS)))
        return super().without_blank(records)

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
        if isinstance(record.get("answer"), str | int | float):
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

    fields = question_fields(TRUTHS)

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


def load_questions(paths: Sequence[Path], check: RecordCheck) -> tuple[list[Record], Sources, list[str] | None]:
    """Records of a split's files, how many are from each, and the answer list; official annotations are merged in by
    question id.
    """
    given: list[tuple[str | Path, list[Record]]] = []
    official: list[tuple[str | Path, list[Record]]] = []
    truths: dict[Any, Record] = {}
    answer_list: list[str] | None = None
    for path in paths:
        content = read_json(path) if path.suffix.lower() == ".json" else read_records(path)
        if isinstance(content, list) and content and all(isinstance(item, str) for item in content):
            answer_list = checked_answers(content, path)
        elif isinstance(content, dict) and "questions" in content:
            official.append((f"{path} (questions)", _official_questions(content, path)))
        elif isinstance(content, dict) and "annotations" in content:
            told = replace(check, required=("question_id", "answers"))
            truths |= {truth["question_id"]: truth for truth in section(content, "annotations", path, told)}
        else:
            given.append((path, check_records(as_records(content, path), check, path)))
    if not given:
        given = [(where, check_records(part, check, where)) for where, part in official]
    if not given:
        raise InputError(f"{', '.join(map(str, paths))}: no file has questions; add the one that does")
    records = [_with_truth(record, truths) for _, part in given for record in part]
    return records, [(where, len(part)) for where, part in given], answer_list


def checked_answers(answers: list[str], path: Path) -> list[str]:
    """The answers to rank; InputError for one that no tokenizer takes."""
    check = RecordCheck(fields={"answers": VALUES})
    problem = check.problem({"answers": answers})
    if problem:
        raise InputError(f"{path}{problem}")
    return answers


def _official_questions(content: dict[str, Any], path: Path) -> list[Record]:
    """The official file's questions, with COCO's path of the image where a question has none."""
    fields = {"question_id": ID, "image_id": ID}
    check = RecordCheck(required=("question_id", "question", "image_id|image"), fields=fields)
    questions = section(content, "questions", path, check)
    subset = content.get("data_subtype")
    if not subset:
        return questions
    return [{"image": _coco_path(subset, q, f"{path} (questions): record {i}"), **q} for i, q in enumerate(questions)]


def _coco_path(subset: str, question: Record, where: str) -> str:
    """The path of the question's image; InputError for an id that is no number of COCO's."""
    number = question.get("image_id") or 0
    if not isinstance(number, int):
        raise InputError(f"{where} has image_id {shown(number)}, expected the number of an image of {subset}")
    return f"{subset}/COCO_{subset}_{number:012d}.jpg"


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
