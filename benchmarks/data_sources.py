"""Images per second that a training loader reads from each kind of source, on the CPU.

    python benchmarks/data_sources.py                         # 2,000 JPEGs of 500 x 375, 2 workers
    python benchmarks/data_sources.py --sources files parquet --workers 4 --json rows.json
    python benchmarks/data_sources.py --tiny                  # some seconds, to check that it runs

Every source has the same JPEGs, in a random order, with the image processor of training at 224 pixels, in batches of
32. The first pass is a warm-up (the files are then in memory), the fastest of the others counts. `per core` divides by
the processor time of the workers, which other processes on the machine hardly change.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lavis_lite.common.registry import registry
from lavis_lite.datasets.base import BaseDataset

SIZE = (500, 375)
Make = Callable[[Path, Path, dict[str, Any]], BaseDataset]
"""A function of the folder of JPEGs, a folder to write to, and the image processor's keys."""


def draw(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write JPEGs with as much detail as photographs: smooth colours and noise, about 50 kB each at full size."""
    rng = np.random.default_rng(0)
    for number in range(count):
        small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = smooth + rng.normal(0, 12, smooth.shape).astype(np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:06d}.jpg", quality=85)


def build(storage: Path, images: Path, processor: dict[str, Any]) -> BaseDataset:
    """Return the training pairs of a source."""
    info = {"annotations": {"train": {"storage": str(storage)}}, "images": {"storage": str(images)}}
    builder = registry.get_builder_class("pairs")(build_info=info, vis_processor={"train": processor})
    dataset: BaseDataset = builder.build(["train"])["train"]
    return dataset


def from_files(images: Path, out: Path, processor: dict[str, Any]) -> BaseDataset:
    """Return pairs whose images are files."""
    rows = [json.dumps({"image": path.name, "caption": f"picture {path.stem}"}) for path in sorted(images.iterdir())]
    (out / "train.jsonl").write_text("\n".join(rows))
    return build(out / "train.jsonl", images, processor)


def from_parquet(images: Path, out: Path, processor: dict[str, Any]) -> BaseDataset:
    """Return pairs whose images are inside a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = sorted(images.iterdir())
    columns = {"image": [path.read_bytes() for path in paths], "caption": [f"picture {path.stem}" for path in paths]}
    pq.write_table(pa.table(columns), out / "train.parquet", row_group_size=100)
    return build(out / "train.parquet", images, processor)


SOURCES: dict[str, Make] = {"files": from_files, "parquet": from_parquet}


def seconds(dataset: BaseDataset, *, workers: int, batch: int) -> tuple[float, float]:
    """Return the time of one pass over a dataset, and the processor time of its workers."""
    loader = DataLoader(
        dataset, batch_size=batch, shuffle=True, num_workers=workers, collate_fn=dataset.collater, drop_last=True
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    iterator, start = iter(loader), time.perf_counter()  # starting workers does not count
    for _ in iterator:
        pass
    taken = time.perf_counter() - start
    del iterator, _  # ends the workers, whose times are known then
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return taken, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), choices=SOURCES, help="default: all")
    parser.add_argument("--count", type=int, default=2000, help="images")
    parser.add_argument("--workers", type=int, default=2, help="loader processes, at least 1")
    parser.add_argument("--batch", type=int, default=32, help="images per batch")
    parser.add_argument("--repeats", type=int, default=3, help="passes that are measured")
    parser.add_argument("--tiny", action="store_true", help="16 small images, to check that it runs")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        arguments.count, arguments.batch, arguments.repeats = 16, 4, 1
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measure each source and print its row."""
    arguments, rows = parse(argv), []
    torch.set_num_threads(1)
    processor = {"name": "blip_image_train", "image_size": 32 if arguments.tiny else 224}
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        images.mkdir()
        draw(images, arguments.count, (48, 36) if arguments.tiny else SIZE)
        print(f"{'source':10} {'images/s':>10} {'per core':>10}")
        for name in arguments.sources:
            out = Path(folder, name)
            out.mkdir()
            dataset = SOURCES[name](images, out, processor)
            passes = [
                seconds(dataset, workers=arguments.workers, batch=arguments.batch) for _ in range(1 + arguments.repeats)
            ]
            speed, per_core = (arguments.count / min(times) for times in zip(*passes[1:], strict=True))
            rows.append({"source": name, "images_per_second": speed, "per_core": per_core})
            print(f"{name:10} {speed:10.1f} {per_core:10.1f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
