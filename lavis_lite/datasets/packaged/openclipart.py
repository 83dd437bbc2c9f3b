"""Openclipart: 8,000 public-domain pictures with people's own titles and keywords, and with a web's noise.

Debian's `openclipart-png` has the pictures, `openclipart-svg` the texts. Pictures that look the same (equal
fingerprints), or have one title and similar fingerprints, are in one split; large groups of them are in `train`.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from lavis_lite.common.errors import UnreadableSample
from lavis_lite.common.progress import progress
from lavis_lite.common.records import Record
from lavis_lite.datasets.image import open_image
from lavis_lite.datasets.packaged.store import SPLITS, Splits

logger = logging.getLogger(__name__)

PLACES = ("/usr/share/openclipart",)
NEEDED = ("png", "svg")
ADVICE = (
    "install Debian's packages openclipart-png and openclipart-svg (`apt-get install openclipart-png openclipart-svg`)"
)
DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
METADATA = re.compile(rb"<metadata.*?</metadata>", re.DOTALL)
WORK, ITEM = "Work", "li"
SIDE = 16
"""Pixels per side of a fingerprint."""
NEAR = SIDE * SIDE // 10
"""Pixels in which fingerprints of similar pictures differ at most."""
SHARES = {"test": 0.1, "val": 0.05}
"""Of the groups of similar pictures."""
MOST_ALIKE = 5
"""Pictures of a group that is not in `train`; some series of icons have hundreds."""


def make(root: Path, aside: Path) -> Splits:
    """Return the records of each split: `image` (below `root`), `caption` (the title), and, where there are some,
    `description`, `keywords`; `folder` is the picture's place in the collection. Pictures without title are left out.
    `names_subject` is a weak label: 1 if the title shares a word with keywords, description or folder, else 0.
    """
    records, prints, num_left_out = [], {}, 0
    paths = sorted((root / "png").rglob("*.png"))
    for path in progress(paths, len(paths), name="reading pictures"):
        place = path.relative_to(root / "png")
        texts = texts_of(root / "svg" / place.with_suffix(".svg"))
        if not texts.get("caption"):
            num_left_out += 1
            continue
        try:
            prints[str(place)] = fingerprint(open_image(path))
        except UnreadableSample as error:
            logger.warning(f"left out: {error}")
            continue
        file = f"png/{place}"
        record = {"image": file, "image_id": str(place), **texts, "folder": str(place.parent)}
        records.append({**record, "names_subject": int(names_subject(record))})
    logger.info(f"{num_left_out:,} pictures without title are left out")
    groups = grouped({row["image_id"]: row["caption"] for row in records}, prints)
    found: dict[str, list[Record]] = {split: [] for split in SPLITS}
    sizes = Counter(groups.values())
    for row in records:
        group = groups[row["image_id"]]
        found["train" if sizes[group] > MOST_ALIKE else split_of(group)].append(row)
    return found


def split_of(group: str) -> str:
    """Return the split of a group of similar pictures, by its hash."""
    share, start = int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 16**8, 0.0
    for split, part in SHARES.items():
        start += part
        if share < start:
            return split
    return "train"


def texts_of(path: Path) -> Record:
    """Return the title (`caption`), description and keywords in an SVG file's metadata; those that are there."""
    found = METADATA.search(path.read_bytes()) if path.is_file() else None
    if found is None:
        return {}
    try:
        tree = ElementTree.fromstring(found[0])
    except ElementTree.ParseError:
        return {}
    work = next((part for part in tree.iter() if part.tag.endswith(f"}}{WORK}")), None)
    if work is None:
        return {}
    texts = {name: _text(work.find(DUBLIN_CORE + key)) for name, key in (("caption", "title"), ("description",) * 2)}
    subject = work.find(f"{DUBLIN_CORE}subject")
    items = [] if subject is None else [_text(item) for item in subject.iter() if item.tag.endswith(f"}}{ITEM}")]
    keywords = {"keywords": list(dict.fromkeys(filter(None, items)))}
    return {name: value for name, value in (texts | keywords).items() if value}


def names_subject(record: Mapping[str, Any]) -> bool:
    """Return whether a title shares a word, apart from a plural's s, with what people filed the picture under."""
    about = [record["folder"], record.get("description", ""), *record.get("keywords", [])]
    return bool(_words(record["caption"]) & _words(" ".join(about)))


def _words(text: str) -> set[str]:
    return {word.removesuffix("s") for word in re.findall("[a-z]{3,}", text.lower())}


def _text(part: ElementTree.Element | None) -> str:
    return "" if part is None else " ".join((part.text or "").split())


def fingerprint(image: Image.Image) -> np.ndarray:
    """Return (256,) bits: whether each of 16 x 16 cells is brighter than the cell to its right."""
    small = np.asarray(image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX), dtype=np.int16)
    return (small[:, :-1] > small[:, 1:]).ravel()


def grouped(titles: Mapping[str, str], prints: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return the group of each picture, named by one of its pictures."""
    parent = {name: name for name in titles}

    def top(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    def join(names: Iterable[str]) -> None:
        first, *others = names
        for other in others:
            parent[top(other)] = top(first)

    alike, titled = defaultdict(list), defaultdict(list)
    for name, title in titles.items():
        alike[prints[name].tobytes()].append(name)
        titled[title.lower()].append(name)
    for names in alike.values():
        join(names)
    for names in titled.values():
        bits = np.stack([prints[name] for name in names])
        for i, name in enumerate(names):
            near = np.flatnonzero((bits[i + 1 :] != bits[i]).sum(axis=1) <= NEAR)
            join([name, *(names[i + 1 + j] for j in near.tolist())])
    smallest: dict[str, str] = {}
    for name in sorted(titles):
        smallest.setdefault(top(name), name)
    return {name: smallest[top(name)] for name in titles}
