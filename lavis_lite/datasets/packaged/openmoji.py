"""OpenMoji: emoji as colour and line drawings with names, tags and groups (openmoji.org, CC BY-SA 4.0).

npm's package has SVG files, which resvg renders; a folder of OpenMoji's own PNG files serves too. All skin tones and
both drawings of an emoji are in one split.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from PIL import Image

from lavis_lite.common.errors import InputError, MissingPackageError
from lavis_lite.common.progress import progress
from lavis_lite.common.records import Record
from lavis_lite.datasets.annotations import read_json
from lavis_lite.datasets.packaged.store import SPLITS, Splits, split_of_keys

INDEX = "data/openmoji.json"
PLACES = ("openmoji", "node_modules/openmoji", "package")
ADVICE = "run `npm install openmoji`, or `npm pack openmoji` and `tar xzf openmoji-*.tgz`"
Drawing = Literal["color", "black"]
DRAWINGS: tuple[Drawing, ...] = ("color", "black")
PNG_FOLDERS = ("618x618", "72x72")
NUM_TEST, NUM_VAL = 500, 300
"""Emoji, without their skin tones."""


def make(root: Path, aside: Path, *, size: int, skin_tones: bool, drawings: Sequence[Drawing] = DRAWINGS) -> Splits:
    """Write the drawings as PNG files of `size` pixels on white, and return the records of each split.

    A record has `image`, `caption` (the name), `tags`, `group`, `subgroup`, `drawing` and `emoji_id`, that of the emoji
    without skin tone.
    """
    entries = read_json(root / INDEX)
    for entry in entries:
        entry["base"] = entry["skintone_base_hexcode"] or entry["hexcode"]
    splits = split_of_keys((entry["base"] for entry in entries), num_test=NUM_TEST, num_val=NUM_VAL)
    found: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for entry in progress(entries, len(entries), name="drawing emoji"):
        if entry["skintone"] and not skin_tones:
            continue
        for drawing, picture in _drawings(root, entry["hexcode"], size, drawings):
            file = f"images/{drawing}/{entry['hexcode']}.png"
            (aside / file).parent.mkdir(parents=True, exist_ok=True)
            picture.save(aside / file)
            found[splits[entry["base"]]].append(record(entry, drawing, file))
    return found


def record(entry: Record, drawing: str, file: str) -> Record:
    """Return the record of a drawing."""
    tags = [tag.strip() for key in ("tags", "openmoji_tags") for tag in entry[key].split(",") if tag.strip()]
    return {
        **{"image": file, "image_id": f"{entry['hexcode']}-{drawing}", "caption": entry["annotation"]},
        **{"tags": list(dict.fromkeys(tags)), "group": entry["group"], "subgroup": entry["subgroups"]},
        **{"label": entry["group"], "drawing": drawing, "emoji_id": entry["base"]},
    }


def _drawings(root: Path, hexcode: str, size: int, drawings: Sequence[Drawing]) -> Iterator[tuple[str, Image.Image]]:
    for drawing in drawings:
        pngs = [root / drawing / folder / f"{hexcode}.png" for folder in PNG_FOLDERS]
        path = next((png for png in pngs if png.is_file()), root / drawing / "svg" / f"{hexcode}.svg")
        if path.is_file():
            yield drawing, on_white(path, size)


def on_white(path: Path, size: int) -> Image.Image:
    """Return a drawing of (size, size) pixels on white. InputError, with the file, for one that cannot be read."""
    try:
        data = render(path, size) if path.suffix == ".svg" else path.read_bytes()
        drawing = Image.open(io.BytesIO(data)).convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be drawn ({error}); unpack the package again") from error
    return Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB")


def render(path: Path, size: int) -> bytes:
    """Return an SVG file as PNG. MissingPackageError without resvg."""
    try:
        import resvg_py
    except ImportError as error:
        raise MissingPackageError("OpenMoji's SVG files need resvg_py: `pip install lavis-lite[pictures]`") from error
    return bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=size, height=size))
