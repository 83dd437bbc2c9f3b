"""The image sets that InstructBLIP is evaluated on and never saw in training (appendix C): VSR, Hateful Memes, IconQA,
VizWiz, TextVQA, Visual Dialog.

Surprising: yes or no is a choice among several words for each, as in the paper; Visual Dialog's questions get the
question mark that its files leave out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lavis_lite.common.errors import InputError
from lavis_lite.common.records import (
    ANY_TEXT,
    GROUP,
    ID,
    INDEX,
    NAME,
    PATH,
    TEXT,
    TRUTHS,
    WORDS,
    Kind,
    Record,
    RecordCheck,
    shown,
)
from lavis_lite.common.registry import registry
from lavis_lite.datasets.annotations import place_of, read_json, section
from lavis_lite.datasets.base import BlankTexts
from lavis_lite.datasets.instruct import InstructBuilder
from lavis_lite.datasets.instruct_captions import CaptionInstructBuilder, read_with_words
from lavis_lite.datasets.instruct_jsonl import PLACE, placed
from lavis_lite.datasets.vqa import answers_of, question_fields


def needs(*required: str, **fields: Kind) -> RecordCheck:
    """The check of records that must have these fields."""
    return RecordCheck(required=required, fields=fields)


# Yes or no


@dataclass(kw_only=True)
class YesNoBuilder(InstructBuilder):
    """Statements that hold (label 1) or do not (label 0)."""

    verbalizers: list[list[str]] = field(default_factory=lambda: [["no", "false"], ["yes", "true"]])
    """Words for label 0, and for label 1; the likeliest word speaks for its label, the first one is learned."""

    def verdict(self, record: Record, place: tuple[Path, int]) -> Record:
        """All words as candidates, and the label of each as `classes`. ValueError for a label that has no words."""
        classes = tuple(label for label, words in enumerate(self.verbalizers) for _ in words)
        label = record.get("label")
        if label is not None and label not in classes:
            raise InputError(f"{place_of(*place)} has label {label!r}; labels are {', '.join(map(str, set(classes)))}")
        known = {} if label is None else {"label": classes.index(label)}
        return {"candidates": [word for words in self.verbalizers for word in words], "classes": classes, **known}


@registry.register_builder("vsr_classification")
@registry.register_builder("vsr_classification_instruct")
@dataclass(kw_only=True)
class VSRBuilder(YesNoBuilder):
    """Visual Spatial Reasoning: records {image, caption (the statement), label, relation}."""

    def reader(self, paths: Sequence[Path]) -> list[Record]:
        """`statement`; the relation is the question type."""
        check = needs("image", "caption", image=PATH, caption=TEXT, relation=GROUP, label=ID)
        return [
            {"image": record["image"], "statement": record["caption"], "question_type": record.get("relation")}
            | self.verdict(record, place)
            | {PLACE: place}
            for place, record in placed(paths, check)
        ]


@registry.register_builder("hateful_memes")
@dataclass(kw_only=True)
class HatefulMemesBuilder(YesNoBuilder):
    """Hateful Memes: records {id, img, text, label}."""

    def reader(self, paths: Sequence[Path]) -> list[Record]:
        """`text`, the words on the picture."""
        check = needs("id", "img", "text", id=ID, img=PATH, text=ANY_TEXT, label=ID)
        return [
            {"image": record["img"], "text": record["text"], "question_id": record["id"]}
            | self.verdict(record, place)
            | {PLACE: place}
            for place, record in placed(paths, check)
        ]


def read_true_statements(paths: Sequence[Path]) -> list[Record]:
    """VSR's statements that hold, as captions."""
    check = needs("image", "caption", "label", image=PATH, caption=TEXT, label=ID, image_id=ID)
    true = [{**record, PLACE: place} for place, record in placed(paths, check) if record["label"] == 1]
    if not true:
        raise InputError(f"{', '.join(map(str, paths))}: no record has label 1, a statement that holds")
    return true


@registry.register_builder("vsr_caption")
@registry.register_builder("vsr_caption_instruct")
@dataclass(kw_only=True)
class VSRCaptionBuilder(CaptionInstructBuilder):
    """VSR as captioning; see `read_true_statements`."""

    reader = staticmethod(read_true_statements)


# Questions


def read_iconqa(paths: Sequence[Path]) -> list[Record]:
    """IconQA's questions with choices in words: {image, question, choices, answer (an index)}."""
    check = needs("image", "question", "choices", image=PATH, question=TEXT, choices=WORDS, answer=INDEX)
    return [
        {"image": row["image"], "question": row["question"], "candidates": row["choices"], "label": row.get("answer")}
        | {PLACE: place}
        for place, row in placed(paths, check)
    ]


@registry.register_builder("iconqa")
@registry.register_builder("iconqa_instruct")
@dataclass(kw_only=True)
class IconQABuilder(InstructBuilder):
    """IconQA, multi-text-choice; see `read_iconqa`."""

    reader = staticmethod(read_iconqa)


