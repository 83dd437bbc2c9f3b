"""Video processors: a video file, or its frames as PIL images, in, a normalised float (3,F,S,S) tensor out.

They are for single clips. Datasets read videos themselves and take image processors for the frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image

from lavis_lite.common.bounds import one_of
from lavis_lite.common.errors import InputTypeError
from lavis_lite.common.frames import ShortClips, check_num_frames, decode, processed, sampled
from lavis_lite.common.registry import registry
from lavis_lite.processors.image import BlipImageEvalProcessor, BlipImageTrainProcessor, ImageProcessor

Video = str | Path | Sequence[Image.Image]


class VideoProcessor(ImageProcessor):
    """Takes `num_frames` frames of a video file, or of the list of its frames in time order; each as an image.

    They are spread as in `lavis_lite.common.frames.sampled`. Fewer are repeated, or with `short_clips: error` an
    UnreadableSample (a ValueError), as a broken file is. Raises FileNotFoundError for a missing file, TypeError for
    anything else. The next class in the order of inheritance makes images of the frames.
    """

    def __init__(
        self, *, num_frames: int = 4, short_clips: ShortClips = "repeat", image_size: int = 224, **image: Any
    ) -> None:
        super().__init__(**{"image_size": image_size, **image})
        self.num_frames: int = check_num_frames(num_frames)
        self.short_clips: ShortClips = one_of("short_clips", short_clips, get_args(ShortClips))

    def __call__(self, video: Video) -> torch.Tensor:  # type: ignore[override]  # a clip, where the parent takes a frame
        """Return float32 (3, num_frames, image_size, image_size), whatever is random the same for all frames."""
        if isinstance(video, str | Path):
            frames = decode(video, self.num_frames, short_clips=self.short_clips)
        elif isinstance(video, list | tuple):
            numbers = sampled(len(video), self.num_frames, source="the list of frames", short_clips=self.short_clips)
            frames = [video[i] for i in numbers]
        else:
            kind = type(video).__name__
            raise InputTypeError(f"a video processor takes a video's path or a list of PIL images, got {kind}")
        return processed(frames, super().__call__)


@registry.register_processor("blip_video_eval")
class BlipVideoEvalProcessor(VideoProcessor, BlipImageEvalProcessor):
    """Frames as `blip_image_eval` makes images; deterministic."""


@registry.register_processor("blip_video_train")
class BlipVideoTrainProcessor(VideoProcessor, BlipImageTrainProcessor):
    """Frames as `blip_image_train` makes images, all with the same crop, mirror and RandAugment operations."""
