"""Image processors with `backend: torchvision`, against those of Pillow."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lavis_lite.common.config.files import ConfigError
from lavis_lite.common.registry import registry
from lavis_lite.processors import load_processor
from lavis_lite.processors.randaugment import RandomAugment

PLAIN = {"mean": [0, 0, 0], "std": [1, 1, 1]}


def picture(size: tuple[int, int] = (125, 93)) -> Image.Image:
    """Smooth colours and noise, like a photograph."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = np.asarray(small) + rng.normal(0, 12, (size[1], size[0], 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(125, 93), (40, 90), (1, 1), (7, 300)])
@pytest.mark.parametrize(
    "block",
    [
        {"name": "blip_image_eval"},
        {"name": "clip_image_eval"},
        {"name": "blip2_image_train"},
        {"name": "clip_image_train"},
        {"name": "blip_image_train", "randaugment": False},
    ],
    ids=lambda block: block["name"],
)
def test_pixels_are_within_a_step_of_pillow_s(block: dict[str, Any], size: tuple[int, int]) -> None:
    """The seed gives the same crop and mirror: another one would differ by far more."""
    image = picture(size)
    theirs, ours = (
        load_processor(block["name"], {**block, **PLAIN, "image_size": 48, "backend": backend})
        for backend in ("pillow", "torchvision")
    )
    for seed in range(6):
        made = []
        for processor in (theirs, ours):
            torch.manual_seed(seed)
            made.append(processor(image))
        difference = ((made[0] - made[1]) * 255).abs()
        assert difference.max() <= 1.001
        assert difference.mean() < 0.05


def test_enlarged_pixels_are_within_two_steps() -> None:
    """Both round after the rows and after the columns; a step between them may become two."""
    small = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((90, 120), Image.Resampling.BICUBIC)
    theirs, ours = (
        load_processor("blip_image_eval", {"image_size": 384, **PLAIN, "backend": backend})(image)
        for backend in ("pillow", "torchvision")
    )
    difference = ((theirs - ours) * 255).abs()
    assert 1.001 < difference.max() <= 2.001
    assert difference.mean() < 0.01


def test_without_resizing_the_results_are_equal() -> None:
    image = picture((48, 48))
    theirs, ours = (
        load_processor("blip_image_eval", {"image_size": 48, "backend": b}) for b in ("pillow", "torchvision")
    )
    assert torch.equal(ours(image), theirs(image))


def test_randaugment_does_the_same_to_a_tensor() -> None:
    image, augment, changed = picture((64, 48)), RandomAugment(2, 5, probability=1.0), 0
    for seed in range(20):
        torch.manual_seed(seed)
        expected = np.asarray(augment(image))
        torch.manual_seed(seed)
        made = augment(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        np.testing.assert_array_equal(made.permute(1, 2, 0).numpy(), expected)
        changed += not np.array_equal(expected, np.asarray(image))
    assert changed > 10


def test_a_recipe_chooses_it(tmp_path: Path) -> None:
    """Through a dataset, as the key of its processor."""
    picture().save(tmp_path / "a.jpg")
    (tmp_path / "train.json").write_text(json.dumps([{"image": "a.jpg", "caption": "a thing"}]))
    info = {"annotations": {"train": {"storage": str(tmp_path / "train.json")}}, "images": {"storage": str(tmp_path)}}
    block = {"name": "blip_image_eval", "image_size": 48, **PLAIN}
    made = {
        backend: registry.get_builder_class("pairs")(
            build_info=info, vis_processor={"train": {**block, "backend": backend}}
        ).build(["train"])["train"][0]["image"]
        for backend in ("pillow", "torchvision")
    }
    difference = (made["torchvision"] - made["pillow"]).abs() * 255
    assert 0 < difference.max() <= 1.001


def test_an_unknown_backend_is_named() -> None:
    for name in ("blip_image_eval", "blip_image_train", "clip_image_eval"):
        with pytest.raises(ConfigError, match=r"backend: .*'pil'.*'pillow'"):
            load_processor(name, {"backend": "pil"})
