"""Captions as instruction data: COCO, Flickr30K, Visual Genome, the web sets, TextCaps; and TextCaps, CapFilt without.

In training every caption is a sample. In evaluation every image is one, with its captions as references, so that the
captioning task scores it. Surprising: TextCaps's test images are kept, though they have no captions (LAVIS drops them).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavis_lite.datasets.annotations import Record, as_list, as_records, read_json, require_fields
from lavis_lite.datasets.base import BaseDataset
from lavis_lite.datasets.caption import (
    CaptionBuilder,
    CaptionEvalDataset,
    CaptionTrainDataset,
    expand_captions,
    load_captions,
    merge_images,
)
from lavis_lite.datasets.instruct import InstructBuilder, InstructDataset
from lavis_lite.datasets.pairs import PairsBuilder
from lavis_lite.errors import InputError
from lavis_lite.registry import registry

logger = logging.getLogger(__name__)


def learnable(records: list[Record], output: str, paths: Sequence[Path]) -> list[Record]:
    """The records without those whose text to learn is empty, counted in the log; all of them if every one is."""
    kept = [record for record in records if any(text != "" for text in as_list(record.get(output)))]
    if 0 < len(kept) < len(records):
        left_out, where = len(records) - len(kept), ", ".join(map(str, paths))
        logger.warning("%s: %d of %d records have an empty %s and are left out", where, left_out, len(records), output)
    return kept or records


class CaptionInstructDataset(InstructDataset):
    """Evaluation samples have `image_id`, and `prompt`, the instruction once more, for the captioning task."""

    def arrange(self, records: list[Record]) -> list[Record]:
        if not self.training:
            return super().arrange(merge_images(records))
        require_fields(records, ("caption",), ", ".join(map(str, self.annotation_paths)))
        return super().arrange(learnable(expand_captions(records), "caption", self.annotation_paths))

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        if self.training:
            return sample
        return sample | {"image_id": self.annotation[index]["image_id"], "prompt": sample["text_input"]}

    references = CaptionEvalDataset.references


def read_captions(paths: Sequence[Path]) -> list[Record]:
    """Records {image, caption}; in evaluation the caption may be absent."""
    return load_captions(list(paths), ("image|file_name",))


def read_textcaps(paths: Sequence[Path]) -> list[Record]:
    """TextCaps's records {image, image_id[, caption, ocr_tokens]}; the images are in one folder, named by their ids."""
    kept = {"caption_str": "caption", "ocr_tokens": "ocr_tokens"}
    return [
        {"image": f"{row['image_id']}.jpg", "image_id": row["image_id"]}
        | {ours: row[key] for key, ours in kept.items() if row.get(key) is not None}
        for row in read_with_words(paths, ("image_id",))
    ]


def read_with_words(paths: Sequence[Path], required: Sequence[str]) -> list[Record]:
    """The rows of files `{"data": [...]}` (TextCaps, TextVQA), with `ocr_tokens` if the words in the images, a file of
    the same form, are among the paths. Raises ValueError for other content.
    """
    rows: list[Record] = []
    words: dict[Any, list[str]] | None = None
    for path in paths:
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("data"), list):
            raise InputError(f'{path}: expected {{"data": [...]}}, as TextCaps and TextVQA are published')
        part = as_records(content["data"], path)
        if part and "ocr_tokens" in part[0]:
            require_fields(part, ("image_id", "ocr_tokens"), path)
            words = (words or {}) | {row["image_id"]: row["ocr_tokens"] for row in part}
        else:
            require_fields(part, required, path)
            rows += part
    return rows if words is None else [{**row, "ocr_tokens": words.get(row["image_id"], [])} for row in rows]


class TextCapsDataset(BaseDataset):
    """What reads TextCaps's files for the datasets without instructions."""

    def load(self) -> list[Record]:
        records = read_textcaps(self.annotation_paths)
        require_fields(records, self.required, ", ".join(map(str, self.annotation_paths)))
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

    reader = staticmethod(read_captions)
    train_dataset = CaptionInstructDataset
    eval_dataset = CaptionInstructDataset


@registry.register_builder("textcaps_caption_instruct")
@dataclass(kw_only=True)
class TextCapsInstructBuilder(CaptionInstructBuilder):
    """TextCaps behind instructions, which may name the words in the image: `{ocr_tokens}`."""

    reader = staticmethod(read_textcaps)


registry.register_builder("capfilt14m")(PairsBuilder)
