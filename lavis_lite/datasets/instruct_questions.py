"""Questions, choices and dialogues as instruction data: VQAv2, OK-VQA, A-OKVQA, GQA, Visual Genome, OCR-VQA, SNLI-VE,
ScienceQA, LLaVA-Instruct; and OCR-VQA without instructions.

Question generation (`vqg_*`) is the same records under other templates. Surprising: what A-OKVQA marks as too hard for
a direct answer is trained on, but has no `answers` in evaluation, as its own script doesn't score it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lavis_lite.common.errors import InputError, MissingFileError
from lavis_lite.common.records import (
    ANY_TEXT,
    GROUP,
    ID,
    INDEX,
    NAME,
    PATH,
    TEXT,
    TRUTHS,
    VALUES,
    WORDS,
    Record,
    RecordCheck,
)
from lavis_lite.common.registry import did_you_mean, registry
from lavis_lite.datasets.annotations import place_of, read_json
from lavis_lite.datasets.base import BaseDataset, BlankTexts
from lavis_lite.datasets.instruct import InstructBuilder, InstructDataset
from lavis_lite.datasets.instruct_jsonl import PLACE, placed
from lavis_lite.datasets.vqa import (
    VQABuilder,
    VQAEvalDataset,
    VQATrainDataset,
    answers_of,
    checked_answers,
    load_questions,
    question_fields,
)

logger = logging.getLogger(__name__)

OCR_VQA_SPLITS = {"train": 1, "val": 2, "test": 3}


# Questions


class QuestionDataset(InstructDataset):
    """Questions, and `answer_list` (list[str]), or None without such a file."""

    def load(self) -> list[Record]:
        self.answer_list = read_answer_list(self.annotation_paths)
        return super().load()

    def arrange(self, records: list[Record]) -> list[Record]:
        """A-OKVQA's `difficult_direct_answer` loses its answers where they are judged, unless it is a choice."""
        if self.training or self.templates.output != "answer":
            return super().arrange(records)
        hard = [record.get("difficult_direct_answer") and "candidates" not in record for record in records]
        return super().arrange([r | {"answer": None} if skip else r for r, skip in zip(records, hard, strict=True)])


def read_answer_list(paths: Sequence[Path]) -> list[str] | None:
    """The content of the one file that begins as a JSON list of strings."""
    for path in paths:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            if re.match(r'\s*\[\s*"', file.read(64)):
                content = read_json(path)
                return checked_answers(content, path) if all(isinstance(text, str) for text in content) else None
    return None


def read_questions(paths: Sequence[Path], *, choices: bool = False) -> list[Record]:
    """Records as the builder `vqa` reads them, with `answer`: the list of all answers; or with `choices` as records
    {image, question, choices[, correct_choice_idx]}: the text of the right one is learned.
    """
    required = ("image", "question", "choices") if choices else ("image", "question")
    fields = {**question_fields(TRUTHS), "choices": WORDS, "correct_choice_idx": INDEX}
    records, sources, _ = load_questions(paths, RecordCheck(required=required, fields=fields, allow_blank=True))
    places = [(where, number) for where, count in sources for number in range(count)]
    return [
        {**record, PLACE: place, **(_chosen(record) if choices else {"answer": answers_of(record)})}
        for record, place in zip(records, places, strict=True)
    ]


def _chosen(record: Record) -> Record:
    return {"candidates": record["choices"], "label": record.get("correct_choice_idx")}


@registry.register_builder("coco_vqa_instruct")
@registry.register_builder("vg_vqa_instruct")
@registry.register_builder("ok_vqa_instruct")
@registry.register_builder("aok_vqa_instruct")
@registry.register_builder("gqa_instruct")
@registry.register_builder("vqg_coco_vqa")
@registry.register_builder("vqg_ok_vqa")
@registry.register_builder("vqg_aok_vqa")
@dataclass(kw_only=True)
class QuestionInstructBuilder(InstructBuilder):
    """Records as the builder `vqa` reads them, behind instructions."""

    multiple_choice: bool = False
    """Learn and rank a record's `choices` (A-OKVQA) instead of its answers."""
    blank_texts: BlankTexts = "skip"

    train_dataset = QuestionDataset
    eval_dataset = QuestionDataset

    def reader(self, paths: Sequence[Path]) -> list[Record]:
        return read_questions(paths, choices=self.multiple_choice)


