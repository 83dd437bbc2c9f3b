"""Frames of video files, for datasets that name files and for processors that receive paths.

As in BLIP, frame i of n is number floor(i x T / n) of the T frames: the first of each of n equal intervals, counted in
frames, not in seconds. Frames are RGB, upright, and of the video's size. (LAVIS's video processors took frames 0, T/3,
2T/3 and 2T/3 again, with red and blue exchanged.) A clip shorter than n repeats frames by the same rule.

Note: the whole video is decoded, in order. decord seeks to wrong frames in many files, such as MPEG-4 and H.264 in AVI,
open groups of pictures and HEVC. Because it reads ahead, damage after the last selected frame would be detected or not,
depending on timing. Decoding to the end takes seconds only for videos of an hour.
"""

import math
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lavis_lite.common.bounds import check_number
from lavis_lite.common.errors import InputError, MissingFileError, MissingPackageError, SettingError, UnreadableSample
from lavis_lite.common.image_io import BROKEN, open_file, to_rgb
from lavis_lite.common.rng import cpu_state, restore_cpu

ShortClips = Literal["repeat", "error"]
"""Whether a clip with fewer frames than requested repeats frames, or is an error."""
Part = tuple[float | None, float | None]
"""Start and end of a part of a video, in seconds; None: the video's own."""
MAX_FRAMES = 10_000
UNKNOWN_SIZE = 0xFFFFFFFF
"""Size in the header of a RIFF file that was written as a stream."""


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
    path: str | Path, num_frames: int, *, short_clips: ShortClips = "repeat", part: Part | None = None
) -> list[Image.Image]:
    """Return `num_frames` RGB frames of a video file, or of an animated GIF, WebP or PNG, as `sampled` selects them.

    `part` is the part of the video to sample, (start, end) in seconds; None: all of it.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableSample: it is broken, not a video, shorter than its AVI header says, or too short. (A truncated
            Matroska or MPEG stream is a shorter video.)
        ImportError: decord is not installed.
    """
    file = Path(path).absolute()  # FFmpeg takes a relative name with a colon for a URL
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
    return _decode_animation(file, choose) if is_animation else _decode_video(file, choose)


def _unreadable(file: Path, error: Exception) -> UnreadableSample:
    reason = re.sub(r"\[[\d:]+\] \S+: ", "", str(error).partition("\n")[0])  # without decord's own source lines
    problem = f"video file broken, truncated or of an unknown codec: {file} ({type(error).__name__}: {reason})"
    return UnreadableSample(f"{problem}. Fetch or convert it again, or remove the record from the annotations.")


def _decode_animation(file: Path, choose: Callable[[int, float | None], list[int]]) -> list[Image.Image]:
    """Return the chosen frames of an animation, on a white background."""
    try:
        with open_file(file) as animation:
            duration = animation.info.get("duration")  # milliseconds of the first frame, taken to be all frames'
            numbers = choose(getattr(animation, "n_frames", 1), 1000 / duration if duration else None)
            images = {}
            for number in sorted(set(numbers)):
                animation.seek(number)
                images[number] = to_rgb(animation.copy())
    except UnreadableSample:
        raise
    except BROKEN as error:
        raise _unreadable(file, error) from error
    return [images[number] for number in numbers]


def _decode_video(file: Path, choose: Callable[[int, float | None], list[int]]) -> list[Image.Image]:
    """Return the chosen frames of a video, decoded by decord."""
    try:
        import decord
    except ImportError as error:
        advice = "`pip install decord` (for x86-64), or give the processor `blip_video_eval` the list of PIL images"
        raise MissingPackageError(f"reading videos needs decord: {advice}") from error
    try:
        check_whole(file)
        reader = decord.VideoReader(str(file), num_threads=1)  # loaders have workers; threads cost memory
        numbers = choose(len(reader), reader.get_avg_fps())
        images = dict(zip(sorted(set(numbers)), read_frames(reader, set(numbers)), strict=True))
    except (decord.DECORDError, RuntimeError, AssertionError, StopIteration, OSError, EOFError) as error:
        raise _unreadable(file, error) from error
    return [images[number] for number in numbers]


def check_whole(file: Path) -> None:
    """Raise EOFError for an AVI file that is shorter than its header says; decord would read a shorter video."""
    with file.open("rb") as stream:
        head = stream.read(8)
    declared = int.from_bytes(head[4:], "little")
    size = file.stat().st_size
    if head[:4] == b"RIFF" and declared != UNKNOWN_SIZE and size < declared + 7:  # the last byte may be padding
        raise EOFError(f"{size} bytes of {declared + 8}")


def read_frames(reader: Any, numbers: Collection[int]) -> list[Image.Image]:
    """Return the frames with these numbers, in time order, from a new reader of decord; reads the others too."""
    images = []
    for number in range(len(reader)):
        frame = reader.next()
        if number in numbers:
            native = hasattr(frame, "asnumpy")  # else decord.bridge makes it another library's tensor
            images.append(Image.fromarray(frame.asnumpy() if native else np.asarray(frame)))
    return images


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
