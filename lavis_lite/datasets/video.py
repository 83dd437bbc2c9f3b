"""The video of a sample; `lavis_lite/common/video_io.py` chooses its frames."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

from PIL import Image
from torch import Tensor

from lavis_lite.common.errors import InputError, UnreadableSample
from lavis_lite.common.records import Record, StoredImage
from lavis_lite.common.video_io import Part, ShortClips, decode, processed


@runtime_checkable
class ReadsVideos(Protocol):
    """A video processor, which chooses the frames of a file itself."""

    full_video: bool
    """False: only the part of the video that the record says is read."""

    def read(self, path: str | Path | StoredImage, *, part: Part | None = None) -> Tensor:
        """Return frames (3,F,H,W) of a video file, of the `part` (start, end) in seconds if it is given."""
        ...


def record_part(record: Record) -> Part | None:
    """Return the part of a video that a record's `start` and `end` (also `start_sec`, `end_sec`) say, in seconds.

    Raises InputError for one that is not a number; None if the record has neither.
    """
    start, end = (record.get(name, record.get(f"{name}_sec")) for name in ("start", "end"))
    if start is None and end is None:
        return None
    try:
        return None if start is None else float(start), None if end is None else float(end)
    except (TypeError, ValueError):
        raise InputError(f"{record.get('video')}: start and end must be seconds, got {start!r} and {end!r}") from None


def read_frames(
    path: str | Path | StoredImage,
    num_frames: int,
    processor: Callable[[Image.Image], Tensor] | ReadsVideos,
    *,
    short_clips: ShortClips = "repeat",
    part: Part | None = None,
) -> Tensor:
    """Return `num_frames` frames (3,F,H,W) spread over the video, in time order, with one random crop for all of them.

    `processor` takes one frame, as an image processor does; a video processor has its own number of frames. `part` is
    the part of the video to read, (start, end) in seconds; None: all of it.

    Raises UnreadableSample, naming the file, when it is missing or broken, or with `short_clips="error"` too short;
    ImportError without decord; ValueError for a processor that makes no tensors.
    """
    try:
        if isinstance(processor, ReadsVideos):
            return processor.read(path, part=part)
        frames = decode(path, num_frames, short_clips=short_clips, part=part)
    except FileNotFoundError:
        raise UnreadableSample(
            f"video file not found: {path}. Check the dataset's build_info.videos.storage or images.storage "
            "(relative paths are below the environment variable LAVIS_LITE_DATA), or remove the record. "
            "`lavis-lite data check` names every file that is missing or broken"
        ) from None
    return processed(frames, processor)
