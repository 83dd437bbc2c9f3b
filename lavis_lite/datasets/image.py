"""Opening an image file as 8-bit RGB, with errors that name the file.

As in LAVIS, the first frame of an animation is taken and the EXIF orientation is ignored (published results were
measured so). Unlike there, transparency is composited on a background, and 16-bit grey is scaled to 8 bit, not clipped.
"""

from __future__ import annotations

import io
import re
import unicodedata
from pathlib import Path
from typing import Protocol, TypedDict, runtime_checkable

from PIL import Image

from lavis_lite.common.errors import InputError, UnreadableSample
from lavis_lite.common.image_io import BROKEN, MAX_PIXELS, SUFFIXES, formats, open_file, to_rgb
from lavis_lite.common.members import find_member
from lavis_lite.common.records import StoredImage

ONE_COLOUR = (
    "has one colour only, {}, so nothing can be learned from it; others may be like it, and are not named. If it is "
    "transparent, set another `background` in the image processor"
)


@runtime_checkable
class OpensImages(Protocol):
    """An image processor whose settings hold for the files, too, that a dataset opens for it."""

    background: str
    max_pixels: int


def open_image(
    path: str | Path | StoredImage, *, background: str = "white", max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Return the image of a file, table or shard as RGB, fully decoded; `background` and `max_pixels` are `to_rgb`'s.

    Raises UnreadableSample, naming the file, when it is missing, broken, too large, or not a regular file of a format
    that is read.
    """
    try:
        member = None if isinstance(path, StoredImage) else find_member(path)
        with open_file(member or path, max_pixels=max_pixels) as image:
            return to_rgb(image, background=background, max_pixels=max_pixels)
    except PermissionError:
        raise UnreadableSample(
            f"image file {path}: this user may not read it; change its permissions, or remove the record"
        ) from None
    except FileNotFoundError:
        raise UnreadableSample(
            f"image file not found: {path}. {_hint(path)}Check the dataset's build_info.images.storage (relative "
            "paths are below the environment variable LAVIS_LITE_DATA), or remove the record. `lavis-lite data check` "
            "names every file that is missing or broken"
        ) from None
    except UnreadableSample:
        raise
    except InputError as error:
        raise UnreadableSample(f"image file {path}: {error}") from None
    except BROKEN as error:
        reason = str(error).partition(" <_io.BytesIO")[0]
        raise UnreadableSample(
            f"image file broken, truncated or of another kind: {path} ({type(error).__name__}: {reason}). Fetch it "
            f"again, convert it to one of {', '.join(formats())}, or remove the record"
        ) from error


def _hint(path: object) -> str:
    """Return the sentence about a name that is an address, or that differs from that of a file in the case of its
    suffix or in how accents are stored; empty for any other.
    """
    file = Path(str(path))
    if address := re.search(r"(^|/)(https?|s3|gs):/", str(path)):
        return f"It is an address ({str(path)[address.start(2) :]}), and images are not downloaded: fetch the files. "
    forms = [unicodedata.normalize(form, file.name) for form in ("NFC", "NFD")]
    forms += [f"{file.stem}{suffix}" for suffix in (file.suffix.lower(), file.suffix.upper())]
    found = next((name for name in forms if name != file.name and file.with_name(name).is_file()), None)
    if found is None:
        return ""
    is_case = found.casefold() == file.name.casefold()
    how = "in the case of its suffix" if is_case else "in the way in which accents are stored (NFC, NFD)"
    return f"There is {found!a}, whose name differs {how}. "


def read_image_file(path: str | Path | StoredImage) -> tuple[str, bytes]:
    """Return an image file's suffix without the dot, and its content; of a name without a known one by the content.

    Raises UnreadableSample if it cannot be read.
    """
    stored = path if isinstance(path, StoredImage) else find_member(path)
    try:
        content = stored.read() if stored else Path(str(path)).read_bytes()
        suffix = Path(str(path)).suffix.lower()
        if suffix not in SUFFIXES:
            with Image.open(io.BytesIO(content), formats=formats()) as image:
                suffix = {"JPEG": ".jpg", "JPEG2000": ".jp2"}.get(str(image.format), f".{image.format}".lower())
    except BROKEN as error:
        raise UnreadableSample(f"image file {path}: cannot be read any more ({error})") from error
    return suffix.removeprefix("."), content


class OpeningSettings(TypedDict, total=False):
    """Settings of an image processor for opening files."""

    background: str
    max_pixels: int


def opening_settings(processor: object) -> OpeningSettings:
    """Return the settings of a processor that hold for opening files; none of one that has no such settings."""
    if isinstance(processor, OpensImages):
        return {"background": processor.background, "max_pixels": processor.max_pixels}
    return {}
