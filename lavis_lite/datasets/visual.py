"""The base of datasets whose records are of images or of videos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from torch import Tensor

from lavis_lite.common.bounds import one_of
from lavis_lite.common.errors import InputError
from lavis_lite.common.records import Record, StoredImage
from lavis_lite.common.video_io import ShortClips, check_num_frames
from lavis_lite.datasets.annotations import as_list
from lavis_lite.datasets.base import BaseDataset
from lavis_lite.datasets.few_shot import joined
from lavis_lite.datasets.video import ReadsVideos, read_frames, record_part


class VisualDataset(BaseDataset):
    """Records with `image` or `video` (a path). The sample's `image` is the image (3,H,W), or `num_frames` frames of
    the video (3,F,H,W).
    """

    def __init__(self, *files: Any, num_frames: int = 4, short_clips: ShortClips = "repeat", **options: Any) -> None:
        self.num_frames: int = check_num_frames(num_frames)
        self.short_clips: ShortClips = one_of("short_clips", short_clips, get_args(ShortClips))
        super().__init__(*files, **options)

    def files_of(self, record: Record) -> list[str]:
        return [file for file in as_list(record[visual_field(record)]) if isinstance(file, str)]

    def visual(self, record: Record) -> Any:
        """Return the record's image, or the frames of its list of images, or of its video."""
        if visual_field(record) == "image":
            images = [self.image(file) for file in as_list(record["image"])]
            return joined(images, str(self.annotation_paths[0])) if isinstance(record["image"], list) else images[0]
        video = record["video"]
        path = video if isinstance(video, StoredImage) else self.vis_root / video
        own = self.vis_processor
        part = record_part(record) if isinstance(own, ReadsVideos) and not own.full_video else None

        def read() -> Tensor:
            return read_frames(path, self.num_frames, own, short_clips=self.short_clips, part=part)

        return self.process_once((video, part), read)


def check_one_kind(records: list[Record], place: Callable[[int], str]) -> None:
    """Raise InputError if some records have an image and others a video, which no batch can hold."""
    kinds = [visual_field(record) for record in records]
    if len(set(kinds)) > 1:
        number = next(number for number, kind in enumerate(kinds) if kind != kinds[0])
        problem = f"has a field {kinds[number]!r}, the first record {kinds[0]!r}: make two datasets of them"
        raise InputError(f"{place(number)} {problem}")


def visual_field(record: Record) -> str:
    """Return the field with the path of the image or video: "video" if the record has one, else "image"."""
    return "image" if record.get("video") is None else "video"
