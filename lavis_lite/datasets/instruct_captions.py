"""Captions as instruction data: COCO, Flickr30K, Visual Genome, the web sets, TextCaps; and TextCaps, CapFilt without.

In training every caption is a sample. In evaluation every image is one, with its captions as references, so that the
captioning task scores it. Surprising: TextCaps's test images are kept, though they have no captions (LAVIS drops them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lavis_lite.common.errors import InputError
from lavis_lite.common.records import (
    NAME,
    TEXTS,
    WORDS,
    Record,
    RecordCheck,
)
from lavis_lite.common.registry import registry
from lavis_lite.datasets.annotations import as_records, check_records, read_json
from lavis_lite.datasets.base import BaseDataset, BlankTexts
from lavis_lite.datasets.caption import (
    CAPTION_FIELDS,
    CaptionBuilder,
    CaptionEvalDataset,
    CaptionTrainDataset,
    caption_records,
    expand_captions,
    merge_images,
)
from lavis_lite.datasets.instruct import InstructBuilder, InstructDataset
from lavis_lite.datasets.instruct_jsonl import PLACE
from lavis_lite.datasets.pairs import PairsBuilder

TEXTCAPS_FIELDS = {"image_id": NAME, "caption_str": TEXTS, "ocr_tokens": WORDS}


class CaptionInstructDataset(InstructDataset):
    """Evaluation samples have `image_id`, and `prompt`, the instruction once more, for the captioning task."""

    def arrange(self, records: list[Record]) -> list[Record]:
        if self.training:
            return super().arrange(expand_captions(records))
        return super().arrange(merge_images(records, self.place, root=self.vis_root))

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        if self.training:
            return sample
        return sample | {"image_id": self.annotation[index]["image_id"], "prompt": sample["text_input"]}

    references = CaptionEvalDataset.references


def read_captions(paths: Sequence[Path]) -> list[Record]:
    """Records {image, caption}; in evaluation the caption may be absent."""
    check = RecordCheck(required=("image|file_name",), fields=CAPTION_FIELDS, allow_blank=True)
    files = [caption_records(path, check) for path in paths]
    return [{**record, PLACE: (where, n)} for where, part in files for n, record in enumerate(part)]


def read_textcaps(paths: Sequence[Path], check: RecordCheck | None = None) -> list[Record]:
    """TextCaps's records {image, image_id[, caption, ocr_tokens]}; the images are in one folder, named by their ids."""
    kept = {"caption_str": "caption", "ocr_tokens": "ocr_tokens"}
    check = check or RecordCheck(required=("image_id",), fields=TEXTCAPS_FIELDS, allow_blank=True)
    return [
        {"image": f"{row['image_id']}.jpg", "image_id": row["image_id"], PLACE: row[PLACE]}
        | {ours: row[key] for key, ours in kept.items() if row.get(key) is not None}
        for row in read_with_words(paths, check)
    ]


def read_with_words(paths: Sequence[Path], check: RecordCheck) -> list[Record]:
    """The rows of files `{"data": [...]}` (TextCaps, TextVQA), with `ocr_tokens` if the words in the images, a file of
    the same form, are among the paths. Raises ValueError for other content.
    """
    rows: list[Record] = []
    words: dict[Any, list[str]] | None = None
    of_words = RecordCheck(required=("image_id", "ocr_tokens"), fields=TEXTCAPS_FIELDS)
    for path in paths:
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("data"), list):
            raise InputError(f'{path}: expected {{"data": [...]}}, as TextCaps and TextVQA are published')
        where = f"{path} (data)"
        part = as_records(content["data"], where)
        if "ocr_tokens" in part[0]:
            check_records(part, of_words, where)
            words = (words or {}) | {row["image_id"]: row["ocr_tokens"] for row in part}
        else:
            check_records(part, check, where)
            rows += [{**row, PLACE: (where, number)} for number, row in enumerate(part)]
    return rows if words is None else [{**row, "ocr_tokens": words.get(row["image_id"], [])} for row in rows]


class TextCapsDataset(BaseDataset):
    """What reads TextCaps's files for the datasets without instructions."""

    def load(self) -> list[Record]:
        names = ["caption_str" if name == "caption" else name for name in self.required if name != "image|file_name"]
        check = replace(self.record_check, required=("image_id", *names), fields=TEXTCAPS_FIELDS)
        records = read_textcaps(self.annotation_paths, check)
        for record in records:
            path, number = record.pop(PLACE)
            if not self.sources or self.sources[-1][0] != path:
                self.sources.append((path, 0))
            self.sources[-1] = (path, number + 1)
        return records


class TextCapsTrainDataset(TextCapsDataset, CaptionTrainDataset):
    """Samples as CaptionTrainDataset's."""


class TextCapsEvalDataset(TextCapsDataset, CaptionEvalDataset):
    """Samples as CaptionEvalDataset's."""


@registry.register_builder("textcaps_caption")
@dataclass(kw_only=True)
class TextCapsBuilder(CaptionBuilder):
    """TextCaps as captions, without instructions."""

    train_dataset = TextCapsTrainDataset
    eval_dataset = TextCapsEvalDataset


@registry.register_builder("coco_caption_instruct")
@registry.register_builder("flickr30k_caption_instruct")
@registry.register_builder("vg_caption_instruct")
@registry.register_builder("sbu_caption_instruct")
@registry.register_builder("conceptual_caption_3m_instruct")
@registry.register_builder("conceptual_caption_12m_instruct")
@registry.register_builder("capfilt14m_instruct")
@dataclass(kw_only=True)
class CaptionInstructBuilder(InstructBuilder):
    """Records {image, caption[, image_id]} as the builder `caption` reads them, behind instructions."""

    blank_texts: BlankTexts = "skip"

    reader = staticmethod(read_captions)
    train_dataset = CaptionInstructDataset
    eval_dataset = CaptionInstructDataset


@registry.register_builder("textcaps_caption_instruct")
@dataclass(kw_only=True)
class TextCapsInstructBuilder(CaptionInstructBuilder):
    """TextCaps behind instructions, which may name the words in the image: `{ocr_tokens}`."""

    reader = staticmethod(read_textcaps)


registry.register_builder("capfilt14m")(PairsBuilder)
