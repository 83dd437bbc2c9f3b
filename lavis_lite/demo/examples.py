"""Example images of a demo: scenes of the generated dataset `shapes`, as the quickstarts' models know them."""

import random
from pathlib import Path

from lavis_lite.common.rng import hash_seed
from lavis_lite.datasets.shapes.render import render
from lavis_lite.datasets.shapes.scene import SceneMaker, ShapesConfig

NUM_IMAGES = 24
NUM_SHOWN = 6
"""Examples to click on; all are in the folder that can be searched."""
TEXT = "a red circle"
QUESTION = "what color is the circle"


def write_examples(folder: Path) -> list[Path]:
    """Write scenes of the split `test` of the quickstart's settings; the same ones each time."""
    folder.mkdir(parents=True, exist_ok=True)
    config = ShapesConfig(colors=8, shapes=["circle", "cross", "triangle"], max_objects=2, sizes=["large"])
    config.check()
    maker, paths = SceneMaker(config), []
    for number in range(NUM_IMAGES):
        scene = maker.make("test", random.Random(hash_seed("demo", number)))
        paths.append(folder / f"shapes_{number + 1:02}.png")
        render(scene, config.image_size).save(paths[-1])
    return paths