def read_vizwiz(paths: Sequence[Path]) -> list[Record]:
    """VizWiz's own annotations {image, question[, answers, answer_type]}; a question is known by its image.

    An image `VizWiz_<split>_<number>.jpg` lies in the folder `<split>`, as its archives unpack.
    """
    return [
        {
            "image": re.sub(r"^VizWiz_([a-z]+)_", r"\1/\g<0>", record["image"]),
            "question": record["question"],
            "question_id": record["image"],
            "answer": answers_of(record),
            "answer_type": record.get("answer_type"),
            PLACE: place,
        }
        for place, record in placed(paths, needs("image", "question", **question_fields(TRUTHS)))
    ]


@registry.register_builder("vizwiz_vqa")
@dataclass(kw_only=True)
class VizWizBuilder(InstructBuilder):
    """VizWiz; see `read_vizwiz`."""

    blank_texts: BlankTexts = "skip"

    reader = staticmethod(read_vizwiz)


def read_textvqa(paths: Sequence[Path]) -> list[Record]:
    """TextVQA's questions, and, where that file is given too, the words that Rosetta read in each image (`ocr_tokens`).

    The validation images are in the folder of the training images.
    """
    check = needs("image_id", "question", "question_id", **question_fields(TRUTHS), image_id=NAME, ocr_tokens=WORDS)
    return [
        {
            PLACE: row[PLACE],
            "image": f"{'test' if row.get('set_name') == 'test' else 'train'}_images/{row['image_id']}.jpg",
            "question": row["question"],
            "question_id": row["question_id"],
            "answer": answers_of(row),
            **({"ocr_tokens": row["ocr_tokens"]} if "ocr_tokens" in row else {}),
        }
        for row in read_with_words(paths, check)
    ]


@registry.register_builder("textvqa")
@dataclass(kw_only=True)
class TextVQABuilder(InstructBuilder):
    """TextVQA; see `read_textvqa`."""

    blank_texts: BlankTexts = "skip"

    reader = staticmethod(read_textvqa)


# Dialogue


def read_visdial(paths: Sequence[Path]) -> list[Record]:
    """Visual Dialog 1.0: one record for each round of a dialogue, with `history`, `question` and 100 candidates.

    A training file's rounds have no candidates; a test file asks each dialogue's last round only.
    """
    records: list[Record] = []
    for path in paths:
        content = read_json(path)
        data = content.get("data") if isinstance(content, dict) else None
        if not isinstance(data, dict) or not {"questions", "answers", "dialogs"} <= data.keys():
            raise InputError(f'{path}: expected Visual Dialog\'s {{"data": {{"questions", "answers", "dialogs"}}}}')
        for name in ("questions", "answers"):
            problem = needs(name, **{name: WORDS}).problem(data)
            if problem or not isinstance(data[name], list):
                raise InputError(f"{path}{problem or f': {name} must be a list of texts'}")
        split = str(content.get("split", "val")).removesuffix("2018")
        check = needs("image_id", "dialog", image_id=INDEX, caption=ANY_TEXT)
        for number, dialog in enumerate(section(data, "dialogs", path, check)):
            try:
                records += [{**record, PLACE: (f"{path} (dialogs)", number)} for record in rounds(dialog, data, split)]
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{path} (dialogs): record {number}: `dialog` must be a list of rounds with indices of questions "
                    f"and answers, found {shown(dialog['dialog'])} ({type(error).__name__}: {error})"
                ) from error
    return records


def rounds(dialog: Record, data: Record, split: str) -> Iterator[Record]:
    """The rounds that are asked. `history` is written as LAVIS does; `caption`, the sentence that began the dialogue,
    is there for templates that want it.
    """
    folder, history = f"VisualDialog_{split}2018", ""
    for number, turn in enumerate(dialog["dialog"], start=1):
        question = data["questions"][turn["question"]].rstrip("? ") + "?"
        answer = data["answers"][turn["answer"]] if "answer" in turn else None
        record = {
            "image": f"{folder}/{folder}_{dialog['image_id']:012d}.jpg",
            "caption": dialog.get("caption"),
            "history": history.strip(),
            "question": question,
            "question_id": f"{dialog['image_id']}_{number}",
            "answer": answer,
        }
        if split != "train" and "answer_options" in turn:
            options = [data["answers"][index] for index in turn["answer_options"]]
            yield {**record, "candidates": options, "label": turn.get("gt_index")}
        elif split == "train" and answer is not None:
            yield record
        history += f" q: {question} a: {answer}"


@registry.register_builder("visdial")
@registry.register_builder("visdial_instruct")
@dataclass(kw_only=True)
class VisDialBuilder(InstructBuilder):
    """Visual Dialog; see `read_visdial`."""

    reader = staticmethod(read_visdial)
