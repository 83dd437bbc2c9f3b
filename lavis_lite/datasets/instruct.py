"""Instruction data: an image or a video, an instruction, and the text to answer with.

A reader turns every annotation format into the same records (see `InstructDataset`); templates turn a record into an
instruction. So question generation is visual question answering with other templates. A record that cannot become a
sample is an error at loading.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from lavis_lite.common.bounds import one_of
from lavis_lite.common.errors import InputError, SettingError
from lavis_lite.common.prompts import joined_words, lettered, letters
from lavis_lite.common.records import ANSWERS, GROUP, ID, IMAGES, PATH, TEXTS, TRUTHS, VALUES, WORDS, Kind, Record
from lavis_lite.common.registry import did_you_mean, registry
from lavis_lite.common.video_io import ShortClips
from lavis_lite.datasets.annotations import as_list
from lavis_lite.datasets.base import BaseBuilder, BaseDataset
from lavis_lite.datasets.few_shot import FewShot, files_of, joined
from lavis_lite.datasets.streams import StreamDataset
from lavis_lite.datasets.templates import PLACEHOLDER, Templates, fill, load_templates, with_prompt
from lavis_lite.datasets.visual import VisualDataset, visual_field

AnswerChoice = Literal["drawn", "most_frequent"]
CandidateFormat = Literal["text", "letter_text", "letter"]
CLEANED = ("question", "caption")
TEXT_FIELDS = (*CLEANED, "statement", "instruction")
"""Fields of texts. The text processor cleans the first two, whether in the instruction or learned; no others are."""


class InstructDataset(VisualDataset):
    """Samples {image (3,H,W) or (3,F,H,W), text_input (the instruction), prompt, text_output, instance_id}.

    `prompt` is "{}": the instruction is complete, and no other prompt is put around it.
    A record has `image` (a path, or a list of paths, shown one after another as frames) or `video` (a path), the fields
    that the templates' placeholders name, and in `templates.output` what is learned: a text, or a list of which one is;
    without it, the candidate that `label` points to. In evaluation a sample has no text_output, but `question_id`, and,
    if the records have them, `candidates` (list[str]). The truth is in `annotation[i]`: `answers` (list[str]), `label`
    (index into candidates), perhaps `classes` (one per candidate, equal where they mean the same).
    """

    reader = "instructions"
    answer_list: list[str] | None

    def __init__(
        self,
        *files: Any,
        templates: Templates,
        training: bool,
        answer_choice: AnswerChoice,
        candidate_format: CandidateFormat,
        answer_list: list[str] | None = None,
        **options: Any,
    ) -> None:
        self.templates, self.training, self.answer_list = templates, training, answer_list
        self.few_shot: FewShot | None = None
        self.answer_choice = one_of("answer_choice", answer_choice, get_args(AnswerChoice))
        self.candidate_format = one_of("candidate_format", candidate_format, get_args(CandidateFormat))
        self.used = templates.train if training else (templates.eval,)
        self.placeholders = {name: text for text in self.used for name in PLACEHOLDER.findall(text)}
        learned = templates.output if templates.output in CLEANED else f"{templates.output}|candidates"
        asked = tuple(name for name in TEXT_FIELDS if name in self.placeholders)
        self.required = (*self.required, *asked, *((learned,) if training else ()))
        self.fields = instruct_fields(self.placeholders, templates.output, training=training)
        super().__init__(*files, **options)

    def arrange(self, records: list[Record]) -> list[Record]:
        """Give each record `answers` (list[str], perhaps empty in evaluation) and `question_id`.

        Raises InputError, naming the file and the record, for one that cannot become a sample.
        """
        for index, record in enumerate(records):
            if record.get("question_id") is None:
                record["question_id"] = index
            try:
                fill_answers_and_label(record, self.templates.output)
                self.check(record, records[0])
                if self.candidate_format != "text" and record.get("candidates"):
                    letter_candidates(record, with_text=self.candidate_format == "letter_text")
            except ValueError as error:
                raise InputError(f"{self.place(index)} {error}") from None
        return records

    def check(self, record: Record, first: Record) -> None:
        """Raise InputError for a missing field, and for a record that cannot be in a batch with the first one."""
        kind, its_kind = visual_field(record), visual_field(first)
        if record.get(kind) in (None, []):
            raise missing_field(record, kind, " or 'video'")
        if kind != its_kind:
            raise InputError(f"has a field {kind!r}, the first record {its_kind!r}: make two datasets of them")
        if _num_images(record) != _num_images(first):
            own, others = (
                f"a list of {count}" if (count := _num_images(one)) else "no list" for one in (record, first)
            )
            raise InputError(f"has {own} in its field 'image', the first record {others}: make two datasets of them")
        if self.training and not record["answers"]:
            raise missing_field(record, self.templates.output, ", which is what is learned")
        if not self.training and (record.get("candidates") is None) != (first.get("candidates") is None):
            raise InputError("and the first record differ in having 'candidates': in a split all have them, or none")
        for name, template in self.placeholders.items():
            if self.value(record, name) in (None, []):
                raise missing_field(record, name, f" for the template {template!r}")

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.annotation[index]
        fields = self.values(record)
        text, visuals = fill(random.choice(self.used) if self.training else self.used[0], fields), [self.visual(record)]
        if self.few_shot is not None:
            examples = self.few_shot.draw(index, files_of(record))
            text = "".join(map(self.example, examples)) + text
            visuals = [*map(self.visual, examples if self.few_shot.has_images else ()), *visuals]
        sample = {
            "image": visuals[0] if len(visuals) == 1 else joined(visuals, str(self.annotation_paths[0])),
            "text_input": text,
            "prompt": "{}",
            "instance_id": str(index),
        }
        if self.training:
            return sample | {"text_output": fields[self.templates.output]}
        kept = ("question_id", "candidates")
        return sample | {key: record[key] for key in kept if record.get(key) is not None}

    def instruction(self, record: Record) -> str:
        """Return the instruction of an evaluation's record, without the examples before it."""
        return fill(self.used[0], self.values(record))

    def example(self, record: Record) -> str:
        """Return the text of a record as an example before an instruction."""
        assert self.few_shot is not None
        fields = {"instruction": self.instruction(record), "answer": self.choose(record["answers"])}
        return fill(self.few_shot.template, fields)

    def values(self, record: Record) -> dict[str, Any]:
        """Return the placeholders' fields and the learned one: one of several texts, cleaned if it is in CLEANED."""
        fields = {name: self.value(record, name) for name in self.placeholders}
        if self.training:
            fields[self.templates.output] = record["answers"]
        for key, value in fields.items():
            text = self.choose(value) if isinstance(value, list) else value
            fields[key] = self.text_processor(str(text)) if key in CLEANED else text
        return fields

    def value(self, record: Record, key: str) -> Any:
        """Return a record's field as a template takes it: options (or candidates) lettered, words joined."""
        value = record.get(key)
        if key == "options" and not value:
            value = record.get("candidates")
        if not isinstance(value, list):
            return value
        return {"options": lettered, "ocr_tokens": joined_words}.get(key, list)(value)

    def choose(self, texts: list[Any]) -> Any:
        """Return one of several texts: in training drawn by its share, in evaluation the most frequent one."""
        drawn = self.training and self.answer_choice == "drawn"
        return random.choice(texts) if drawn else Counter(texts).most_common(1)[0][0]


