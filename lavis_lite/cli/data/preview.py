"""`data preview`: a contact sheet of samples with their texts, as a PNG or as one HTML page.

Samples are those that a model gets, but for the image, which is shown whole: drawn wordings, instructions and cleaned
texts are as in a run. Of a video some frames are shown beside each other.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lavis_lite.cli.data.check import spread
from lavis_lite.cli.data.named import NamedDataset, find_datasets, require_samples
from lavis_lite.cli.sheet import write_html, write_png
from lavis_lite.common.errors import InputError, UnreadableSample
from lavis_lite.common.feature_io import read_features
from lavis_lite.common.rng import preserve_rng_state
from lavis_lite.common.tiles import Tile
from lavis_lite.datasets.base import BaseDataset
from lavis_lite.datasets.features import ReadsFeatures
from lavis_lite.datasets.streams import StreamDataset

SIZE = 224
HIDDEN = ("instance_id", "n_answers", "weight", "index")
"""Keys of samples that say nothing about their content."""
TRUTH = ("caption", "answers", "label")
"""Keys of an evaluation's records that hold what is compared with the model's output."""
WRITERS = {".png": write_png, ".html": write_html, ".htm": write_html}


def run(args: argparse.Namespace) -> int:
    """Write the sheet, and print its path; return 1 if a sample cannot be read."""
    write = WRITERS.get(args.out.suffix.lower())
    if write is None:
        raise InputError(f"--out: {args.out}: expected a .png or an .html file")
    if args.n < 1:
        raise InputError(f"-n: must be at least 1, got {args.n}")
    found = find_datasets(args.dataset, splits=args.split, options=args.options)
    require_samples(found, args.dataset)
    tiles = [tile for one in found for tile in tiles_of(one, all_splits=bool(args.split), count=args.n)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write(tiles, args.out, title=f"Samples of {args.dataset}")
    broken = sum(bool(tile.error) for tile in tiles)
    print(f"{args.out}: {len(tiles)} samples" + (f", {broken} of them cannot be read" if broken else ""))
    return 1 if broken else 0


def tiles_of(named: NamedDataset, *, all_splits: bool, count: int) -> list[Tile]:
    """Return tiles of `count` samples per split, spread over it: of all splits that are meant, or of the first one."""
    splits = named.splits if all_splits else named.splits[:1]
    tiles = []
    for split, dataset in named.builder.build(splits).items():
        if isinstance(dataset, StreamDataset):
            advice = f"`--options datasets.{named.name}.stream=null` shows shards of this machine"
            raise InputError(f"{named.name}/{split}: is read as a stream, whose samples have no order: {advice}")
        if not isinstance(dataset, BaseDataset):
            raise InputError(f"{named.name}/{split}: {type(dataset).__name__} is not a BaseDataset and cannot be shown")
        dataset.vis_processor = HeatMap() if isinstance(dataset.vis_processor, ReadsFeatures) else thumbnail
        numbers = spread(range(len(dataset)), count)
        tiles += [tile_of(dataset, number, f"{named.name}/{split} {number}") for number in numbers]
    return tiles


def tile_of(dataset: BaseDataset, number: int, title: str) -> Tile:
    """Return the tile of one sample, or of the error about it."""
    try:
        with preserve_rng_state():
            torch.manual_seed(number)
            sample = dataset[number]
    except UnreadableSample as error:
        return Tile(title=title, error=str(error))
    images = [image for value in sample.values() if torch.is_tensor(value) for image in pictures(value)]
    truth = {} if dataset.training else dataset.annotation[number]
    return Tile(title=title, images=images, texts=texts_of(sample, truth))


def thumbnail(image: Image.Image) -> Tensor:
    """Return the whole image, as large as fits, as a tensor (3, SIZE, SIZE) of bytes, on grey."""
    small = ImageOps.contain(image, (SIZE, SIZE))
    sheet = Image.new("RGB", (SIZE, SIZE), (236, 236, 236))
    sheet.paste(small, ((SIZE - small.width) // 2, (SIZE - small.height) // 2))
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)


class HeatMap:
    """Shows features (N,W) as a picture: tokens from left to right, the first channel at the top."""

    def __call__(self, image: Image.Image) -> Tensor:
        return thumbnail(image)

    def read_features(self, path: str | Path) -> Tensor:
        """Return the picture (3, SIZE, SIZE) of a file; the lowest value is black, the highest white."""
        features = read_features(path).T
        shown = (features - features.min()) / (features.max() - features.min()).clamp(min=1e-12)
        return thumbnail(Image.fromarray((255 * shown).byte().numpy()).convert("RGB"))


def pictures(value: Tensor) -> list[Image.Image]:
    """Return the images of a tensor (3,H,W) or (3,F,H,W) of `thumbnail`; none of another tensor."""
    if value.dtype != torch.uint8 or value.dim() not in (3, 4) or value.shape[0] != 3:
        return []
    frames = [value] if value.dim() == 3 else list(value.unbind(1))
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]


def texts_of(sample: Mapping[str, Any], truth: Mapping[str, Any]) -> list[str]:
    """Return `key: value` of the sample's texts and numbers, and of the truth, an evaluation sample's record."""
    texts = {key: value for key, value in sample.items() if key not in HIDDEN and not torch.is_tensor(value)}
    if "prompt" in texts and texts["prompt"] in ("{}", texts.get("text_input")):
        del texts["prompt"]
    texts |= {key: truth[key] for key in TRUTH if truth.get(key) not in (None, [])}
    return [f"{key}: {_shown(value)}" for key, value in texts.items()]


def _shown(value: Any) -> str:
    return " | ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
