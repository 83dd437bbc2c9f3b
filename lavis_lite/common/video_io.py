"""Frames of video files, for datasets that name files and for processors that receive paths.

As in BLIP, frame i of n is number floor(i x T / n) of the T frames: the first of each of n equal intervals, counted in
frames, not in seconds. Frames are RGB, upright, and of the video's size. (LAVIS's video processors took frames 0, T/3,
2T/3 and 2T/3 again, with red and blue exchanged.) A clip shorter than n repeats frames by the same rule.

Note: the whole video is decoded, in order (`video_decoders.py`): decoders seek to wrong frames in many files.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from lavis_lite.common.bounds import check_number
from lavis_lite.common.errors import InputError, MissingFileError, SettingError, UnreadableSample
from lavis_lite.common.members import find_member
from lavis_lite.common.records import StoredImage
from lavis_lite.common.rng import cpu_state, restore_cpu
from lavis_lite.common.video_decoders import decode_animation, decode_video

ShortClips = Literal["repeat", "error"]
"""Whether a clip with fewer frames than requested repeats frames, or is an error."""
Part = tuple[float | None, float | None]
"""Start and end of a part of a video, in seconds; None: the video's own."""
MAX_FRAMES = 10_000


def check_num_frames(num_frames: int) -> int:
    """Return `num_frames`; raise SettingError if it is not 1 to `MAX_FRAMES`."""
    return check_number("num_frames", num_frames, 1, MAX_FRAMES)


def sampled(num_available: int, num_frames: int, *, source: object, short_clips: ShortClips = "repeat") -> list[int]:
    """Return the numbers floor(i x num_available / num_frames) of the frames to take, in time order.

    A source with fewer frames repeats them, or with `short_clips="error"` raises UnreadableSample, as one without
    frames does. Raises SettingError if `num_frames` is below 1 or above `MAX_FRAMES`, or for another `short_clips`.
    """
    if short_clips not in get_args(ShortClips):
        raise SettingError("short_clips", f"{short_clips!r} is neither repeat nor error")
    if not num_available:
        raise UnreadableSample(f"{source} has no frames")
    if num_available < check_num_frames(num_frames) and short_clips == "error":
        advice = "lower num_frames, or set short_clips: repeat"
        raise UnreadableSample(f"{source} has {num_available} frames, and num_frames={num_frames}: {advice}")
    return [i * num_available // num_frames for i in range(num_frames)]


def part_of(num_available: int, part: Part, *, rate: float | None, source: object) -> tuple[int, int]:
    """Return the first frame of a part of a video, and the number of its frames, at least one.

    Raises UnreadableSample for a part outside the video, or of a file without a frame rate.
    """
    start, end = part[0] or 0.0, part[1]
    if not rate:
        raise UnreadableSample(f"{source} has no frame rate, so its part of {start} s to {end} s is unknown")
    first, last = int(start * rate), num_available if end is None else min(math.ceil(end * rate), num_available)
    if not 0 <= first < last:
        length = num_available / rate
        raise UnreadableSample(f"{source} lasts {length:.1f} s: it has no part of {start} s to {end} s")
    return first, last - first


def decode(
    path: str | Path | StoredImage, num_frames: int, *, short_clips: ShortClips = "repeat", part: Part | None = None
) -> list[Image.Image]:
    """Return `num_frames` RGB frames of a video file, or of an animated GIF, WebP or PNG, as `sampled` selects them.
    One in a shard or table is copied to a temporary file, which is what decoders open.

    `part` is the part of the video to sample, (start, end) in seconds; None: all of it.

    Raises:
        FileNotFoundError: the file does not exist.
        UnreadableSample: it is broken, not a video, shorter than its AVI header says, or too short. (A truncated
            Matroska or MPEG stream is a shorter video.)
        ImportError: neither decord nor PyAV is installed.
    """
    stored = path if isinstance(path, StoredImage) else find_member(path)
    if stored is not None:
        with tempfile.NamedTemporaryFile(prefix="video-", suffix=Path(str(path)).suffix) as copy:
            copy.write(stored.read())
            copy.flush()
            try:
                return decode(copy.name, num_frames, short_clips=short_clips, part=part)
            except UnreadableSample as error:
                raise UnreadableSample(str(error).replace(copy.name, str(path))) from error
    file = Path(str(path)).absolute()  # FFmpeg takes a relative name with a colon for a URL
    if not file.is_file():
        raise MissingFileError(f"video file not found: {path}")
    check_num_frames(num_frames)

    def choose(num_available: int, rate: float | None) -> list[int]:
        source, first = f"video file {path}", 0
        if part is not None:
            first, num_available = part_of(num_available, part, rate=rate, source=source)
        return [first + i for i in sampled(num_available, num_frames, source=source, short_clips=short_clips)]

    with file.open("rb") as stream:
        head = stream.read(12)
    is_animation = head.startswith((b"GIF87a", b"GIF89a", b"\x89PNG\r\n")) or head[:4] + head[8:] == b"RIFFWEBP"
    return decode_animation(file, choose) if is_animation else decode_video(file, choose)


def processed(frames: Sequence[Image.Image], processor: Callable[[Image.Image], Tensor]) -> Tensor:
    """Return the frames as (3,F,H,W), each processed from the same random state: all have one crop.

    Raises InputError if the processor does not return tensors.
    """
    state, tensors = cpu_state(), []
    for frame in frames:
        restore_cpu(*state)
        tensors.append(processor(frame))
    if not torch.is_tensor(tensors[0]):
        returned = f"vis_processor returned {type(tensors[0]).__name__} for a video frame, expected a tensor"
        raise InputError(f"{returned}: name an image processor, e.g. {{eval: {{name: blip_image_eval}}}}")
    return torch.stack(tensors, dim=1)