def instruct_fields(placeholders: Iterable[str], output: str, *, training: bool) -> dict[str, Kind]:
    """Return the kinds of the fields that templates name, of the learned one, and of those that samples keep."""
    return {
        **dict.fromkeys(placeholders, VALUES),
        **{"image": IMAGES, "video": PATH, "question_id": ID, "image_id": ID, "instance_id": ID},
        **dict.fromkeys(("group", "question_type", "answer_type"), GROUP),
        **{"candidates": VALUES, "options": VALUES, "ocr_tokens": WORDS},
        output: ANSWERS if training else TRUTHS,
        **dict.fromkeys(TEXT_FIELDS, TEXTS),
    }


def _num_images(record: Record) -> int | None:
    """Return the number of a record's images; None for a single one that is not in a list."""
    return len(record["image"]) if isinstance(record.get("image"), list) else None


def missing_field(record: Record, field: str, why: str) -> InputError:
    """Return the error about a field that is missing or empty, with the fields that are there."""
    given = {key: value for key, value in record.items() if key != "answers"}
    if field not in given:
        return InputError(f"has no field {field!r}{why}; fields there: {', '.join(map(repr, given))}")
    return InputError(f"has {'null' if record[field] is None else 'nothing'} in its field {field!r}{why}")


def fill_answers_and_label(record: Record, output: str) -> None:
    """Give the record `answers`, the texts of its field `output`; of a choice, also the label that follows from the
    answers, or the answers that follow from the label.

    Raises InputError for invalid candidates, and for a label or an answer that is not one of them.
    """
    texts = [text.get("answer") if isinstance(text, dict) else text for text in as_list(record.get(output))]
    answers = [str(text) for text in texts if text is not None and str(text).strip()]
    record["answers"], candidates, label = answers, record.get("candidates"), record.get("label")
    if candidates is None:
        return
    check_candidates(candidates, record.get("classes"))
    right = [candidates.index(text) for text in answers if text in candidates]
    if answers and not right:
        raise InputError(f"has {answers[0]!r} in its field {output!r}, which is not one of {candidates!r}")
    if label is None:
        record["label"] = right[0] if right else None
    elif type(label) is not int or not 0 <= label < len(candidates):
        raise InputError(f"has the label {label!r}, which is not an index into its {len(candidates)} candidates")
    elif answers and candidates[label] not in answers:
        raise InputError(f"has the label {label}, but {answers[0]!r} in its field {output!r} is candidate {right[0]}")
    else:
        record["answers"] = answers or [candidates[label]]