# OCR-VQA


def read_ocr_vqa(paths: Sequence[Path]) -> list[Record]:
    """One record a question of OCR-VQA's {key: {questions, answers, split}}; `image` is the key, without a suffix."""
    fields = {"sample_id": NAME, "questions": WORDS, "answers": VALUES, "split": ID}
    check = RecordCheck(required=("sample_id", "questions", "answers"), fields=fields)
    records: list[Record] = []
    for place, book in placed(paths, check):
        key, pairs = book["sample_id"], (book["questions"], book["answers"])
        if not all(isinstance(texts, list) for texts in pairs):
            raise InputError(f"{place_of(*place)} ({key}): questions and answers must be lists")
        if len(pairs[0]) != len(pairs[1]):
            raise InputError(f"{place[0]}: {key} has {len(pairs[0])} questions and {len(pairs[1])} answers")
        records += [
            {"image": key, "question": question, "answer": answer, "question_id": f"{key}_{number}", PLACE: place}
            | ({"split": book["split"]} if "split" in book else {})
            for number, (question, answer) in enumerate(zip(*pairs, strict=True))
        ]
    return records


class OCRVQAFile(BaseDataset):
    """What takes its split out of the one file and leaves out the questions whose image is not there: books vanish from
    the shop that the images are fetched from. An image may have any suffix.
    """

    answer_list: list[str] | None = None

    def load(self) -> list[Record]:
        where = ", ".join(map(str, self.annotation_paths))
        records = [record for record in read_ocr_vqa(self.annotation_paths) if self.is_mine(record, where)]
        files = {path.stem: path.name for path in self.vis_root.iterdir()}
        self.loaded = [{**record, "image": files[record["image"]]} for record in records if record["image"] in files]
        if not self.loaded:
            raise MissingFileError(f"{self.vis_root} has none of the {self.split} images of {where}")
        if len(self.loaded) < len(records):
            left_out = len(records) - len(self.loaded)
            logger.warning("%s: %d of %d questions have no image and are left out", where, left_out, len(records))
        self.record_check(self.loaded, self.place)
        return self.loaded

    def place(self, number: int) -> str:
        return place_of(*self.loaded[self.kept[number] if self.kept is not None else number][PLACE])

    def arrange(self, records: list[Record]) -> list[Record]:
        arranged = super().arrange(records)
        for record in arranged:
            record.pop(PLACE, None)
        self.loaded = []
        return arranged

    def is_mine(self, record: Record, where: str) -> bool:
        """Whether the record is of this split; all are in a file that names none."""
        if "split" in record and self.split not in OCR_VQA_SPLITS:
            raise InputError(f"{where} has the splits {', '.join(OCR_VQA_SPLITS)}, but no {self.split!r}")
        return "split" not in record or record["split"] == OCR_VQA_SPLITS[self.split]


class OCRVQATrainDataset(OCRVQAFile, VQATrainDataset):
    """Samples as VQATrainDataset's."""


class OCRVQAEvalDataset(OCRVQAFile, VQAEvalDataset):
    """Samples as VQAEvalDataset's."""


class OCRVQAInstructDataset(OCRVQAFile, QuestionDataset):
    """Samples as InstructDataset's."""


@registry.register_builder("ocr_vqa")
@dataclass(kw_only=True)
class OCRVQABuilder(VQABuilder):
    """OCR-VQA as questions, without instructions."""

    train_dataset = OCRVQATrainDataset
    eval_dataset = OCRVQAEvalDataset


