"""Inputs of a pipeline: images by path, folder, pattern, list, table or URL, or as objects in memory."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lavis_lite.common.errors import (
    InputError,
    InputTypeError,
    MissingFileError,
    UnreachableError,
    UnreadableSample,
)
from lavis_lite.common.image_io import SUFFIXES
from lavis_lite.common.records import Record, StoredImage
from lavis_lite.common.registry import did_you_mean
from lavis_lite.common.sources import download
from lavis_lite.common.video_io import decode, processed
from lavis_lite.datasets.annotations import place_of, read_records
from lavis_lite.datasets.folders import list_files
from lavis_lite.datasets.image import open_image, opening_settings

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow")
LISTS = (".txt", ".lst")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")

ImageLike = str | Path | StoredImage | Image.Image | np.ndarray | torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image, with its name in the output and the other fields of its row in a table."""

    name: str
    image: ImageLike
    fields: Mapping[str, Any] = field(default_factory=dict)


def find_items(sources: Iterable[str | Path], *, column: str = "image") -> list[Item]:
    """Return the images that the sources name, each once, in their order; a folder's are sorted by path.

    A source is an image file, a folder (with its subfolders), a pattern such as `photos/*.jpg`, a URL of an image, a
    `.txt` file with one path or URL per line, or a table (`TABLES`) whose `column` has the paths or, in parquet and
    Arrow files, the images themselves. Paths in a list or table are relative to its folder.

    Raises:
        MissingFileError: a source does not exist.
        InputError: a source has no image, or a table has no such column.
    """
    found: dict[tuple[str, str], Item] = {}
    for source in sources:
        items = list(_items_of(str(source), column))
        if not items:
            raise InputError(f"{source}: has no image; images end with {', '.join(sorted(SUFFIXES))}")
        for item in items:
            found.setdefault((item.name, repr(item.fields)), item)
    return list(found.values())


def one_item(source: str) -> Item:
    """Return the image that a source names. InputError if it has several."""
    (item, *others) = find_items([source])
    if others:
        raise InputError(f"{source}: has {len(others) + 1:,} images; name one of them")
    return item


def _items_of(source: str, column: str) -> Iterator[Item]:
    path = Path(source).expanduser()
    if download.is_url(source):
        yield Item(name=source, image=source)
    elif path.is_dir():
        yield from (Item(name=str(path / name), image=path / name) for name in list_files(path) if _is_image(name))
    elif path.suffix.lower() in TABLES and path.is_file():
        yield from _items_of_table(path, column)
    elif path.suffix.lower() in LISTS and path.is_file():
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        yield from (_item_below(path.parent, line.strip()) for line in lines if line.strip())
    elif path.is_file():
        yield Item(name=source, image=path)
    elif glob.has_magic(source):
        matches = sorted(glob.glob(str(path), recursive=True))
        yield from (Item(name=match, image=Path(match)) for match in matches if _is_image(match))
    else:
        raise MissingFileError(
            f"{source}: no such file or folder; give images, folders, patterns, URLs, lists or tables"
        )


def _is_image(name: str) -> bool:
    return not Path(name).name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def _items_of_table(path: Path, column: str) -> Iterator[Item]:
    for number, record in enumerate(_rows(path)):
        value = record.get(column)
        if isinstance(value, StoredImage):
            texts = {name: other for name, other in record.items() if not isinstance(other, StoredImage)}
            yield Item(name=f"{path}: row {number}", image=value, fields=texts)
            continue
        if not isinstance(value, str) or not value:
            raise InputError(
                f"{place_of(path, number)} has no path in the column {column!r}. {did_you_mean(column, record)} "
                "--image-column names another"
            )
        yield _item_below(path.parent, value, record)


def _rows(path: Path) -> Sequence[Record]:
    if path.suffix.lower() not in (".parquet", ".arrow"):
        return read_records(path)
    from lavis_lite.datasets.tables import Table

    table = Table([path], split="", columns={}, root=path.parent)
    return table.records(range(len(table)))


def _item_below(folder: Path, value: str, fields: Mapping[str, Any] | None = None) -> Item:
    image = value if download.is_url(value) else folder / Path(value).expanduser()
    return Item(name=value, image=image, fields=fields or {})


def as_items(inputs: Any) -> list[Item]:
    """Return the items of a call in Python: one image or several, as paths, PIL images, arrays (H,W,3) or tensors.

    Strings may be all that `find_items` takes. Images in memory are named by their number.
    """
    values = [inputs] if isinstance(inputs, str | Path | Image.Image | np.ndarray | torch.Tensor) else list(inputs)
    items: list[Item] = []
    for value in values:
        if isinstance(value, Item):
            items.append(value)
        elif isinstance(value, str | Path):
            items += find_items([value])
        else:
            items.append(Item(name=str(len(items)), image=value))
    return items


def load_image(item: Item, processor: Any) -> torch.Tensor:
    """Return the processed image (3,S,S) of an item; a float tensor (3,H,W) is taken as processed.

    Raises:
        UnreadableSample: the file is missing or broken; the message names it.
        InputTypeError: an object that is not an image.
    """
    image = item.image
    if isinstance(image, torch.Tensor):
        if image.is_floating_point() and image.dim() == 3:
            return image
        image = image.permute(1, 2, 0).numpy() if image.dim() == 3 and image.shape[0] in (1, 3) else image.numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            shape = f"{image.dtype} {tuple(image.shape)}"
            raise InputTypeError(f"image {item.name}: an array must be uint8 (H,W,3) or (H,W), got {shape}")
        image = Image.fromarray(image.squeeze())
    if isinstance(image, str | Path | StoredImage):
        image = open_source(item, processor)
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        raise InputTypeError(f"image {item.name}: expected a path, a PIL image, an array or a tensor, got {kind}")
    tensor: torch.Tensor = processor(image)
    return tensor


def open_source(item: Item, processor: Any) -> Image.Image:
    """Return the picture of an item that is a path, a URL or in a table, as the image processor reads files."""
    if isinstance(item.image, StoredImage):
        return open_image(item.image, **opening_settings(processor))
    source = str(item.image)
    try:
        path = download.fetch(source) if download.is_url(source) else Path(source)
    except UnreachableError as error:  # one picture of many
        raise UnreadableSample(str(error)) from error
    return open_image(path, **opening_settings(processor))


def load_video(path: str | Path, processor: Callable[[Any], Any], *, num_frames: int) -> torch.Tensor:
    """Return `num_frames` processed frames (3,F,S,S) of a video file.

    Raises UnreadableSample if it is broken, MissingFileError.
    """
    return processed(decode(path, num_frames), processor)


def column_of(items: Sequence[Item], column: str, flag: str) -> list[str]:
    """Return a text column of the items' tables. InputError, naming item and `flag`, where one has none."""
    texts = []
    for item in items:
        value = item.fields.get(column)
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{item.name}: no text in the column {column!r} ({flag}); it has {[*item.fields]}")
        texts.append(value)
    return texts