def check_candidates(candidates: Any, classes: Any) -> None:
    """Raise InputError unless candidates are a list of texts, with one class for each if there are classes."""
    if not isinstance(candidates, list) or not candidates or not all(isinstance(c, str) and c for c in candidates):
        raise InputError(f"must have a list of texts in 'candidates', at least one, none empty; got {candidates!r}")
    if classes is None:
        return
    kinds = set(map(type, classes)) if isinstance(classes, list | tuple) else set()
    if kinds not in ({int}, {str}) or len(classes) != len(candidates):
        raise InputError(
            f"must have a number, or a name, for each of its {len(candidates)} candidates in 'classes'; got {classes!r}"
        )


def letter_candidates(record: Record, *, with_text: bool) -> None:
    """Make the record's candidates "(a) red", or "(a)", and its answers the right one of them; `options` keep the
    texts. Raises InputError for more candidates than letters.
    """
    texts, marks = record["candidates"], letters(len(record["candidates"]))
    record["options"] = record.get("options") or texts
    record["candidates"] = [f"{a} {text}" for a, text in zip(marks, texts, strict=True)] if with_text else marks
    record["answers"] = [] if record["label"] is None else [record["candidates"][record["label"]]]


@registry.register_builder("instruct")
@dataclass(kw_only=True)
class InstructBuilder(BaseBuilder):
    """Records of images or videos with instructions; the default reader is of the user's own, `read_instructions`."""

    instructions: str | dict[str, Any] = "plain"
    """Packaged templates, a YAML file, or a mapping such as `{output: answer, train: [...], eval: ...}`."""
    num_frames: int = 4
    """Frames of a video, sampled uniformly."""
    short_clips: ShortClips = "repeat"
    """For a video with fewer frames: repeat them, or treat it as an unreadable sample."""
    answer_choice: AnswerChoice = "drawn"
    """Which of several right answers is learned."""
    candidate_format: CandidateFormat = "text"
    """The form of candidates that is learned and ranked: "red", "(a) red" or "(a)". InstructBLIP's is not published."""

    few_shot_num: int = 0
    """Examples before the instruction of each evaluation sample."""
    few_shot_split: str = "train"
    """Split that they are drawn from."""
    few_shot_seed: int = 42
    few_shot_template: str = "{instruction} {answer}\n\n"
    """Text of an example."""
    few_shot_images: bool = False
    """Show the examples' images too, before the sample's own; for language models that read several."""

    with_prompt = staticmethod(with_prompt)
    train_dataset = InstructDataset
    eval_dataset = InstructDataset

    def dataset_options(self, split: str) -> dict[str, Any]:
        return {"templates": load_templates(self.instructions), "training": split == "train"}

    @cached_property
    def few_shot(self) -> FewShot | None:
        """The examples of evaluation samples; None without."""
        if self.few_shot_num == 0:
            return None
        split = self.few_shot_split
        if split not in self.splits():
            raise SettingError("few_shot_split", f"no split {split!r}. {did_you_mean(split, self.splits())}")
        self.prepare([split])
        source = super()._build_split(split)
        if not isinstance(source, InstructDataset):
            raise SettingError("few_shot_split", f"examples are drawn from a table of records; {split!r} is a stream")
        return FewShot.of(
            source.annotation,
            split=split,
            num=self.few_shot_num,
            template=self.few_shot_template,
            seed=self.few_shot_seed,
            has_images=self.few_shot_images,
        )

    def _build_split(self, split: str) -> BaseDataset | StreamDataset:
        dataset = super()._build_split(split)
        if split != "train" and isinstance(dataset, InstructDataset):
            dataset.few_shot = self.few_shot
        return dataset
