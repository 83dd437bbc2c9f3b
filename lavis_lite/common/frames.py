"""Frames out of a video file, for datasets that name files and for processors that are handed paths.

As in BLIP, frame i of n is number floor(i x there / n) of the `there` frames: the first of each of n equal stretches,
counted in frames, not in seconds. Frames are RGB, upright, and of the video's own size. (LAVIS's video processors took
frames 0, T/3, 2T/3 and 2T/3 again, with red and blue exchanged.) A clip shorter than n repeats frames by the same rule.
Surprising: the whole video is decoded, in order. decord seeks to wrong frames in many files, such as MPEG-4 and H.264
in AVI, open groups of pictures and HEVC; and as it reads ahead, whether damage behind the last wanted frame is noticed
would be a matter of timing. Reading on costs little: seconds only for videos of an hour.
"""

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lavis_lite.common.bounds import check_number
from lavis_lite.common.errors import (
    InputError,
    MissingFileError,
    MissingPackageError,
    UnreadableSample,
)
from lavis_lite.common.pixels import BROKEN, open_file, to_rgb
from lavis_lite.common.rng import CpuState

ShortClips = Literal["repeat", "error"]
"""What becomes of a clip with fewer frames than are wanted."""
MAX_FRAMES = 10_000
UNKNOWN_SIZE = 0xFFFFFFFF
"""What stands for the size of a RIFF file that was written as a stream."""


def check_num_frames(num_frames: int) -> int:
    """Return `num_frames`; raise ValueError if it is not 1 to `MAX_FRAMES`."""
    return check_number("num_frames", num_frames, 1, MAX_FRAMES)


def check_short_clips(short_clips: str) -> str:
    """Return `short_clips`; raise ValueError if it is neither "repeat" nor "error"."""
    if short_clips not in get_args(ShortClips):
        raise InputError(f"short_clips: expected repeat or error, got {short_clips!r}")
    return short_clips


def sampled(num_there: int, num_frames: int, *, source: object, short_clips: ShortClips = "repeat") -> list[int]:
    """Return the numbers floor(i x num_there / num_frames) of the frames to take, in time order.

    A source with fewer frames repeats them, or with `short_clips="error"` raises UnreadableSample, as one without any
    does. Raises ValueError if `num_frames` is below 1 or above `MAX_FRAMES`.
    """
    if not num_there:
        raise UnreadableSample(f"{source} has no frames")
    if num_there < check_num_frames(num_frames) and check_short_clips(short_clips) == "error":
        raise UnreadableSample(
            f"{source} has {num_there} frames, and num_frames={num_frames}: lower num_frames, or set short_clips: "
            "repeat"
        )
    return [i * num_there // num_frames for i in range(num_frames)]


def decode(path: str | Path, num_frames: int, *, short_clips: ShortClips = "repeat") -> list[Image.Image]:
    """Return `num_frames` RGB frames of a video file, spread over all of it as `sampled` says, in time order.

    An animated GIF, WebP or PNG is a video too.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableSample: it is broken or no video, an AVI shorter than it says, or too short. (A cut-off Matroska or
            MPEG stream is just a shorter video.)
        ImportError: decord is not installed.
    """
    file = Path(path).absolute()  # FFmpeg takes a relative name with a colon for a URL
    if not file.is_file():
        raise MissingFileError(f"video file not found: {path}")

    check_num_frames(num_frames)

    def choose(num_there: int) -> list[int]:
        return sampled(num_there, num_frames, source=f"video file {path}", short_clips=short_clips)

    return _decode_animation(file, choose) if is_animation(file) else _decode_video(file, choose)


def _unreadable(file: Path, error: Exception) -> UnreadableSample:
    reason = re.sub(r"\[[\d:]+\] \S+: ", "", str(error).partition("\n")[0])  # without decord's own source lines
    return UnreadableSample(
        f"video file broken, truncated or of an unknown codec: {file} ({type(error).__name__}: {reason}). Fetch or "
        "convert it again, or remove the record from the annotations."
    )


def is_animation(file: Path) -> bool:
    """Return whether a file is a GIF, PNG or WebP, by its first bytes."""
    with file.open("rb") as stream:
        head = stream.read(12)
    return head.startswith((b"GIF87a", b"GIF89a", b"\x89PNG\r\n")) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def _decode_animation(file: Path, choose: Callable[[int], list[int]]) -> list[Image.Image]:
    """Return the chosen frames of an animation, on white."""
    try:
        with open_file(file) as animation:
            numbers = choose(getattr(animation, "n_frames", 1))
            images = {}
            for number in sorted(set(numbers)):
                animation.seek(number)
                images[number] = to_rgb(animation.copy())
    except UnreadableSample:
        raise
    except BROKEN as error:
        raise _unreadable(file, error) from error
    return [images[number] for number in numbers]


def _decode_video(file: Path, choose: Callable[[int], list[int]]) -> list[Image.Image]:
    """Return the chosen frames of a video, read by decord."""
    try:
        import decord
    except ImportError as error:
        raise MissingPackageError(
            "reading videos needs decord: `pip install decord` (made for x86-64), or decode the frames yourself and "
            "hand the processor `blip_video_eval` the list of PIL images"
        ) from error
    try:
        check_whole(file)
        reader = decord.VideoReader(str(file), num_threads=1)  # loaders have workers; threads cost memory
        numbers = choose(len(reader))
        images = dict(zip(sorted(set(numbers)), read_on(reader, set(numbers)), strict=True))
    except (decord.DECORDError, RuntimeError, AssertionError, StopIteration, OSError, EOFError) as error:
        raise _unreadable(file, error) from error
    return [images[number] for number in numbers]


def check_whole(file: Path) -> None:
    """Raise EOFError for an AVI file that is shorter than its header says; decord would take it for a short video."""
    with file.open("rb") as stream:
        head = stream.read(8)
    declared = int.from_bytes(head[4:], "little")
    size = file.stat().st_size
    if head[:4] == b"RIFF" and declared != UNKNOWN_SIZE and size < declared + 7:  # the last byte may be padding
        raise EOFError(f"{size} bytes of {declared + 8}")


def read_on(reader: Any, numbers: Collection[int]) -> list[Image.Image]:
    """The frames with these numbers, in time order, from decord's reader before its first frame; reads all others."""
    images = []
    for number in range(len(reader)):
        frame = reader.next()
        if number in numbers:
            native = hasattr(frame, "asnumpy")  # else decord.bridge is set, and it is another library's tensor
            images.append(Image.fromarray(frame.asnumpy() if native else np.asarray(frame)))
    return images


def processed(frames: Sequence[Image.Image], processor: Callable[[Image.Image], Tensor]) -> Tensor:
    """The frames as (3,F,H,W), each processed from the same random state: one crop for all of them.

    Raises ValueError if the processor makes no tensors.
    """
    state, tensors = CpuState.now(), []
    for frame in frames:
        state.restore()
        tensors.append(processor(frame))
    if not torch.is_tensor(tensors[0]):
        raise InputError(
            f"a video's frames are no tensors after their processor, but {type(tensors[0]).__name__}: name an image "
            "processor as vis_processor, e.g. {eval: {name: blip_image_eval, image_size: 224}}"
        )
    return torch.stack(tensors, dim=1)
