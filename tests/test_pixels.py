"""`output: uint8` of training processors: the device normalises, to the same pixels bit for bit."""

from pathlib import Path
from typing import Any

import cli_helpers
import numpy as np
import pytest
import torch
from PIL import Image
from test_loaders import run_config

from lavis_lite.common.errors import InputError
from lavis_lite.common.pixels import MEAN, STD, normalised, statistics
from lavis_lite.common.registry import registry
from lavis_lite.common.rng import seed_sample
from lavis_lite.datasets.base import BaseDataset
from lavis_lite.runners.loaders import TrainLoader

TIMM = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}


def pictures(count: int) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (count, 40, 50, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in noise]


@pytest.mark.parametrize("backend", ["pillow", "torchvision"])
@pytest.mark.parametrize(
    ("name", "more"),
    [("blip_image_train", {}), ("clip_image_train", TIMM), ("blip_video_train", {"num_frames": 2, "hflip": False})],
)
def test_normalised_bytes_are_the_pixels_of_the_processor(name: str, more: dict[str, Any], backend: str) -> None:
    def batch(**output: str) -> dict[str, Any]:
        seed_sample(3)
        processor = registry.get_processor_class(name)(image_size=33, backend=backend, **more, **output)
        items = [pictures(2), pictures(3)[1:]] if "video" in name else pictures(2)
        images = [processor(item) for item in items]
        return {"image": torch.stack(images), **statistics(images, mean=processor.mean, std=processor.std)}

    plain, as_bytes = batch(), batch(output="uint8")
    assert as_bytes["image"].dtype == torch.uint8
    assert plain.keys() == {"image"}
    assert normalised(plain) is plain
    found = normalised(as_bytes)
    assert found.keys() == {"image"}
    assert torch.equal(found["image"], plain["image"])


def dataset(folder: Path, *, size: int = 32, name: str = "blip2_image_train", **processor: Any) -> BaseDataset:
    """Six pictures with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures(6)):
        picture.save(folder / f"{number}.png")
    records = [{"image": str(folder / f"{number}.png"), "caption": f"picture {number}"} for number in range(6)]
    eye = {"train": {"name": name, "image_size": size, **processor}}
    section = cli_helpers.user_set(folder, {"train": records}) | {"vis_processor": eye}
    return registry.get_builder_class("pairs")(**section).build(["train"])["train"]


def first_batch(*sets: BaseDataset) -> dict[str, Any]:
    named = {str(number): one for number, one in enumerate(sets)}
    run = run_config(batch_size_train=6, mixing="concat" if len(sets) > 1 else "per_step")
    return next(iter(TrainLoader(named, run)))


def test_a_batch_of_two_datasets_is_normalised_by_the_statistics_of_each(tmp_path: Path) -> None:
    plain = first_batch(dataset(tmp_path), dataset(tmp_path, **TIMM))
    found = first_batch(dataset(tmp_path, output="uint8"), dataset(tmp_path, output="uint8", **TIMM))
    assert found.keys() == plain.keys()
    assert torch.equal(found["image"], plain["image"])
    with pytest.raises(InputError, match=r"'0' and '1'.*'image' is .* of float32.*of uint8"):
        first_batch(dataset(tmp_path), dataset(tmp_path, output="uint8"))


def test_workers_pass_bytes_on(tmp_path: Path) -> None:
    own = dataset(tmp_path, output="uint8")
    batch = own.collater([own[0], own[1]])
    assert batch["image"].dtype == torch.uint8
    assert batch[MEAN].shape == batch[STD].shape == (2, 3)
    mixed = [own[0], {**own[1], "image": own[1]["image"].float()}]
    with pytest.raises(InputError, match="output: uint8"):
        own.collater(mixed)


def test_both_images_of_a_pair_are_normalised() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = normalised(
        {"image0": pixels, "image1": pixels.flip(0), "label": torch.ones(2), **statistics(pixels, **TIMM)}
    )
    assert torch.equal(batch["image0"], batch["image1"].flip(0))
    mean, std = (torch.tensor(TIMM[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(batch["image0"], (pixels / 255 - mean) / std)


def test_evaluation_processors_have_no_such_key() -> None:
    with pytest.raises((InputError, TypeError), match="output"):
        registry.get_processor_class("blip_image_eval").from_config({"output": "uint8"})


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_data")
def test_losses_are_those_of_normalised_pixels(tmp_path: Path) -> None:
    losses = []
    for output in ("float32", "uint8"):
        processor = {"vis_processor": {"train": {"name": "blip_image_train", "output": output}}}
        run = {"run": {"valid_splits": [], "test_splits": [], "max_iters": 2, "runner": "runner_iter"}}
        (tmp_path / output).mkdir()
        path = cli_helpers.project(tmp_path / output, "vqa_generate", {"datasets": {"shapes_vqa": processor}}, run)
        assert cli_helpers.train(path) == 0
        losses.append([row["loss"] for row in cli_helpers.steps(tmp_path / output / "output" / "job")])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
