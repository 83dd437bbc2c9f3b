"""The video of a sample; `lavis_lite/common/frames.py` chooses its frames."""

from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor

from lavis_lite.common.errors import UnreadableSample
from lavis_lite.common.frames import ShortClips, decode, processed


def read_frames(
    path: str | Path, num_frames: int, processor: Callable[[Image.Image], Tensor], *, short_clips: ShortClips = "repeat"
) -> Tensor:
    """Return `num_frames` frames (3,F,H,W) spread over the video, in time order, with one random crop for all of them.

    `processor` takes one frame, as an image processor does. Raises UnreadableSample, naming the file, when it is
    missing or broken, or with `short_clips="error"` too short; ImportError without decord; ValueError for a processor
    that makes no tensors.
    """
    try:
        frames = decode(path, num_frames, short_clips=short_clips)
    except FileNotFoundError:
        raise UnreadableSample(
            f"video file not found: {path}. Check the dataset's build_info.videos.storage or images.storage "
            "(relative paths are below the environment variable LAVIS_LITE_DATA), or remove the record. "
            "`lavis-lite data check` names every file that is missing or broken"
        ) from None
    return processed(frames, processor)
