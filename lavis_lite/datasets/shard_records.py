"""The members of one WebDataset sample as a record: names of members to fields, texts and JSON decoded.

A sample is the members of a shard with one key, the name up to the first dot of its last part; the rest is the
extension. `.jpg` (or another image format) is `image`, `.txt` is `caption`, `.cls` is `label`. The fields of a `.json`
object are fields of the record; a `.json` list of texts is `caption`, as in BLIP-2's shards. Any other extension is the
name of a field. Members override equal fields of the JSON object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lavis_lite.common.errors import InputError
from lavis_lite.common.image_io import SUFFIXES
from lavis_lite.common.records import Record, StoredImage

IMAGES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
TEXTS = ("txt", "cls", "json")
"""Extensions whose content is a field; of others the field is the member's path."""
FIELDS = {**dict.fromkeys(IMAGES, "image"), "txt": "caption", "cls": "label"}
KEY = "__key__"
TABLE_SUFFIX = ".shards.arrow"
"""The end of the name of a table of the samples of shards, in the cache."""

_META = re.compile(r"__[^/]*__($|/)")


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and extension (in lower case) of a member's name; None for one that belongs to no sample."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and extension and not _META.match(name) else None


def is_text(extension: str) -> bool:
    """Return whether a member's content is a field itself."""
    return extension.rpartition(".")[2] in TEXTS


def is_image(extension: str) -> bool:
    """Return whether a member is an image, also a second one such as `left.jpg`."""
    return extension.rpartition(".")[2] in IMAGES


def make_record(key: str, members: Mapping[str, str | bytes | StoredImage]) -> Record:
    """Return the record of a sample from its extensions: to bytes of texts, to paths or images of all other
    members.

    Raises InputError for a text that is not UTF-8 and for broken JSON; the message names the member.
    """
    record: Record = {}
    if "json" in members:
        content = _decoded(f"{key}.json", "json", members["json"])
        record = content if isinstance(content, dict) else {"caption": content}
    for extension, value in members.items():
        if extension != "json":
            record[FIELDS.get(extension, extension)] = _decoded(f"{key}.{extension}", extension, value)
    return {KEY: key, **record}


def _decoded(name: str, extension: str, value: str | bytes | StoredImage) -> Any:
    if not isinstance(value, bytes):
        return value
    try:
        text = value.decode("utf-8-sig").strip()
        if extension.endswith("json"):
            return json.loads(text)
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: is not text in UTF-8 ({error.reason} at byte {error.start})") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{name}: broken JSON ({error})") from None
    return int(text) if extension == "cls" and text.isascii() and text.isdigit() and len(text) <= 9 else text
