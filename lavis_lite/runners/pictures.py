"""A few predictions of an evaluation as pictures, for TensorBoard and trackers: always those of the same samples."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from lavis_lite.common.errors import UnreadableSample
from lavis_lite.common.tiles import Tile, draw
from lavis_lite.datasets.image import open_image
from lavis_lite.tasks.predictions import Prediction, drawn

NUM_PICTURES = 8
SIZE = 224


def pictures_of(predictions: Sequence[Prediction], *, seed: int) -> list[tuple[Image.Image, str]]:
    """Return pictures of predictions drawn by the seed, with the texts that are drawn in them."""
    tiles = [tile_of(row) for row in drawn(predictions, NUM_PICTURES, seed=seed)]
    return [(draw(tile), "; ".join(tile.texts)) for tile in tiles]


def tile_of(row: Prediction) -> Tile:
    """Return the tile of a prediction; an image that cannot be read, as a video's file, is left out."""
    images, error = [], ""
    for path in row["images"][:2]:
        try:
            images.append(ImageOps.contain(open_image(Path(path)), (SIZE, SIZE)))
        except UnreadableSample:
            error = f"not shown: {Path(path).name}"
    texts = [row["input"]] if row.get("input") else []
    texts += [f"prediction: {row['prediction']}"] if "prediction" in row else []
    texts += [f"reference: {text}" for text in list(dict.fromkeys(row.get("references", [])))[:1]]
    texts += [f"{name}: {value:.4g}" for name, value in row.get("metrics", {}).items()]
    return Tile(title=row["instance_id"], images=images, texts=texts, error=error)
