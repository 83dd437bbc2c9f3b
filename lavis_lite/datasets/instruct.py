"""Instruction data: an image or a video, an instruction, and what to answer.

Every annotation format becomes the same records (see `InstructDataset`); what makes an instruction of a record is a
file of templates. So a dataset of the paper is a reader and a name of templates, and question generation is visual
question answering with other templates. A record that cannot become a sample is an error at loading.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from lavis_lite.common.errors import InputError
from lavis_lite.common.frames import ShortClips, check_num_frames, check_short_clips
from lavis_lite.common.records import (
    ANSWERS,
    GROUP,
    ID,
    PATH,
    TEXTS,
    TRUTHS,
    VALUES,
    WORDS,
    Kind,
    Record,
    renaming_advice,
)
from lavis_lite.common.registry import did_you_mean, registry
from lavis_lite.common.wording import joined_words, lettered, letters
from lavis_lite.datasets.annotations import as_list, place_of
from lavis_lite.datasets.base import BaseBuilder, BaseDataset
from lavis_lite.datasets.instruct_jsonl import PLACE, read_instructions
from lavis_lite.datasets.templates import (
    GAP,
    Templates,
    load_templates,
    with_prompt,
)
from lavis_lite.datasets.video import read_frames

Reader = Callable[[Sequence[Path]], list[Record]]
AnswerChoice = Literal["drawn", "most_frequent"]
CandidateFormat = Literal["text", "letter_text", "letter"]
CLEANED = ("question", "caption")
"""Fields that the text processor cleans, whether they are asked or learned; all others are taken as they are."""


class InstructDataset(BaseDataset):
    """Samples {image (3,H,W) or (3,F,H,W), text_input (the instruction), prompt, text_output, instance_id}.

    `prompt` is "{}": the instruction is complete, and no other prompt goes around it.
    A record has `image` or `video` (a path), the fields that the templates' gaps name, and in `templates.output` what
    is learned: a text, or a list of which one is; without it, the candidate that `label` points to. In evaluation a
    sample has no text_output, but `question_id`, and, if the records have them, `candidates` (list[str]). The truth
    stays in `annotation[i]`: `answers` (list[str]), `label` (index into candidates), perhaps `classes` (one
    for each candidate, equal where they mean the same).
    """

    def __init__(
        self,
        annotation_paths: Sequence[str | Path],
        vis_root: str | Path,
        *,
        reader: Reader,
        templates: Templates,
        training: bool,
        num_frames: int,
        short_clips: ShortClips = "repeat",
        answer_choice: AnswerChoice,
        candidate_format: CandidateFormat,
        **options: Any,
    ) -> None:
        for name, value, known in (
            ("answer_choice", answer_choice, get_args(AnswerChoice)),
            ("candidate_format", candidate_format, get_args(CandidateFormat)),
        ):
            if value not in known:
                raise InputError(f"no {name} {value!r}. {did_you_mean(value, known)}")
        self.reader, self.templates, self.training = reader, templates, training
        self.num_frames, self.short_clips = check_num_frames(num_frames), check_short_clips(short_clips)
        self.answer_choice, self.candidate_format = answer_choice, candidate_format
        self.gaps = {gap: text for text in templates.used(training=training) for gap in GAP.findall(text)}
        learned = templates.output if templates.output in CLEANED else f"{templates.output}|candidates"
        self.required = (learned,) if training else ()
        self.fields = instruct_fields(self.gaps, templates.output, training=training)
        self.loaded: list[Record] = []
        super().__init__(annotation_paths, vis_root, **options)

    def load(self) -> list[Record]:
        self.loaded = self.reader(self.annotation_paths)
        self.record_check(self.loaded, self.place)
        return self.loaded

    def place(self, number: int) -> str:
        number = self.kept[number] if self.kept is not None else number
        place = self.loaded[number].get(PLACE)
        return place_of(*place) if place else f"{', '.join(map(str, self.annotation_paths))}: record {number}"

    def arrange(self, records: list[Record]) -> list[Record]:
        """Each record with `answers` (list[str], perhaps empty in evaluation) and `question_id`.

        Raises ValueError, naming the file and the record, for one that cannot become a sample.
        """
        self.loaded = []
        arranged: list[Record] = []
        for index, record in enumerate(records):
            if record.get("question_id") is None:
                record["question_id"] = index
            place = record.pop(PLACE, None)
            try:
                settle(record, self.templates.output)
                self.check(record, arranged[0] if arranged else record)
                if self.candidate_format != "text" and record.get("candidates"):
                    put_letters(record, with_text=self.candidate_format == "letter_text")
            except ValueError as error:
                paths = ", ".join(map(str, self.annotation_paths))
                raise InputError(f"{place_of(*place) if place else f'{paths}: record {index}'} {error}") from None
            arranged.append(record)
        return arranged

    def check(self, record: Record, first: Record) -> None:
        """Raise ValueError for what the record lacks, and for what no batch can hold beside the first one."""
        kind, its_kind = seen_as(record), seen_as(first)
        if record.get(kind) is None:
            raise lacking(record, kind, " or 'video'")
        if kind != its_kind:
            raise InputError(
                f"has a field {kind!r}, the first record {its_kind!r}: no batch holds both, make two datasets"
            )
        if self.training and not record["answers"]:
            raise lacking(record, self.templates.output, ", which is what is learned")
        if not self.training and (record.get("candidates") is None) != (first.get("candidates") is None):
            raise InputError("and the first record differ in having 'candidates': in a split all have them, or none")
        for gap, template in self.gaps.items():
            if self.value(record, gap) in (None, []):
                raise lacking(record, gap, f" for the template {template!r}")

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.annotation[index]
        fields = self.values(record)
        sample = {
            "image": self.seen(record),
            "text_input": self.templates.instruction(fields, training=self.training),
            "prompt": "{}",
            "instance_id": str(index),
        }
        if self.training:
            return sample | {"text_output": fields[self.templates.output]}
        chosen = {} if record.get("candidates") is None else {"candidates": record["candidates"]}
        return sample | {"question_id": record["question_id"]} | chosen

    def files_of(self, record: Record) -> list[str]:
        return [record[seen_as(record)]]

    def seen(self, record: Record) -> Any:
        """The record's image, or its video's frames."""
        if seen_as(record) == "image":
            return self.image(record["image"])
        path = self.vis_root / record["video"]
        return read_frames(path, self.num_frames, self.vis_processor, short_clips=self.short_clips)

    def values(self, record: Record) -> dict[str, Any]:
        """What the templates' gaps take and what is learned: one of several texts, cleaned if it's to be."""
        fields = {gap: self.value(record, gap) for gap in self.gaps}
        if self.training:
            fields[self.templates.output] = record["answers"]
        for key, value in fields.items():
            text = self.choose(value) if isinstance(value, list) else value
            fields[key] = self.text_processor(str(text)) if key in CLEANED else text
        return fields

    def value(self, record: Record, key: str) -> Any:
        """A record's field as it stands in a template: options (or candidates) lettered, words joined."""
        value = record.get(key)
        if key == "options" and not value:
            value = record.get("candidates")
        if not isinstance(value, list):
            return value
        return {"options": lettered, "ocr_tokens": joined_words}.get(key, list)(value)

    def choose(self, texts: list[Any]) -> Any:
        """One of several texts: in training drawn by its share, in evaluation the one that most gave."""
        drawn = self.training and self.answer_choice == "drawn"
        return random.choice(texts) if drawn else Counter(texts).most_common(1)[0][0]


