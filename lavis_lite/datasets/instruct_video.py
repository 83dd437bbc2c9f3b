"""Videos behind instructions: question answering (MSVD-QA, MSRVTT-QA, iVQA) and captioning (MSVD, MSRVTT).

Samples have frames (3,F,H,W) where image sets have an image; `num_frames` says how many.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lavis_lite.common.errors import InputError, UnknownNameError
from lavis_lite.common.records import (
    GROUP,
    ID,
    PATH,
    TRUTHS,
    Record,
    RecordCheck,
)
from lavis_lite.common.registry import registry
from lavis_lite.datasets.annotations import place_of, read_json
from lavis_lite.datasets.base import BaseDataset, BlankTexts
from lavis_lite.datasets.instruct import InstructBuilder
from lavis_lite.datasets.instruct_captions import CaptionInstructBuilder
from lavis_lite.datasets.instruct_jsonl import PLACE, placed
from lavis_lite.datasets.templates import fill
from lavis_lite.datasets.vqa import checked_answers, question_fields

VOCABULARY = "ans2label"
ANSWERS = tuple(f"answer{number}" for number in range(1, 6))


def read_video_questions(paths: Sequence[Path]) -> list[Record]:
    """Records {video, question[, answer, question_id]}."""
    fields = {**question_fields(TRUTHS), "video": PATH}
    return [
        {**row, PLACE: place}
        for place, row in placed(paths, RecordCheck(required=("video", "question"), fields=fields))
    ]


@registry.register_builder("msvd_qa")
@registry.register_builder("msvd_qa_instruct")
@registry.register_builder("msrvtt_qa")
@registry.register_builder("msrvtt_qa_instruct")
@dataclass(kw_only=True)
class VideoQABuilder(InstructBuilder):
    """Questions about videos. As in LAVIS, `build_info.annotations.ans2label` is no split but the answers to rank: a
    JSON object {answer: index}, or a list of answers. The datasets have it as `answer_list` (list[str], or None).
    """

    blank_texts: BlankTexts = "skip"

    reader = staticmethod(read_video_questions)

    def splits(self) -> list[str]:
        """The names of the splits there are."""
        return [name for name in super().splits() if name != VOCABULARY]

    def prepare(self, splits: Iterable[str] | None = None) -> None:
        """As BaseBuilder's, and the answers."""
        wanted = self.splits() if splits is None else list(splits)
        super().prepare([*wanted, VOCABULARY] if VOCABULARY in self._section("annotations") else wanted)

    def _build_split(self, split: str) -> BaseDataset:
        dataset = super()._build_split(split)
        dataset.answer_list = self.answer_list()
        return dataset

    def answer_list(self) -> list[str] | None:
        """The answers in order of their index; None if no file has them. ValueError for a file of another form."""
        if VOCABULARY not in self._section("annotations"):
            return None
        (path,) = self.annotation_paths(VOCABULARY)
        content = read_json(path)
        if isinstance(content, dict) and all(isinstance(index, int) for index in content.values()):
            return checked_answers(sorted(content, key=content.__getitem__), path)
        if isinstance(content, list) and all(isinstance(answer, str) for answer in content):
            return checked_answers(content, path)
        raise InputError(f"{path}: expected the answers to rank, as {{answer: index}} or as a list of texts")


@registry.register_builder("ivqa")
@dataclass(kw_only=True)
class IVQABuilder(InstructBuilder):
    """iVQA's tables: a row a question, with video_id, question, answer1 to answer5 of five annotators, start, end."""

    video_name: str = "{video_id}.mp4"
    """How the clips are called, in the table's columns, e.g. "{video_id}_{start}_{end}.mp4"."""

    def reader(self, paths: Sequence[Path]) -> list[Record]:
        """`answer` is the list of the answers that were given."""
        fields = {"video_id": ID, **question_fields(TRUTHS), **dict.fromkeys(ANSWERS, GROUP)}
        return [
            {
                "video": self.clip(row, place),
                "question": row["question"],
                "answer": [row[name] for name in ANSWERS if row.get(name)],
                PLACE: place,
            }
            for place, row in placed(paths, RecordCheck(required=("video_id", "question"), fields=fields))
        ]

    def clip(self, row: Record, place: tuple[Path, int]) -> str:
        """The name of the row's clip. InputError for a column that the name needs and the row lacks."""
        try:
            return fill(self.video_name, row)
        except UnknownNameError as error:
            raise InputError(f"{place_of(*place)}: video_name: {error}") from error


def read_video_captions(paths: Sequence[Path]) -> list[Record]:
    """Records {video[, caption, image_id]}; a video without an id is known by its name."""
    check = RecordCheck(required=("video",), fields={"video": PATH, "image_id": ID})
    return [
        {**record, "image_id": record["video"] if record.get("image_id") is None else record["image_id"], PLACE: place}
        for place, record in placed(paths, check)
    ]


@registry.register_builder("msvd_caption")
@registry.register_builder("msvd_caption_instruct")
@registry.register_builder("msrvtt_caption")
@registry.register_builder("msrvtt_caption_instruct")
@dataclass(kw_only=True)
class VideoCaptionBuilder(CaptionInstructBuilder):
    """Captions of videos; see `read_video_captions`."""

    reader = staticmethod(read_video_captions)
