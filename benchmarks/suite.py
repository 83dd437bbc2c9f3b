"""Whether anything has become slower: each row's ratio to the plain way of doing the same, against the stored one.

    python benchmarks/suite.py             # exit code 1 if a ratio has fallen by more than 15 percent
    python benchmarks/suite.py --update    # store this machine's ratios in benchmarks/ratios.json
    python benchmarks/suite.py --only load augment

Both sides of a row take turns in one process with one thread, and the ratio is of the processor's time, so that other
processes matter little. A row that has fallen is measured twice more, and only fails if it falls each time. Stored
ratios are those of one kind of machine: store them anew on another.
"""

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import blip
import blip2_jobs
import numpy as np
import torch
import transformers
from data_sources import SIZE, draw
from measure import Job, Row, Watched, measure, table
from PIL import Image
from throughput import parse as parse_throughput
from torch import nn
from torchvision import transforms

from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.registry import registry
from lavis_lite.convert.folders import write_folder
from lavis_lite.models import from_pretrained
from lavis_lite.processors.image import Blip2ImageTrainProcessor, BlipImageEvalProcessor, ImageProcessor
from lavis_lite.processors.randaugment import MOST, interpolated, moving_matrix, warp_affine
from lavis_lite.runners.encoded import EncoderCache, RowForm, row_form
from lavis_lite.runners.loaders import EvalLoader
from lavis_lite.tasks.vqa import VQATask

STORED = Path(__file__).with_name("ratios.json")
TOLERANCE = 0.15
PARTS = ("blip", "stage1", "opt", "t5", "cache", "share", "load", "augment", "transform")
BATCH = 16
"""Images of a batch of `transform_jobs`."""
NUM_QUESTIONS = 5
"""Questions per image of `share_job`; VQAv2 has 5.4."""


def blip_jobs(tiny: bool) -> Iterator[Job]:
    """Compare BLIP at base width, two layers deep."""
    sizes = ["--depth", "1", "--image-size", "32", "--batch", "2"] if tiny else ["--depth", "2", "--batch", "4"]
    yield from blip.all_jobs(blip.parse(sizes))


def blip2_part(part: str, tiny: bool) -> Iterator[Job]:
    """Compare one part of BLIP-2, one layer of image encoder and language model deep."""
    sizes = ["--tiny", "--tokens", "4"] if tiny else ["--depth", "1", "--batch", "2", "--tokens", "10"]
    yield from blip2_jobs.all_jobs(parse_throughput(["--device", "cpu", "--parts", part, *sizes]))


