"""CapFilt: write captions of a web set's images, score these and the web's texts, and keep the fitting ones (BLIP,
section 3.3).

The run's model is the filter, which scores texts; the captioner is a second one. BLIP-2's way (section 3.4) has a
captioner as the run's model, and a CLIP that ranks its texts. Each process works on whole shards of samples, so what is
written depends neither on the number of processes nor on interruptions.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import nn

from lavis_lite.common import dist
from lavis_lite.common.config.agreement import model_setting
from lavis_lite.common.config.config import Config
from lavis_lite.common.errors import InputError, MissingFileError
from lavis_lite.common.records import Record, StoredImage
from lavis_lite.common.registry import registry
from lavis_lite.common.rng import hash_seed, seed_everything
from lavis_lite.common.sources import download
from lavis_lite.datasets.base import BaseDataset
from lavis_lite.datasets.digests import annotation_digest
from lavis_lite.datasets.protocols import EvalDataset, Samples
from lavis_lite.models.base import BaseModel
from lavis_lite.models.capfilt import CapFiltModel, check_captioner, load_captioner
from lavis_lite.models.clip_ranker import RankerConfig, load_ranker
from lavis_lite.models.protocols import Generates, ScoresPairs
from lavis_lite.nn.features import FEATURES
from lavis_lite.nn.fingerprint import fingerprint
from lavis_lite.tasks.base import (
    DECODING_BOUNDS,
    BaseTask,
    EvalLoader,
    Metrics,
    evaluating,
    naming_missing_keys,
    naming_setting,
    unwrap,
    with_eval_processors,
)
from lavis_lite.tasks.capfilt.report import summarise, write_page
from lavis_lite.tasks.capfilt.shards import OutputFormat, Shards

logger = logging.getLogger(__name__)

Source = Literal["web", "synthetic", "human"]
DIGITS = 6
"""Decimal places of the scores, as they are written and compared."""


@registry.register_task("capfilt")
@dataclass(kw_only=True)
class CapFiltTask(BaseTask):
    """Captions and filters the texts of a set of pairs, and writes them as shards that the reader `capfilt` reads."""

    captioner: dict[str, Any] | None = None
    """Model that writes captions, as a section `model`: `{arch, model_type, checkpoint, ...}`. None: the run's model
    if it is one, else no captions are written."""
    ranker: RankerConfig | None = None
    """CLIP that scores texts, as `clip`; a run needs it whose model is a captioner."""
    num_captions: int = 1
    """Captions written per image; repeated ones count once."""
    use_nucleus_sampling: bool = True
    """False: beam search."""
    top_p: float = 0.9
    temperature: float = 1.0
    num_beams: int = 3
    max_len: int = 20
    min_len: int = 5
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    prompt: str | None = None
    """Start of every caption; None leaves it to the captioner."""
    filter_by: Literal["itm", "itc", "clip"] = "itm"
    """The score that decides: the matching head's probability of a match, the cosine similarity, or the ranker's."""
    threshold: float | None = 0.5
    """Texts with a score above it are kept; 0.5 of `itm` is the head's own decision. None: no threshold."""
    keep_best: int | None = None
    """Of each image keep at most this many texts, those with the best scores. None: all."""
    filtered_sources: list[Source] = field(default_factory=lambda: ["web", "synthetic", "human"])
    """Texts from other sources are kept whatever their scores."""
    text_source: Literal["web", "human"] = "web"
    """Where the set's own texts are from."""
    output_format: OutputFormat = "jsonl"
    """Tables of all texts: `jsonl` or `parquet`; `webdataset` writes `jsonl`, and shards of the kept texts with their
    images."""
    shard_size: int = 1000
    """Samples per shard. A run that is continued repeats at most one batch per process."""

    sample_keys: ClassVar[tuple[str, ...]] = ("text_input", "instance_id")
    skips_unreadable: ClassVar[bool] = True
    bounds: ClassVar = {**DECODING_BOUNDS, "threshold": (-1.0, 1.0), "keep_best": (1, 10**6), "shard_size": (1, 10**7)}
    choices: ClassVar = {"filter_by": ("itm", "itc", "clip"), "output_format": get_args(OutputFormat)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seed = self.batch_size = 0
        self.made_with: dict[str, Any] = {}
        if isinstance(self.ranker, Mapping):  # as the configuration has it
            self.ranker = RankerConfig(**self.ranker)
        if self.filter_by == "clip" and self.ranker is None:
            raise InputError("run.filter_by: clip is the ranker's: give run.ranker")
        if self.captioner is not None:
            check_captioner(self.captioner, "run.captioner")
        if self.num_captions > self.num_beams and not self.use_nucleus_sampling:
            raise InputError(f"run.num_captions={self.num_captions} needs run.num_beams of at least as many")

    @classmethod
    def setup_task(cls, cfg: Config) -> Self:
        """Return the task. Raises InputError if the run's model has no part in it."""
        task = cls(**cfg.task)
        if not cfg.run.evaluate:
            raise InputError("run.task: capfilt does not train: start it with evaluate.py, or set run.evaluate: true")
        task._check_model_class(cfg.model)
        task.seed = cfg.run.seed
        named = {key: cfg.model.get(key) for key in ("arch", "model_type", "checkpoint", "pretrained", "finetuned")}
        run = {"seed": cfg.run.seed, "batch_size_eval": cfg.run.batch_size_eval, "limit": cfg.run.limit}
        task.made_with = {**dataclasses.asdict(task), **run, "model": named}
        return task

    def _check_model_class(self, model: Mapping[str, Any]) -> None:
        arch, model_class = model["arch"], registry.get_model_class(model["arch"])
        if model_setting(model, "vit_model") == FEATURES:
            raise InputError("model.vit_model: features: capfilt reads images; choose an encoder of images")
        if self.ranker is not None and (statistics := model_class.image_statistics(model)) is not None:
            raise InputError(f"run.ranker: reads images normalised as CLIP's; those of {arch} have {statistics}")
        if issubclass(model_class, ScoresPairs):
            return
        if self.ranker is None or self.filter_by != "clip" or not issubclass(model_class, Generates):
            advice = "choose blip_retrieval ..., or a captioner with run.ranker and run.filter_by: clip"
            raise InputError(f"run.task: capfilt filters by match_scores, which {arch} does not have: {advice}")
        if self.captioner is not None:
            raise InputError(f"run.captioner: the run's model, {arch}, is a captioner already: leave one out")

    def unresumable(self) -> str | None:
        """As BaseTask's: the task has its own files of what is finished."""
        return "capfilt continues the shards of a job by itself: name it by --job-id"

    def build_datasets(self, cfg: Config) -> dict[str, dict[str, Any]]:
        """Build the datasets as BaseTask does, the split `train` without random crops."""
        return super().build_datasets(with_eval_processors(cfg))

    def check(self, model_class: type, dataset: EvalDataset, batch: Samples, *, split: str) -> None:
        """Raise InputError for a dataset without an image per record, or a captioner without its weights."""
        image = dataset.annotation[0].get("image") if isinstance(dataset, BaseDataset) else None
        if not isinstance(dataset, BaseDataset) or not isinstance(image, str | StoredImage):
            problem = f"({type(dataset).__name__}) does not name an image per record"
            raise InputError(f"the {split} dataset {problem}: use the builder pairs")
        if isinstance(image, StoredImage) and self.output_format != "webdataset":
            problem = f"{self.output_format} names the images' files, and the images of the {split} split are in tables"
            raise InputError(f"run.output_format: {problem}: choose webdataset, which copies those of kept texts")
        if any(not isinstance(record.get("caption"), str) for record in dataset.annotation):
            problem = "has records without a caption, or with several"
            raise InputError(f"the {split} dataset {problem}: use the builder pairs, with captions_per_sample: all")
        weights = (self.captioner or {}).get("checkpoint")
        if weights and not (
            download.is_url(weights) or download.is_folder(weights) or Path(weights).expanduser().exists()
        ):
            raise MissingFileError(f"run.captioner.checkpoint: no such file: {weights}")
        if self.ranker is not None:
            self.ranker.check()

    def check_model(self, model: BaseModel, dataset: EvalDataset, batches: Sequence[Samples], *, split: str) -> None:
        """Raise InputError for lengths that the captioner has no room for."""
        for samples in batches if isinstance(model, CapFiltModel) else ():
            with naming_setting(f"run.max_len={self.max_len}", samples, model):
                model.check_generate(self.prompted(samples), **self.decoding_settings())

    def build_model(self, cfg: Config) -> CapFiltModel:
        """Return the configuration's model, the captioner and the ranker as one."""
        device = dist.resolve_device(cfg.run.device)
        ranker = None if self.ranker is None else load_ranker(self.ranker, device=device)
        model, size = super().build_model(cfg), model_setting(cfg.model, "image_size")
        is_filter = isinstance(model, ScoresPairs)
        captioner = None if is_filter else model
        if self.captioner is not None:
            captioner, size = load_captioner(self.captioner, device=device)
        parts = [part for part in (model, self.captioner and captioner, ranker) if isinstance(part, nn.Module)]
        self.made_with["weights"] = " ".join(map(fingerprint, parts))
        return CapFiltModel(filter=model if is_filter else None, captioner=captioner, ranker=ranker, image_size=size)

    def prompted(self, samples: Samples) -> Samples:
        """Return the image, and the prompt if there is one, for the captioner."""
        prompt = {} if self.prompt is None else {"prompt": self.prompt}
        return {"image": samples["image"], **prompt}

    def shards(self, dataset: EvalDataset, split: str, result_dir: Path) -> Shards:
        """Return the files of a split's texts."""
        folder = result_dir / f"{split}_texts"
        return Shards(folder=folder, num_samples=len(dataset), size=self.shard_size, output_format=self.output_format)

    def eval_batches(
        self, dataset: EvalDataset, *, batch_size: int, split: str, result_dir: Path
    ) -> Sequence[Sequence[int]]:
        """Return the batches of this rank's share of the missing shards."""
        assert isinstance(dataset, BaseDataset), type(dataset)
        shards = self.shards(dataset, split, result_dir)
        root = None if isinstance(dataset.annotation[0]["image"], StoredImage) else dataset.vis_root.absolute()
        digest = dist.on_main(lambda: annotation_digest(dataset))
        settings = {**self.made_with, "num_samples": len(dataset), "annotations": digest}

        def begin() -> list[int]:
            shards.begin(root, settings)
            return shards.missing()

        missing = dist.on_main(begin)
        if dist.is_main() and len(missing) < len(shards):
            logger.info(f"{shards.folder}: {len(shards) - len(missing):,} of {len(shards):,} shards are there already")
        own = missing[dist.rank() :: dist.world_size()]
        self.batch_size = batch_size
        return [batch for number in own for batch in shards.unfinished(number, batch_size)]

    def evaluate(self, model: nn.Module, loader: EvalLoader, *, split: str, result_dir: Path) -> Metrics:
        """Write the missing shards, and on rank 0 the report; return the share of texts kept, by source."""
        dataset, model = loader.dataset, unwrap(model)
        assert isinstance(dataset, BaseDataset), type(dataset)
        assert isinstance(model, CapFiltModel), type(model)
        shards = self.shards(dataset, split, result_dir)
        pairs = zip(loader.batches or (), loader, strict=True)
        image_of = partial(sample_image, dataset)
        devices = [model.device] if model.device.type == "cuda" else []
        with evaluating(model), torch.random.fork_rng(devices=devices):
            for number, group in itertools.groupby(pairs, key=lambda pair: pair[0][0] // self.shard_size):
                records = shards.begin_part(number, self.batch_size)
                for indices, samples in group:
                    seed_everything(hash_seed(self.seed, "capfilt", split, indices[0]))
                    with naming_missing_keys(samples, model):
                        found = list(self.texts(model, samples, dataset.annotation)) if samples["positions"] else []
                    shards.add(number, indices[0], found)
                    records += found
                shards.write(number, records, image_of)
                logger.info(f"{split}: wrote shard {number + 1:,} of {len(shards):,}")
        dist.barrier()

        def conclude() -> Metrics:
            shards.finish()
            summary = summarise(shards.manifest, seed=self.seed)
            logger.info(f"wrote {write_page(shards.manifest, summary, image_of, title=f'Texts of {split}')}")
            return summary.metrics()

        return dist.on_main(conclude)

    def texts(self, model: CapFiltModel, samples: Samples, annotation: Sequence[Record]) -> Iterator[Record]:
        """Yield the records of a batch's texts, those of one image in a row: its own first, then the written ones."""
        written = model.generate(self.prompted(samples), **self.decoding_settings())
        read = [[text, *others] for text, others in zip(samples["text_input"], written, strict=True)]
        most = max(map(len, read))
        padded = [text for texts in read for text in texts + texts[-1:] * (most - len(texts))]
        scores = model.match_scores({"image": samples["image"], "text_input": padded})
        rows = {name: values.float().reshape(len(read), most).tolist() for name, values in scores.items()}
        if self.filter_by not in rows:
            raise InputError(f"run.filter_by={self.filter_by}: the model gives only {', '.join(rows)}")
        for row, (index, texts) in enumerate(zip(samples["positions"], written, strict=True)):
            record = annotation[index]
            shared = {"image": str(record["image"]), "sample": index}
            shared |= {"image_id": record["image_id"]} if record.get("image_id") is not None else {}
            found = [
                {**shared, "caption": text, "source": source, **{k: round(v[row][n], DIGITS) for k, v in rows.items()}}
                for n, (text, source) in enumerate(self.sourced(record["caption"], texts))
            ]
            for one, kept in zip(found, self.decide(found), strict=True):
                yield {**one, "kept": kept}

    def sourced(self, own: str, written: Sequence[str]) -> list[tuple[str, Source]]:
        """Return an image's texts with where they are from."""
        return [(own, self.text_source), *((text, "synthetic") for text in written)]

    def decide(self, texts: Sequence[Mapping[str, Any]]) -> list[bool]:
        """Return which texts of an image are kept."""
        scores = [text[self.filter_by] for text in texts]
        judged = [number for number, text in enumerate(texts) if text["source"] in self.filtered_sources]
        passed = [n for n in judged if self.threshold is None or scores[n] > self.threshold]
        best = sorted(passed, key=lambda number: -scores[number])[: self.keep_best]
        return [number in best or number not in judged for number in range(len(texts))]


def sample_image(dataset: BaseDataset, sample: int) -> Path | StoredImage:
    """Return the image of a sample: its file, or where it is in a table."""
    image: str | StoredImage = dataset.annotation[sample]["image"]
    return image if isinstance(image, StoredImage) else dataset.vis_root.absolute() / image
