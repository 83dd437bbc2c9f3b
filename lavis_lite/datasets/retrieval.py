"""Image-text and video-text retrieval: training pairs with image ids; evaluation sets, a gallery of all images (or
videos) and all texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lavis_lite.common.records import PATH, Record
from lavis_lite.common.registry import registry
from lavis_lite.common.video_io import ShortClips
from lavis_lite.datasets.base import BaseBuilder
from lavis_lite.datasets.caption import CaptionDataset, CaptionTrainDataset, merge_images
from lavis_lite.datasets.readers.captions import CAPTION_FIELDS
from lavis_lite.datasets.visual import VisualDataset, check_one_kind

REQUIRED = ("image|file_name|video", "caption")
FIELDS = {**CAPTION_FIELDS, "video": PATH}


class RetrievalTrainDataset(VisualDataset, CaptionTrainDataset):
    """Samples {image, text_input, image_id (index in first-seen order), instance_id}."""

    required = REQUIRED
    fields = FIELDS

    def arrange(self, records: list[Record]) -> list[Record]:
        check_one_kind(records, self.place)
        return super().arrange(records)


class RetrievalEvalDataset(VisualDataset, CaptionDataset):
    """Items {image, index, image_id, instance_id}, one per image; all texts are in `text` (processed), in order.

    `img2txt[i]` lists the texts of image i, `txt2img[t]` is the image of text t.
    """

    reads_tables = False
    required = REQUIRED
    fields = FIELDS

    def arrange(self, records: list[Record]) -> list[Record]:
        check_one_kind(records, self.place)
        images = merge_images(records, self.place, root=self.vis_root)
        self.text: list[str] = []
        self.img2txt: list[list[int]] = []
        self.txt2img: list[int] = []
        for index, record in enumerate(images):
            start = len(self.text)
            self.text += [self.text_processor(caption) for caption in record["caption"]]
            self.img2txt.append(list(range(start, len(self.text))))
            self.txt2img += [index] * (len(self.text) - start)
        return images

    def keep_first(self, number: int) -> None:
        """Leave out all images but the first `number`, with their texts."""
        super().keep_first(number)
        self.img2txt = self.img2txt[:number]
        num_texts = sum(map(len, self.img2txt))
        self.text, self.txt2img = self.text[:num_texts], self.txt2img[:num_texts]

    def entries(self, record: Record, index: int) -> dict[str, Any]:
        return {"index": index, "image_id": record["image_id"]}


@registry.register_builder("retrieval")
@dataclass(kw_only=True)
class RetrievalBuilder(BaseBuilder):
    """Records {image or video, caption[, image_id]}; one per caption, or one per image with a list of captions."""

    num_frames: int = 4
    """Frames of a video, sampled uniformly."""
    short_clips: ShortClips = "repeat"
    """For a video with fewer frames: repeat them, or treat it as an unreadable sample."""

    train_dataset = RetrievalTrainDataset
    eval_dataset = RetrievalEvalDataset