def instruct_fields(gaps: Iterable[str], output: str, *, training: bool) -> dict[str, Kind]:
    """The kinds of the fields that templates name, of the one that is learned, and of those that samples keep."""
    return {
        **dict.fromkeys(gaps, VALUES),
        **{"image": PATH, "video": PATH, "question_id": ID, "image_id": ID, "instance_id": ID},
        **dict.fromkeys(("group", "question_type", "answer_type"), GROUP),
        **{"candidates": VALUES, "options": VALUES, "ocr_tokens": WORDS},
        output: ANSWERS if training else TRUTHS,
        **dict.fromkeys(CLEANED, TEXTS),
    }


def seen_as(record: Record) -> str:
    """Which of the record's fields is looked at: "video" if it has one, else "image"."""
    return "image" if record.get("video") is None else "video"


def lacking(record: Record, field: str, why: str) -> InputError:
    """The error about a field that is missing or has nothing in it, with those that are there."""
    given = {key: value for key, value in record.items() if key != "answers"}
    if field not in given:
        there = ", ".join(map(repr, given))
        return InputError(f"has no field {field!r}{why}; fields there: {there}{renaming_advice(given, [field])}")
    return InputError(f"has {'null' if record[field] is None else 'nothing'} in its field {field!r}{why}")


def settle(record: Record, output: str) -> None:
    """Give the record `answers`, the texts of its field `output`, and, if it's a choice, each of label and answers that
    follows from the other.

    Raises ValueError for candidates that leave nothing to choose, and for a label or an answer that is none of them.
    """
    answers = [str(text) for text in as_list(record.get(output)) if text is not None and str(text).strip()]
    if any(isinstance(text, dict | list) for text in as_list(record.get(output))):
        raise InputError(f"must have a text, or a list of texts, in its field {output!r}, got {record[output]!r}")
    record["answers"], candidates, label = answers, record.get("candidates"), record.get("label")
    if candidates is None:
        return
    check_candidates(candidates, record.get("classes"))
    right = [candidates.index(text) for text in answers if text in candidates]
    if answers and not right:
        raise InputError(f"has {answers[0]!r} in its field {output!r}, which is none of the candidates {candidates!r}")
    if label is None:
        record["label"] = right[0] if right else None
    elif type(label) is not int or not 0 <= label < len(candidates):
        raise InputError(f"has the label {label!r}, which is no index into its {len(candidates)} candidates")
    elif answers and candidates[label] not in answers:
        raise InputError(f"has the label {label}, but {answers[0]!r} in its field {output!r} is candidate {right[0]}")
    else:
        record["answers"] = answers or [candidates[label]]


