"""The packages that decode video files: decord where it is installed and knows the codec, else PyAV.

Both give the same frames to the pixel. decord has no wheels for ARM and does not know AV1; PyAV has its own FFmpeg.
The environment variable LAVIS_LITE_VIDEO names one of them, so that no other is used.

Note: the whole video is decoded, in order. decord seeks to wrong frames in many files, such as MPEG-4 and H.264 in AVI,
open groups of pictures and HEVC. Because it reads ahead, damage after the last selected frame would be detected or not,
depending on timing. Decoding to the end takes seconds only for videos of an hour.
"""

import importlib
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lavis_lite.common.errors import InputError, MissingPackageError, UnreadableSample
from lavis_lite.common.image_io import BROKEN, open_file, to_rgb

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

Choose = Callable[[int, float | None], list[int]]
"""The numbers of the frames to take, given the number of frames and the frames per second."""
VARIABLE = "LAVIS_LITE_VIDEO"
UNKNOWN_SIZE = 0xFFFFFFFF
"""Size in the header of a RIFF file that was written as a stream."""


def decode_animation(file: Path, choose: Choose) -> list[Image.Image]:
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


def decode_video(file: Path, choose: Choose) -> list[Image.Image]:
    """Return the chosen frames of a video.

    Raises UnreadableSample for a file that is broken or of a codec that no installed package knows, ImportError if no
    package is installed, InputError for another name in LAVIS_LITE_VIDEO.
    """
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted not in ("auto", *DECODERS):
        raise InputError(f"environment variable {VARIABLE}: expected auto, {' or '.join(DECODERS)}, got {wanted!r}")
    names = list(DECODERS) if wanted == "auto" else [wanted]
    there = [name for name in names if _is_installed(name)]
    if not there:
        advice = "`pip install decord` (for x86-64) or `pip install lavis-lite[video]` (PyAV)"
        raise MissingPackageError(
            f"reading videos needs {' or '.join(names)}: {advice}, or give the processor `blip_video_eval` the list of "
            "PIL images"
        )
    first: UnopenedVideo | None = None
    for name in there:
        try:
            images = DECODERS[name](file, choose)
        except UnopenedVideo as error:  # another package may know the codec
            first = first or error
            continue
        return images
    assert first is not None
    raise _unreadable(file, first.reason) from first.reason


class UnopenedVideo(Exception):
    """A file in which a package found no video that it can decode, and why."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _is_installed(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _unreadable(file: Path, error: Exception) -> UnreadableSample:
    reason = re.sub(r"\[[\d:]+\] \S+: ", "", str(error).partition("\n")[0])  # without decord's own source lines
    problem = f"video file broken, truncated or of an unknown codec: {file} ({type(error).__name__}: {reason})"
    return UnreadableSample(f"{problem}. Fetch or convert it again, or remove the record from the annotations.")


def _by_decord(file: Path, choose: Choose) -> list[Image.Image]:
    """Return the chosen frames, decoded by decord."""
    import decord

    broken = (decord.DECORDError, RuntimeError, AssertionError, StopIteration, OSError, EOFError)
    try:
        check_whole(file)
    except EOFError as error:
        raise _unreadable(file, error) from error
    try:
        reader = decord.VideoReader(str(file), num_threads=1)  # loaders have workers; threads cost memory
    except broken as error:
        raise UnopenedVideo(error) from error
    try:
        numbers = choose(len(reader), reader.get_avg_fps())
        images = dict(zip(sorted(set(numbers)), read_frames(reader, set(numbers)), strict=True))
    except broken as error:
        raise _unreadable(file, error) from error
    return [images[number] for number in numbers]


def check_whole(file: Path) -> None:
    """Raise EOFError for an AVI file that is shorter than its header says; decoders would read a shorter video."""
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
            images.append(Image.fromarray(_packed(frame.asnumpy() if native else np.asarray(frame))))
    return images


def _packed(frame: np.ndarray) -> np.ndarray:
    """Return a frame (H,W,3). decord takes the padding of rows for further channels where it turns a clip upright."""
    height, width, channels = frame.shape
    return frame if channels == 3 else frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def _by_av(file: Path, choose: Choose) -> list[Image.Image]:
    """Return the chosen frames, decoded by PyAV. The packets say how many frames there are, or else a first pass does
    (of a stream whose packets hold no frame, or several).
    """
    import av

    broken = (av.FFmpegError, OSError, ValueError, EOFError)
    try:
        check_whole(file)
        with av.open(str(file)) as container:
            stream = _video_stream(container)
            count = sum(bool(packet.size) for packet in container.demux(stream))
            if not count:
                raise EOFError("it has no frames")
            rate = None if stream.average_rate is None else float(stream.average_rate)
    except broken as error:
        raise UnopenedVideo(error) from error
    try:
        numbers = choose(count, rate)
        images, there = _frames(file, set(numbers))
        if there != count:
            numbers = choose(there, rate)
            images, _ = _frames(file, set(numbers))
    except UnreadableSample:
        raise
    except broken as error:
        raise _unreadable(file, error) from error
    return [images[number] for number in numbers]


def _video_stream(container: "InputContainer") -> "VideoStream":
    """Return the stream that FFmpeg takes for the main one. EOFError without one."""
    from av.video.stream import VideoStream

    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream):
        raise EOFError("it has no video")
    return stream


def _frames(file: Path, numbers: Collection[int]) -> tuple[dict[int, Image.Image], int]:
    """Return the frames with these numbers, upright, and the number of all frames."""
    import av

    images, number = {}, -1
    with av.open(str(file)) as container:
        stream = _video_stream(container)
        stream.thread_type = "NONE"  # loaders have workers; threads cost memory
        for number, frame in enumerate(container.decode(stream)):
            if number in numbers:
                image = Image.fromarray(frame.to_ndarray(format="rgb24", interpolation="BICUBIC"))
                images[number] = image.rotate(frame.rotation, expand=True) if frame.rotation else image
    return images, number + 1


DECODERS: dict[str, Callable[[Path, Choose], list[Image.Image]]] = {"decord": _by_decord, "av": _by_av}
"""The packages by name, in the order in which they are tried."""
