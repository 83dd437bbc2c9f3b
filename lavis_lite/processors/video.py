"""Video processors: a video file, or its frames as PIL images, in, a normalised float (3,F,S,S) tensor out.

They are for single clips, and for datasets of videos, which also take image processors for the frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image

from lavis_lite.common.bounds import one_of
from lavis_lite.common.errors import InputTypeError
from lavis_lite.common.records import StoredImage
from lavis_lite.common.registry import registry
from lavis_lite.common.video_io import Part, ShortClips, check_num_frames, decode, processed, sampled
from lavis_lite.processors.image import BlipImageEvalProcessor, BlipImageTrainProcessor, ImageProcessor

Video = str | Path | Sequence[Image.Image]


class VideoProcessor(ImageProcessor):
    """Takes `num_frames` frames of a video file, or of the list of its frames in time order; each as an image.

    They are spread as in `lavis_lite.common.video_io.sampled`. Fewer are repeated, or with `short_clips: error` an
    UnreadableSample (a ValueError), as a broken file is. Raises FileNotFoundError for a missing file, TypeError for
    anything else. The next class in the order of inheritance makes images of the frames.
    """

    full_video: bool = True
    """False: a dataset reads only the part of a video that the record's `start` and `end` say."""

    def __init__(
        self, *, num_frames: int = 4, short_clips: ShortClips = "repeat", image_size: int = 224, **image: Any
    ) -> None:
        super().__init__(**{"image_size": image_size, **image})
        self.num_frames: int = check_num_frames(num_frames)
        self.short_clips: ShortClips = one_of("short_clips", short_clips, get_args(ShortClips))

    def __call__(self, video: Video) -> torch.Tensor:  # type: ignore[override]  # a clip, where the parent takes a frame
        """Return float32 (3, num_frames, image_size, image_size), whatever is random the same for all frames."""
        if isinstance(video, str | Path):
            return self.read(video)
        if isinstance(video, list | tuple):
            numbers = sampled(len(video), self.num_frames, source="the list of frames", short_clips=self.short_clips)
            return processed([video[i] for i in numbers], super().__call__)
        kind = type(video).__name__
        raise InputTypeError(f"a video processor takes a video's path or a list of PIL images, got {kind}")

    def read(self, path: str | Path | StoredImage, *, part: Part | None = None) -> torch.Tensor:
        """Return frames of a video file as calls do, of the `part` (start, end) in seconds if it is given."""
        frames = decode(path, self.num_frames, short_clips=self.short_clips, part=part)
        return processed(frames, super().__call__)


@registry.register_processor("blip_video_eval")
class BlipVideoEvalProcessor(VideoProcessor, BlipImageEvalProcessor):
    """Frames as `blip_image_eval` makes images; deterministic."""


@registry.register_processor("blip_video_train")
class BlipVideoTrainProcessor(VideoProcessor, BlipImageTrainProcessor):
    """Frames as `blip_image_train` makes images, all with the same crop, mirror and RandAugment operations."""


class AlproVideoProcessor(VideoProcessor):
    """A video processor with LAVIS's keys: `n_frms` is `num_frames`; with `full_video: false` a dataset reads only the
    part of a video that the record names.

    Note: `n_frms` is 4 unless given, where LAVIS takes all frames. Frames are chosen as by all processors here.
    """

    def __init__(
        self, *, n_frms: int | None = None, full_video: bool = True, image_size: int = 256, **frames: Any
    ) -> None:
        own = {} if n_frms is None else {"num_frames": n_frms}
        super().__init__(**{"image_size": image_size, **frames, **own})
        self.full_video = full_video


@registry.register_processor("alpro_video_eval")
class AlproVideoEvalProcessor(AlproVideoProcessor, BlipImageEvalProcessor):
    """As `blip_video_eval`, with LAVIS's keys; 256 pixels by default."""


@registry.register_processor("alpro_video_train")
class AlproVideoTrainProcessor(AlproVideoProcessor, BlipImageTrainProcessor):
    """As `blip_video_train`, with LAVIS's keys; 256 pixels by default."""