def check_candidates(candidates: Any, classes: Any) -> None:
    """Raise ValueError for what is no list of texts, and for classes that do not sort them."""
    if not isinstance(candidates, list) or not candidates or not all(isinstance(c, str) and c for c in candidates):
        raise InputError(f"must have a list of texts in 'candidates', at least one, none empty; got {candidates!r}")
    if classes is None:
        return
    kinds = set(map(type, classes)) if isinstance(classes, list | tuple) else set()
    if kinds not in ({int}, {str}) or len(classes) != len(candidates):
        raise InputError(
            f"must have a number, or a name, for each of its {len(candidates)} candidates in 'classes'; got {classes!r}"
        )


def put_letters(record: Record, *, with_text: bool) -> None:
    """Make the record's candidates "(a) red", or "(a)", and its answers the right one of them; `options` keep the
    texts. ValueError for more than there are letters.
    """
    texts, marks = record["candidates"], letters(len(record["candidates"]))
    record["options"] = record.get("options") or texts
    record["candidates"] = [f"{a} {text}" for a, text in zip(marks, texts, strict=True)] if with_text else marks
    record["answers"] = [] if record["label"] is None else [record["candidates"][record["label"]]]


@registry.register_builder("instruct")
@dataclass(kw_only=True)
class InstructBuilder(BaseBuilder):
    """The user's own instruction data: see `read_instructions`. Subclasses read other formats."""

    instructions: str | dict[str, Any] = "plain"
    """Packaged templates, a YAML file, or a mapping such as `{output: answer, train: [...], eval: ...}`."""
    num_frames: int = 4
    """Frames of a video, sampled uniformly."""
    short_clips: ShortClips = "repeat"
    """What becomes of a video with fewer frames: they are repeated, or it is an unreadable sample."""
    answer_choice: AnswerChoice = "drawn"
    """Which of several right answers is learned."""
    candidate_format: CandidateFormat = "text"
    """What is learned and ranked of a candidate: "red", "(a) red" or "(a)". InstructBLIP's is not published."""

    reader: ClassVar[Reader] = staticmethod(read_instructions)
    with_prompt = staticmethod(with_prompt)
    train_dataset = InstructDataset
    eval_dataset = InstructDataset

    def dataset_options(self, split: str) -> dict[str, Any]:
        return {
            "reader": self.reader,
            "templates": load_templates(self.instructions),
            "training": split == "train",
            "num_frames": self.num_frames,
            "short_clips": self.short_clips,
            "answer_choice": self.answer_choice,
            "candidate_format": self.candidate_format,
        }
