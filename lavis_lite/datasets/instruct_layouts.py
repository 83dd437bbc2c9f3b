"""Layouts of instruction data with samples or settings of their own: captions, questions, classes, ScienceQA, iVQA.

Samples of videos have frames (3,F,H,W) where those of images have an image; `num_frames` says how many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lavis_lite.common.errors import InputError
from lavis_lite.common.records import Record
from lavis_lite.common.registry import did_you_mean, registry
from lavis_lite.datasets.annotations import place_of
from lavis_lite.datasets.base import BlankTexts
from lavis_lite.datasets.caption import expand_captions, merge_images, references_of
from lavis_lite.datasets.instruct import InstructBuilder, InstructDataset
from lavis_lite.datasets.readers import Reader, SplitFiles, find_reader
from lavis_lite.datasets.readers.choices import read_scienceqa
from lavis_lite.datasets.readers.files import PLACE
from lavis_lite.datasets.readers.questions import read_answer_list, read_ivqa, read_vocabulary

VOCABULARY = "ans2label"


# Captions


class CaptionInstructDataset(InstructDataset):
    """In training every caption is a sample, in evaluation every image, with its captions as references.

    Evaluation samples have `image_id`, and `prompt`, the instruction once more, for the captioning task.
    """

    reader = "captions"
    required = ("image|file_name|video",)

    def arrange(self, records: list[Record]) -> list[Record]:
        if self.training:
            return super().arrange(expand_captions(records))
        return super().arrange(merge_images(records, self.place, root=self.vis_root))

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        if self.training:
            return sample
        return sample | {"image_id": self.annotation[index]["image_id"], "prompt": sample["text_input"]}

    def references(self) -> dict[Any, list[str]]:
        """Return the captions of each image id; images without any are left out."""
        return references_of(self.annotation)


@registry.register_builder("caption_instruct")
@dataclass(kw_only=True)
class CaptionInstructBuilder(InstructBuilder):
    """Records {image, caption[, image_id]} as `caption` reads them, with instructions."""

    instructions: str | dict[str, Any] = "caption"
    blank_texts: BlankTexts = "skip"

    train_dataset = CaptionInstructDataset
    eval_dataset = CaptionInstructDataset


# Questions


class VQAInstructDataset(InstructDataset):
    """Questions, with `answer_list`, the answers to rank; None without such a file."""

    reader = "answered_questions"

    def load(self, files: SplitFiles, reader: Reader) -> list[Record]:
        self.answer_list = self.answer_list or read_answer_list(files.paths)
        return super().load(files, reader)

    def arrange(self, records: list[Record]) -> list[Record]:
        """Arrange records without the answers that A-OKVQA marks `difficult_direct_answer`, which its own script does
        not score. Choices and training keep them.
        """
        for record in records if not self.training and self.templates.output == "answer" else ():
            if record.get("difficult_direct_answer") and "candidates" not in record:
                record["answer"] = None
        return super().arrange(records)


@registry.register_builder("vqa_instruct")
@dataclass(kw_only=True)
class VQAInstructBuilder(InstructBuilder):
    """Records as `vqa` reads them, with instructions.

    As in LAVIS, `build_info.annotations.ans2label` is not a split but the answers to rank: a JSON object
    {answer: index}, or a list of answers.
    """

    instructions: str | dict[str, Any] = "vqa"
    blank_texts: BlankTexts = "skip"
    multiple_choice: bool = False
    """Learn and rank a record's `choices` (A-OKVQA) instead of its answers."""

    train_dataset = VQAInstructDataset
    eval_dataset = VQAInstructDataset

    def make_reader(self) -> Reader | None:
        return find_reader("question_choices") if self.multiple_choice else super().make_reader()

    def splits(self) -> list[str]:
        return [name for name in super().splits() if name != VOCABULARY]

    def prepare(self, splits: Iterable[str] | None = None) -> None:
        wanted = self.splits() if splits is None else list(splits)
        super().prepare([*wanted, VOCABULARY] if VOCABULARY in super().splits() else wanted)

    def dataset_options(self, split: str) -> dict[str, Any]:
        options = super().dataset_options(split)
        if VOCABULARY in super().splits():
            (path,) = self.annotation_paths(VOCABULARY)
            options["answer_list"] = read_vocabulary(path)
        return options


# Classes


@registry.register_builder("classification_instruct")
@dataclass(kw_only=True)
class ClassificationInstructBuilder(InstructBuilder):
    """Records with a `label`, as a choice of words: statements that are true or not (VSR), classes (SNLI-VE)."""

    verbalizers: list[list[str]] = field(default_factory=lambda: [["no", "false"], ["yes", "true"]])
    """Words for label 0, and for label 1; the likeliest word counts for its label, the first one is learned."""
    classes: dict[str, str] = field(default_factory=dict)
    """The label's name to the one word that is learned and ranked; replaces `verbalizers`."""

    def make_reader(self) -> Reader:
        read = super().make_reader() or find_reader("records")
        return lambda files: self.worded(read(files))

    def worded(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield the records with all words as `candidates`, `label` the index of the right one, and the `classes` of
        the words. Raises InputError for a label that has no words.
        """
        words: dict[Any, list[str]] = {label: [word] for label, word in self.classes.items()}
        words = words or dict(enumerate(self.verbalizers))
        labels = tuple(label for label, texts in words.items() for _ in texts)
        choice: Record = {"candidates": [word for texts in words.values() for word in texts]}
        choice |= {} if self.classes else {"classes": labels}
        for record in records:
            label = record.pop("label", None)
            if label is not None and label not in labels:
                where = place_of(*record[PLACE]) if PLACE in record else "a record"
                near = f" {did_you_mean(label, self.classes)}" if self.classes else ""
                raise InputError(f"{where} has label {label!r}; labels are {', '.join(map(str, words))}.{near}")
            yield record | choice | ({} if label is None else {"label": labels.index(label)})


# Settings of a reader


@registry.register_builder("scienceqa")
@dataclass(kw_only=True)
class ScienceQABuilder(InstructBuilder):
    """ScienceQA's questions about images."""

    context: list[str] = field(default_factory=lambda: ["hint"])
    """The problem's fields that make its context: hint, lecture."""
    no_context: str = ""
    """The context of a problem without any."""

    def make_reader(self) -> Reader:
        return super().make_reader() or partial(read_scienceqa, context=self.context, no_context=self.no_context)


@registry.register_builder("ivqa")
@dataclass(kw_only=True)
class IVQABuilder(InstructBuilder):
    """iVQA's tables: a row per question, with video_id, question, answer1 to answer5 of five annotators, start, end."""

    video_name: str = "{video_id}.mp4"
    """How the clips are called, in the table's columns, e.g. "{video_id}_{start}_{end}.mp4"."""

    def make_reader(self) -> Reader:
        return super().make_reader() or partial(read_ivqa, video_name=self.video_name)