def cache_job(tiny: bool) -> Iterator[Job]:
    """Train BLIP-2's first stage on stored tokens of its image encoder, digests and reads included, and on pixels."""
    sizes = ["--tiny"] if tiny else ["--depth", "6", "--batch", "2"]
    arguments = parse_throughput(["--device", "cpu", *sizes])
    model, side = blip2_jobs.build("blip2", arguments), arguments.image_size
    samples = {
        "image": torch.randn(arguments.batch, 3, side, side),
        "text_input": blip2_jobs.synthetic_texts(arguments),
    }
    shape, dtype = row_form(model, size=side, device=torch.device("cpu"), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        cache = EncoderCache(model, RowForm(folder=Path(folder), shape=shape, dtype=dtype))

        def stored() -> torch.Tensor:
            return blip2_jobs.loss_of(model, cache.fill(cache.read_batch(dict(samples))))

        with cache:
            yield Job(
                what="stage 1, training step on stored tokens",
                other="encoder in each step",
                ours=blip2_jobs.training_step(model, stored, arguments),
                theirs=blip2_jobs.training_step(model, partial(blip2_jobs.loss_of, model, samples), arguments),
                count=arguments.batch,
            )


def share_job(tiny: bool) -> Iterator[Job]:
    """Answer questions about JPEGs, five about each: read, processed and encoded once per image or per question."""
    sizes = ["--depth", "1", "--image-size", "32"] if tiny else ["--depth", "4"]
    arguments = blip.parse(sizes)
    model, task = blip.build("blip_vqa", arguments), VQATask(inference_method="generate", num_beams=1, max_len=4)
    with tempfile.TemporaryDirectory() as place:
        draw(Path(place), 2, SIZE)
        records = [
            {"image": str(path), "question": f"what is shape {number} of it"}
            for path in sorted(Path(place).glob("*.jpg"))
            for number in range(NUM_QUESTIONS)
        ]
        file = Path(place) / "questions.json"
        file.write_text(json.dumps(records))
        eye = {"eval": {"name": "blip_image_eval", "image_size": arguments.image_size}}
        builder = registry.get_builder_class("vqa")
        info = {"annotations": {"val": {"storage": str(file)}}}
        dataset = builder(build_info=info, vis_processor=eye).build(["val"])["val"]
        run = RunConfig(task="vqa", batch_size_eval=len(records), num_workers=0)

        @torch.no_grad()
        def shared() -> list[Any]:
            return [result for batch in EvalLoader(dataset, run) for result in task.valid_step(model, batch)]

        @torch.no_grad()
        def repeated() -> list[Any]:
            samples = [dataset[number] for number in range(len(dataset))]
            return task.valid_step(model, dataset.collater(samples))

        assert shared() == repeated()
        sides = {"ours": Watched(shared, model), "theirs": Watched(repeated, model)}
        yield Job(what="five questions per image", other="image repeated", count=len(records), **sides)


def load_job(tiny: bool) -> Iterator[Job]:
    """Load a BLIP from a Hugging Face folder."""
    sizes = ["--depth", "1", "--image-size", "32", "--batch", "2"] if tiny else ["--depth", "12"]
    model = blip.build("blip_caption", blip.parse(sizes))
    with tempfile.TemporaryDirectory() as place:
        folder = write_folder(model, Path(place) / "hf", arch="blip_caption")
        theirs = transformers.BlipForConditionalGeneration.from_pretrained
        yield Job(
            what="loading a captioner",
            other="transformers",
            ours=Watched(partial(from_pretrained, folder, tokenizer="shapes", is_eval=True), model),
            theirs=Watched(partial(theirs, folder), model),
            count=1,
        )


def augment_job(tiny: bool) -> Iterator[Job]:
    """Move an image by RandAugment's five moves, as OpenCV is used and in numpy."""
    side = 32 if tiny else 384
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    moves = [moving_matrix(name, most / 2, width=side, height=side) for name, most in MOST.items()]

    def moved(by: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> list[np.ndarray]:
        return [by(image, matrix) for matrix in moves]

    sides = {"ours": partial(moved, warp_affine), "theirs": partial(moved, interpolated)}
    yield _plain("RandAugment's moves", "numpy", len(moves), sides)


def transform_jobs(tiny: bool) -> Iterator[Job]:
    """Resize and normalise an image; decode one too, with each backend; make a training batch of bytes."""
    side = 64 if tiny else 480
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
    ours = BlipImageEvalProcessor(image_size=side // 2)
    theirs = transforms.Compose(
        [
            transforms.Resize((side // 2, side // 2), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    sides = {"ours": partial(ours, image), "theirs": partial(theirs, image)}
    yield _plain("image to tensor", "torchvision", 1, sides)
    file = io.BytesIO()
    image.resize((side // 8, side // 8)).resize((side, side)).save(file, "jpeg")
    by_tensors = BlipImageEvalProcessor(image_size=side // 2, backend="torchvision")

    def decoded(processor: ImageProcessor) -> torch.Tensor:
        return processor(Image.open(io.BytesIO(file.getvalue())))

    sides = {"ours": partial(decoded, by_tensors), "theirs": partial(decoded, ours)}
    yield _plain("JPEG to tensor, backend torchvision", "Pillow", 1, sides)

    def batch(processor: ImageProcessor) -> torch.Tensor:
        return torch.stack([decoded(processor) for _ in range(BATCH)])

    by_output = {
        name: partial(batch, Blip2ImageTrainProcessor(image_size=side * 3 // 4, output=output))
        for name, output in (("ours", "uint8"), ("theirs", "float32"))
    }
    yield _plain("JPEGs to a batch, output uint8", "float32", BATCH, by_output)


def _plain(what: str, other: str, count: int, sides: dict[str, Callable[[], Any]]) -> Job:
    """Return a job without a model."""
    watched = {name: Watched(function, nn.Identity()) for name, function in sides.items()}
    return Job(what=what, other=other, count=count, **watched)


def jobs(part: str, tiny: bool) -> Iterator[Job]:
    """Iterate over the jobs of a part."""
    own = {
        **{"blip": blip_jobs, "cache": cache_job, "share": share_job, "load": load_job},
        **{"augment": augment_job, "transform": transform_jobs},
    }
    yield from own[part](tiny) if part in own else blip2_part(part, tiny)


def measured(parts: list[str], stored: dict[str, float], *, tiny: bool, repeats: int) -> Iterator[Row]:
    """Measure each job, and one that has fallen up to twice more; iterate over the best of each."""
    for part in parts:
        for job in jobs(part, tiny):
            rows = [named(part, measure(job, repeats=repeats))]
            while has_fallen(rows[-1], stored) and len(rows) < 3:
                rows.append(named(part, measure(job, repeats=repeats)))
            yield max(rows, key=lambda row: row.ratio)


def named(part: str, row: Row) -> Row:
    """Return a row with its part in its name, which no other row then has."""
    return replace(row, what=f"{part}: {row.what}")


def has_fallen(row: Row, stored: dict[str, float]) -> bool:
    """Return whether the ratio is more than TOLERANCE below the stored one."""
    return row.ratio < (1 - TOLERANCE) * stored.get(row.what, 0.0)


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and return 1 if a row has fallen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, help="parts to measure")
    parser.add_argument("--update", action="store_true", help="store the ratios")
    parser.add_argument("--stored", type=Path, default=STORED, help=f"file of the ratios ({STORED.name})")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to check that it runs")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stored = json.loads(arguments.stored.read_text(encoding="utf-8")) if arguments.stored.is_file() else {}
    known = {} if arguments.update else stored
    rows: list[Row] = []

    def kept() -> Iterator[Row]:
        for row in measured(arguments.only, known, tiny=arguments.tiny, repeats=arguments.repeats):
            rows.append(row)
            yield row

    for line in table(kept()):
        print(line, flush=True)
    if arguments.update:
        new = stored | {row.what: round(row.ratio, 2) for row in rows}
        arguments.stored.write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")
        return 0
    fallen = [row for row in rows if has_fallen(row, known)]
    for row in fallen:
        print(f"{row.what}: {row.ratio:.2f} times as fast as {row.other}, {known[row.what]:.2f} is stored")
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