@registry.register_builder("ocr_vqa_instruct")
@dataclass(kw_only=True)
class OCRVQAInstructBuilder(InstructBuilder):
    """OCR-VQA behind instructions."""

    blank_texts: BlankTexts = "skip"

    reader = staticmethod(read_ocr_vqa)
    train_dataset = OCRVQAInstructDataset
    eval_dataset = OCRVQAInstructDataset


# Choices


def read_entailment(paths: Sequence[Path], *, classes: dict[str, str]) -> list[Record]:
    """SNLI-VE's {image (a Flickr id), sentence, label} as a choice between the words for the classes."""
    records, words = [], list(classes.values())
    fields = {"image": NAME, "sentence": TEXT, "label": ID}
    for place, row in placed(paths, RecordCheck(required=("image", "sentence", "label"), fields=fields)):
        if row["label"] not in classes:
            raise InputError(f"{place_of(*place)} has label {row['label']!r}. {did_you_mean(row['label'], classes)}")
        image = f"{str(row['image']).removesuffix('.jpg')}.jpg"
        label = list(classes).index(row["label"])
        records.append({"image": image, "caption": row["sentence"], "candidates": words, "label": label, PLACE: place})
    return records


@registry.register_builder("snli_ve_instruct")
@dataclass(kw_only=True)
class EntailmentInstructBuilder(InstructBuilder):
    """SNLI-VE as a choice of words; the templates have the statement as `{caption}`."""

    classes: dict[str, str] = field(default_factory=dict)
    """The label's name to the word that is learned and ranked."""

    def reader(self, paths: Sequence[Path]) -> list[Record]:
        return read_entailment(paths, classes=self.classes)


def read_scienceqa(paths: Sequence[Path], *, split: str, context: Sequence[str], no_context: str) -> list[Record]:
    """ScienceQA's problems that have an image, those of `split` where they say theirs, as choices.

    `context` names the fields that are joined to the context. The official file is {id: problem}, and its images are
    `<split>/<id>/image.png`; in a list of problems `image` is a path.
    """
    records = []
    texts = dict.fromkeys(context, ANY_TEXT)
    fields = {
        "image": replace(PATH, blank=True),
        "split": GROUP,
        "question": TEXT,
        "choices": WORDS,
        "answer": INDEX,
        "question_id": ID,
        **texts,
    }
    for place, row in placed(paths, RecordCheck(required=("question", "choices", "answer"), fields=fields)):
        home = row.get("split", split)
        if not row.get("image") or home != split:
            continue
        text = " ".join(row[name] for name in context if row.get(name)) or no_context
        record = {
            "question": row["question"],
            "context": text,
            "candidates": row["choices"],
            "label": row["answer"],
            PLACE: place,
        }
        if "sample_id" in row:
            known = {"image": f"{home}/{row['sample_id']}/{row['image']}", "question_id": row["sample_id"]}
        else:
            known = {key: row[key] for key in ("image", "question_id") if key in row}
        records.append(record | known)
    if not records:
        raise InputError(f"{', '.join(map(str, paths))}: no problem of the split {split!r} has an image")
    return records


@registry.register_builder("scienceqa")
@registry.register_builder("scienceqa_instruct")
@dataclass(kw_only=True)
class ScienceQABuilder(InstructBuilder):
    """ScienceQA's questions about images, behind instructions."""

    context: list[str] = field(default_factory=lambda: ["hint"])
    """The problem's fields that make its context: hint, lecture."""
    no_context: str = ""
    """What stands in the instruction for the context of a problem without."""

    def dataset_options(self, split: str) -> dict[str, Any]:
        reader = partial(read_scienceqa, split=split, context=self.context, no_context=self.no_context)
        return super().dataset_options(split) | {"reader": reader}


# Dialogues: the user's own form is LLaVA's.
for _name in ("dialogue", "conversation", "detail", "reasoning"):
    registry.register_builder(f"llava150k_{_name}_instruct")(InstructBuilder)
