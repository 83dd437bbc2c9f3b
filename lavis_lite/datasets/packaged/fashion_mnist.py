"""Fashion-MNIST: 70,000 grey pictures of clothes, 28 x 28 pixels, in ten classes (Zalando Research, MIT licence).

The official test set is `test`; the last 5,000 of the official training set are `val`.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from PIL import Image

from lavis_lite.common.errors import InputError
from lavis_lite.common.records import Record
from lavis_lite.datasets.packaged.store import Splits

CLASSES = (
    *("t-shirt or top", "trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
"""The names by label."""
FILES = {"train": "train", "test": "t10k"}
IMAGES, LABELS = "{}-images-idx3-ubyte.gz", "{}-labels-idx1-ubyte.gz"
NEEDED = tuple(form.format(name) for name in FILES.values() for form in (IMAGES, LABELS))
PLACES = ("/usr/share/datasets/fashion-mnist",)
ADVICE = "install Debian's package dataset-fashion-mnist (`apt-get install dataset-fashion-mnist`)"
NUM_VAL = 5000
HEADERS = {3: 16, 1: 8}
"""Bytes before the values, by number of dimensions."""


def make(root: Path, aside: Path, *, num_val: int = NUM_VAL) -> Splits:
    """Write the pictures as PNG files, and return the records {image, image_id, caption, label} of each split."""
    found: dict[str, list[Record]] = {}
    for split, name in FILES.items():
        images = read_idx(root / IMAGES.format(name), num_dims=3)
        labels = read_idx(root / LABELS.format(name), num_dims=1)
        if len(images) != len(labels) or labels.max(initial=0) >= len(CLASSES):
            raise InputError(f"{root}: {len(images)} pictures and {len(labels)} labels of {name}; install it again")
        (aside / "images" / split).mkdir(parents=True)
        found[split] = []
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            file = f"images/{split}/{number:05}.png"
            Image.fromarray(image).save(aside / file)
            own = {"image_id": f"{split}{number}", "caption": CLASSES[label], "label": CLASSES[label]}
            found[split].append({"image": file, **own})
    whole = found["train"]
    return {"train": whole[:-num_val], "val": whole[-num_val:], "test": found["test"]}


def read_idx(path: Path, *, num_dims: int) -> np.ndarray:
    """Return the bytes of a gzipped IDX file, (N,) or (N,H,W). InputError for a damaged one."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: damaged ({error}); install it again") from error
    start = HEADERS[num_dims]
    is_idx = len(content) >= start and content[:4] == bytes((0, 0, 8, num_dims))
    shape = np.frombuffer(content[4:start], dtype=">i4").tolist() if is_idx else []
    if not is_idx or len(content) - start != np.prod(shape):
        raise InputError(f"{path}: not an IDX file of bytes with {num_dims} dimensions; install it again")
    return np.frombuffer(content[start:], dtype=np.uint8).reshape(shape)
