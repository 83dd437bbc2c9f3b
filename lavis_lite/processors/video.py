"""Video processors: a video file, or its frames as PIL images, in, a normalised float (3,F,S,S) tensor out.

They are for a clip at hand. Datasets read videos themselves and take image processors for the frames.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lavis_lite.common.errors import InputTypeError
from lavis_lite.common.frames import (
    ShortClips,
    check_num_frames,
    check_short_clips,
    decode,
    processed,
    sampled,
)
from lavis_lite.common.registry import registry
from lavis_lite.processors.image import BlipImageEvalProcessor, BlipImageTrainProcessor, ImageProcessor


class VideoProcessor(ImageProcessor):
    """Apply the image processor that follows among the bases to each of `num_frames` frames."""

    def __init__(
        self, *, num_frames: int = 4, short_clips: ShortClips = "repeat", image_size: int = 224, **image: Any
    ) -> None:
        super().__init__(image_size=image_size, **image)
        self.num_frames, self.short_clips = check_num_frames(num_frames), check_short_clips(short_clips)

    def __call__(self, video: str | Path | Sequence[Image.Image]) -> torch.Tensor:
        """A video file or its frames in time order -> float32 (3, num_frames, image_size, image_size).

        `num_frames` are taken, spread as in `lavis_lite.common.frames.sampled`; whatever is random is the same for all.
        Fewer are repeated, or with `short_clips: error` an UnreadableSample (a ValueError), as a broken file is. Raises
        FileNotFoundError for a missing file, TypeError for anything else.
        """
        if isinstance(video, str | Path):
            frames = decode(video, self.num_frames, short_clips=self.short_clips)
        elif isinstance(video, list | tuple):
            numbers = sampled(len(video), self.num_frames, source="the list of frames", short_clips=self.short_clips)
            frames = [video[i] for i in numbers]
        else:
            raise InputTypeError(
                f"a video processor takes a video's path or a list of PIL images, got {type(video).__name__}: name an "
                "image processor for single images and for a dataset's vis_processor"
            )
        return processed(frames, super().__call__)


@registry.register_processor("blip_video_eval")
class BlipVideoEvalProcessor(VideoProcessor, BlipImageEvalProcessor):
    """Frames as `blip_image_eval` makes images; deterministic."""


@registry.register_processor("blip_video_train")
class BlipVideoTrainProcessor(VideoProcessor, BlipImageTrainProcessor):
    """Frames as `blip_image_train` makes images, all with the same crop, mirror and RandAugment operations."""
