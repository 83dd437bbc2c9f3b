"""Speed of reading training batches from shards and from files, against open_clip's own pipeline on the same shards.

    python benchmarks/shards.py                      # 8,000 JPEGs of 320 x 240 pixels, 2 workers
    python benchmarks/shards.py --images 200 --batch 8 --repeats 1     # some seconds, to check that it runs

Every row makes batches of the same pictures by the same image processor (a random crop of 224 x 224 pixels, normalised)
with their captions; the text is not tokenized. The first images, while buffers fill, do not count. The sources take
turns, and the median of the repeats is reported, per second and per core that the workers can use.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.registry import registry
from lavis_lite.runners.loaders import TrainLoader

SIZE = (320, 240)
PER_SHARD = 500
BUFFER = 1000


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sources", nargs="+", choices=[*SOURCES], default=[*SOURCES])
    parser.add_argument("--folder", type=Path, help="where pictures and shards are kept; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    return parser.parse_args(argv)


def jpeg(number: int) -> bytes:
    """Return a picture with the size of a photograph's file: blurred noise."""
    noise = np.random.default_rng(number).integers(0, 256, (SIZE[1] // 4, SIZE[0] // 4, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


def write(folder: Path, count: int) -> None:
    """Write the pictures as files with a table of captions, and as shards."""
    import webdataset

    images = folder / "images"
    images.mkdir(parents=True)
    records = []
    with webdataset.ShardWriter(
        str(folder / "train-%04d.tar"), maxcount=min(PER_SHARD, count // 8), verbose=0
    ) as shards:
        for number in range(count):
            name, content, caption = f"{number:07d}", jpeg(number), f"picture {number}"
            (images / f"{name}.jpg").write_bytes(content)
            records.append({"image": f"{name}.jpg", "caption": caption})
            shards.write({"__key__": name, "jpg": content, "txt": caption})
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def ours(folder: Path, arguments: argparse.Namespace, *, storage: str, **more: Any) -> Iterator[int]:
    """Yield the sizes of this package's training batches."""
    info = {"annotations": {"train": {"storage": str(folder / storage)}}, "images": {"storage": str(folder / "images")}}
    processor = {"train": {"name": "clip_image_train", "image_size": 224}}
    builder = registry.get_builder_class("pairs")(build_info=info, vis_processor=processor, **more)
    run = RunConfig(task="captioning", batch_size_train=arguments.batch, num_workers=arguments.workers)
    with contextlib.closing(iter(TrainLoader({"web": builder.build(["train"])["train"]}, run))) as batches:
        yield from (len(batch["image"]) for batch in batches)


def open_clip(folder: Path, arguments: argparse.Namespace) -> Iterator[int]:
    """Yield the sizes of the batches of open_clip's training pipeline, epoch after epoch.

    Its reader (3.3) does not know the marker that webdataset 1.0 puts after each shard, and stops there with a
    KeyError; the marker is switched off.
    """
    from open_clip_train import data as pipeline
    from webdataset.tariterators import tar_file_expander

    pipeline.tar_file_expander = functools.partial(tar_file_expander, eof_value=None)
    processor = registry.get_processor_class("clip_image_train").from_config({"image_size": 224})
    names = sorted(map(str, folder.glob("train-*.tar")))
    own = {"train_data": f"{folder}/train-{{0000..{len(names) - 1:04d}}}.tar", "train_num_samples": arguments.images}
    sizes = {"batch_size": arguments.batch, "workers": arguments.workers, "world_size": 1, "seed": 42}
    options = SimpleNamespace(**own, **sizes, dataset_resampled=False, train_data_upsampling_factors=None)
    data = pipeline.get_wds_dataset(options, processor, is_train=True, tokenizer=lambda text: [text])
    for epoch in itertools.count():
        data.set_epoch(epoch)
        yield from (len(images) for images, _ in data.dataloader)


SOURCES = {
    "files": lambda folder, arguments: ours(folder, arguments, storage="train.jsonl"),
    "shards, indexed": lambda folder, arguments: ours(folder, arguments, storage="train-*.tar"),
    "shards, streamed": lambda folder, arguments: ours(
        folder, arguments, storage="train-*.tar", stream={"epoch_length": arguments.images, "shuffle_buffer": BUFFER}
    ),
    "open_clip": open_clip,
}


def rate(batches: Iterator[int], arguments: argparse.Namespace) -> float:
    """Return images per second, after the first quarter."""
    with contextlib.closing(batches):
        skipped = measured = 0
        while skipped < arguments.images // 4:
            skipped += next(batches)
        began = time.perf_counter()
        while measured < arguments.images:
            measured += next(batches)
        return measured / (time.perf_counter() - began)


def main(argv: list[str] | None = None) -> None:
    """Measure all sources, in turns, and print the table."""
    arguments = parse(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "pictures"
        os.environ["LAVIS_LITE_CACHE"] = str(folder / "cache")
        if not (folder / "train.jsonl").is_file():
            write(folder, arguments.images)
        rates: dict[str, list[float]] = {name: [] for name in arguments.sources}
        for _ in range(arguments.repeats):
            for name in arguments.sources:
                rates[name].append(rate(SOURCES[name](folder, arguments), arguments))
    cores = min(max(arguments.workers, 1), len(os.sched_getaffinity(0)))
    print(f"{arguments.images:,} JPEGs, batches of {arguments.batch}, {arguments.workers} workers, {cores} cores")
    print("| source | images per second | per core | all repeats |\n| --- | --- | --- | --- |")
    rows = []
    for name, found in rates.items():
        median = statistics.median(found)
        rows.append({"source": name, "images_per_s": median, "per_core": median / cores, "repeats": found})
        print(f"| {name} | {median:.0f} | {median / cores:.0f} | {', '.join(f'{one:.0f}' for one in found)} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
