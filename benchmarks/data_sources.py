"""Processor time per image of a training loader: files, tables and shards, and open_clip's pipeline on the same shards.

    python benchmarks/data_sources.py                                  # 2,000 JPEGs of 500 x 375, 2 workers
    python benchmarks/data_sources.py --sources files parquet --workers 4 --json rows.json
    python benchmarks/data_sources.py --tiny                           # some seconds, to check that it runs

Every source has the same JPEGs and captions, in a random order, with the same image processor at 224 pixels, in batches
of 32. Texts are not tokenized. The first quarter of a pass, while buffers fill, does not count. The sources take turns.
The processor time is that of the process and its workers, which other programs on the machine change little; the ratio
to the first source is of the same turn, its median and the smallest and largest of all turns.
"""

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.registry import registry
from lavis_lite.runners.loaders import TrainLoader

SIZE = (500, 375)
PER_SHARD = 250
BUFFER = 500


def draw(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write JPEGs with as much detail as photographs: smooth colours and noise, about 50 kB each at full size."""
    rng = np.random.default_rng(0)
    for number in range(count):
        small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = smooth + rng.normal(0, 12, smooth.shape).astype(np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:06d}.jpg", quality=85)


def write(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write the pictures as files with a list of captions, as four parquet files, as an Arrow file and as shards."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import webdataset

    images = folder / "images"
    images.mkdir()
    draw(images, count, size)
    paths = sorted(images.iterdir())
    captions = [f"picture {path.stem}" for path in paths]
    rows = [json.dumps({"image": path.name, "caption": text}) for path, text in zip(paths, captions, strict=True)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    table = pa.table({"image": [path.read_bytes() for path in paths], "caption": captions})
    for number in range(4):
        part = table.slice(number * count // 4, (number + 1) * count // 4 - number * count // 4)
        pq.write_table(part, folder / f"train-{number}.parquet", row_group_size=100)
    with pa.OSFile(str(folder / "train.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=1000)
    pattern, per_shard = str(folder / "train-%04d.tar"), min(PER_SHARD, count // 8)
    with webdataset.ShardWriter(pattern, maxcount=per_shard, verbose=0) as shards:
        for path, text in zip(paths, captions, strict=True):
            shards.write({"__key__": path.stem, "jpg": path.read_bytes(), "txt": text})


def processor_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the block of the image processor."""
    return {"name": arguments.processor, "image_size": 32 if arguments.tiny else 224}


def ours(folder: Path, arguments: argparse.Namespace, *, storage: str, **more: Any) -> Iterator[int]:
    """Yield the sizes of this package's training batches, without end."""
    info = {"annotations": {"train": {"storage": str(folder / storage)}}, "images": {"storage": str(folder / "images")}}
    builder = registry.get_builder_class("pairs")
    built = builder(build_info=info, vis_processor={"train": processor_of(arguments)}, **more).build(["train"])
    run = RunConfig(task="captioning", batch_size_train=arguments.batch, num_workers=arguments.workers)
    with contextlib.closing(iter(TrainLoader({"pictures": built["train"]}, run))) as batches:
        yield from (len(batch["image"]) for batch in batches)


def streamed(folder: Path, arguments: argparse.Namespace, *, storage: str) -> Iterator[int]:
    """Yield the sizes of batches of a stream."""
    stream = {"epoch_length": arguments.count, "shuffle_buffer": 4 if arguments.tiny else BUFFER}
    return ours(folder, arguments, storage=storage, stream=stream)


def open_clip(folder: Path, arguments: argparse.Namespace) -> Iterator[int]:
    """Yield the sizes of the batches of open_clip's training pipeline, epoch after epoch.

    Its reader (3.3) does not know the marker that webdataset 1.0 puts after each shard, and stops there with a
    KeyError; the marker is switched off.
    """
    from open_clip_train import data as pipeline
    from webdataset.tariterators import tar_file_expander

    pipeline.tar_file_expander = functools.partial(tar_file_expander, eof_value=None)
    block = processor_of(arguments)
    processor = registry.get_processor_class(block["name"]).from_config(block)
    names = sorted(map(str, folder.glob("train-*.tar")))
    own = {"train_data": f"{folder}/train-{{0000..{len(names) - 1:04d}}}.tar", "train_num_samples": arguments.count}
    sizes = {"batch_size": arguments.batch, "workers": arguments.workers, "world_size": 1, "seed": 42}
    options = SimpleNamespace(**own, **sizes, dataset_resampled=False, train_data_upsampling_factors=None)
    data = pipeline.get_wds_dataset(options, processor, is_train=True, tokenizer=lambda text: [text])
    for epoch in itertools.count():
        data.set_epoch(epoch)
        yield from (len(images) for images, _ in data.dataloader)


Batches = Callable[[Path, argparse.Namespace], Iterator[int]]
SOURCES: dict[str, Batches] = {
    "files": functools.partial(ours, storage="train.jsonl"),
    "parquet": functools.partial(ours, storage="train-*.parquet"),
    "arrow": functools.partial(ours, storage="train.arrow"),
    "shards": functools.partial(ours, storage="train-*.tar"),
    "shards-streamed": functools.partial(streamed, storage="train-*.tar"),
    "parquet-streamed": functools.partial(streamed, storage="train-*.parquet"),
    "open_clip": open_clip,
}


def processor_seconds() -> float:
    """Return the processor time of this process and of its workers so far."""
    ticks = 0
    for worker in multiprocessing.active_children():
        with contextlib.suppress(FileNotFoundError):  # it has ended
            fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(") ")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # in the process itself and in the kernel
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def rates(batches: Iterator[int], count: int) -> tuple[float, float]:
    """Return images per second by the clock, and milliseconds of the processor per image, after the first quarter."""
    with contextlib.closing(batches):
        skipped = measured = 0
        while skipped < count // 4:
            skipped += next(batches)
        began, before = time.perf_counter(), processor_seconds()
        while measured < count:
            measured += next(batches)
        return measured / (time.perf_counter() - began), 1000 * (processor_seconds() - before) / measured


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=SOURCES, help="default: all")
    parser.add_argument("--processor", default="clip_image_train", help="the image processor")
    parser.add_argument("--count", type=int, default=2000, help="images")
    parser.add_argument("--workers", type=int, default=2, help="loader processes, at least 1")
    parser.add_argument("--batch", type=int, default=32, help="images per batch")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each source")
    parser.add_argument("--tiny", action="store_true", help="32 small images, to check that it runs")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        arguments.count, arguments.batch, arguments.repeats = 32, 4, 1
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measure the sources, in turns, and print the table."""
    arguments = parse(argv)
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in arguments.sources}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["LAVIS_LITE_CACHE"] = str(folder / "cache")
        write(folder, arguments.count, (48, 36) if arguments.tiny else SIZE)
        for _ in range(arguments.repeats):
            for name in arguments.sources:
                found[name].append(rates(SOURCES[name](folder, arguments), arguments.count))
    first = arguments.sources[0]
    print(f"{'source':18} {'images/s':>10} {'CPU ms per image':>18} {'ratio to ' + first:>20}")
    rows = []
    for name, turns in found.items():
        speed, cost = (statistics.median(values) for values in zip(*turns, strict=True))
        ratios = [own / other for (_, own), (_, other) in zip(turns, found[first], strict=True)]
        ratio = statistics.median(ratios)
        rows.append({"source": name, "images_per_second": speed, "cpu_ms_per_image": cost, "ratios": ratios})
        print(f"{name:18} {speed:10.1f} {cost:18.3f} {ratio:8.3f} [{min(ratios):.3f}, {max(ratios):.3f}]")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
