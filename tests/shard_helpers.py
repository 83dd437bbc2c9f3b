"""Small WebDataset shards, written by the `webdataset` package itself."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import webdataset
from PIL import Image

SIZE = 16


def picture(number: int) -> Image.Image:
    """A picture of two colours, the left of which tells its number."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    image.paste((number % 256, number // 256, 200), (0, 0, SIZE // 2, SIZE))
    return image


def png(number: int) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    picture(number).save(buffer, "png")
    return buffer.getvalue()


def sample(number: int) -> dict[str, Any]:
    """A pair: picture and caption, both of which tell the number."""
    return {"__key__": f"{number:06d}", "png": png(number), "txt": f"picture number {number}"}


def write_shard(path: Path, samples: Sequence[Mapping[str, Any]]) -> Path:
    """Write samples by `webdataset.TarWriter`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for one in samples:
            writer.write({key: encoded(value) if key != "__key__" else value for key, value in one.items()})
    return path


def encoded(value: Any) -> bytes:
    """Bytes as they are, a text in UTF-8, anything else as JSON."""
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else json.dumps(value)).encode()


def write_shards(folder: Path, sizes: Sequence[int], *, name: str = "train") -> list[Path]:
    """Shards `<name>-0000.tar` ... of these sizes, whose samples are numbered throughout."""
    paths, first = [], 0
    for number, size in enumerate(sizes):
        paths.append(write_shard(folder / f"{name}-{number:04d}.tar", [sample(n) for n in range(first, first + size)]))
        first += size
    return paths


def stream_section(folder: Path, *, world: int = 1, **changes: Any) -> dict[str, Any]:
    """The section of a captioning set whose training split is a stream of five small shards per process."""
    shards = write_shards(folder / f"shards{world}", [7, 5, 9, 4, 6] * world)
    crops = {"name": "blip_image_train", "image_size": 48}
    return {
        "layout": "caption",
        "build_info": {"annotations": {"train": {"storage": [str(path) for path in shards]}}},
        "stream": {"epoch_length": 24, "shuffle_buffer": 4, **changes},
        "vis_processor": {"train": crops, "eval": crops | {"name": "blip_image_eval"}},
        "text_processor": {"train": {"name": "blip_caption", "prompt": "a picture of "}},
    }
