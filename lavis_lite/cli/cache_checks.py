"""Checks of `model.cache_features` before a run: the encoder is frozen, and an image's pixels are always the same."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from lavis_lite.common import dist
from lavis_lite.common.config.agreement import model_setting
from lavis_lite.common.config.config import Config
from lavis_lite.common.errors import SettingError, UnreadableSample
from lavis_lite.common.hardware import GIB
from lavis_lite.common.precision import PRECISIONS
from lavis_lite.common.rng import hash_seed, preserve_rng_state, seed_sample
from lavis_lite.common.token_store import image_digests
from lavis_lite.datasets.protocols import SampleDataset
from lavis_lite.datasets.streams import StreamDataset
from lavis_lite.models.base import BaseModel
from lavis_lite.runners.encoded import RowForm, cache_root, row_form
from lavis_lite.runners.loaders import Datasets, train_sets

KEY = "model.cache_features"
NUM_COMPARED, SEEDS = 8, (1, 2, 3)
"""Images of a training set that are read under these seeds. If a transform only mirrors half of them, all are the same
each time with a probability of 0.002 percent."""


def is_cached(cfg: Config) -> bool:
    """Return whether the run keeps the image encoder's tokens. SettingError for a wrong value of the key."""
    return cache_root(cfg.model.get("cache_features")) is not None and not cfg.run.evaluate


def check_transforms(cfg: Config, datasets: Datasets) -> None:
    """Read some images of each training set under several seeds, on rank 0 for all.

    Raises:
        InputError: their pixels differ, or samples have other than one image.
    """

    def check() -> None:
        for name, dataset in train_sets(datasets, cfg.run.train_splits).items():
            with preserve_rng_state():
                images = dataset.first_block() if isinstance(dataset, StreamDataset) else dataset
                readings = {tuple(_digests(images, name, seed=seed)) for seed in SEEDS}
            if len(readings) > 1:
                block = (cfg.datasets[name].get("vis_processor") or {}).get("train") or {}
                where = f"datasets.{name}.vis_processor.train"
                problem = f"{block.get('name', 'the transform')} gives an image other pixels each time it is read"
                advice = "set name: blip_image_eval there, or leave cache_features out"
                raise SettingError(where, f"{problem}, so {KEY} would never find its tokens again; {advice}")

    if is_cached(cfg):
        dist.on_main(check)


def _digests(dataset: SampleDataset, name: str, *, seed: int) -> Iterator[bytes]:
    """Yield digests of the pixels of some samples, read under a seed."""
    count = min(NUM_COMPARED, len(dataset))
    for number in range(count):
        seed_sample(hash_seed(seed, number))
        try:
            sample = dataset[number * len(dataset) // count]
        except UnreadableSample:  # judged when the samples were checked
            continue
        image = sample.get("image")
        if not torch.is_tensor(image) or image.dim() != 3:
            found = f"{tuple(image.shape)}" if torch.is_tensor(image) else f"{sorted(sample)}"
            problem = f"keeps the tokens of one image (3,H,W) per sample; those of {name!r} have {found}"
            raise SettingError(KEY, f"{problem}; leave it out")
        yield from image_digests(image[None])


def check_encoder(cfg: Config, model: BaseModel) -> None:
    """Raise InputError if the model's image encoder is not frozen, its parameters are sharded, or no folder for the
    tokens can be made. For one rank.
    """
    root = cache_root(cfg.model.get("cache_features"))
    if root is None or not is_cached(cfg):
        return
    model.frozen_encoder()
    check_folder(root)
    if cfg.run.parallel == "fsdp":
        problem = "processes encode different images at different times, which a sharded encoder cannot"
        raise SettingError(KEY, f"{problem}; set run.parallel: ddp, or leave cache_features out")


def check_folder(root: Path) -> None:
    """Raise SettingError if `root` is not a folder, or can be neither written nor made."""
    place = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not place.is_dir():
        raise SettingError(KEY, f"{place} is not a folder; name one for the tokens")
    if not os.access(place, os.W_OK):
        raise SettingError(KEY, f"no permission to write in {place}; name another folder")


def cache_lines(cfg: Config, model: BaseModel, datasets: Datasets) -> list[str]:
    """Return the dry run's lines about the space that the tokens take; the model is on the meta device."""
    root = cache_root(cfg.model.get("cache_features"))
    if root is None or not is_cached(cfg):
        return []
    dtype = PRECISIONS.get(cfg.run.precision, torch.float32)
    size = model_setting(cfg.model, "image_size")
    shape, kind = row_form(model, size=size, device=torch.device("meta"), dtype=dtype)
    form = RowForm(folder=root, shape=shape, dtype=kind)
    count = sum(map(len, train_sets(datasets, cfg.run.train_splits).values()))
    place = next(parent for parent in (root, *root.absolute().parents) if parent.is_dir())
    tokens = f"{' x '.join(map(str, shape))} of {str(kind).removeprefix('torch.')}, {form.row_bytes:,} bytes per image"
    space = f"at most {form.row_bytes * count / GIB:,.2f} GiB for {count:,} samples"
    free = f"{shutil.disk_usage(place).free / GIB:,.2f} GiB free"
    is_auto = model_setting(cfg.model, "vit_precision") == "auto"
    halved = "; half of it on a GPU, by vit_precision: auto" if is_auto else ""
    return [f"tokens      {tokens}; {space} (less where samples share an image{halved}), {free} in {root}"]
