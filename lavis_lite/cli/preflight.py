"""Checks before weights are loaded: files, samples, sizes, and that model, task and data fit together.

A dry run and the start of every run do the same checks. What needs the model's own sizes is checked before the first
step. Files are looked up on rank 0 only.
"""

import contextlib
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lavis_lite.cli.cache_checks import check_encoder, check_transforms
from lavis_lite.common import dist
from lavis_lite.common.config.agreement import model_setting
from lavis_lite.common.config.config import Config, ConfigError
from lavis_lite.common.errors import InputError, MissingFileError, SettingError, UnreadableSample
from lavis_lite.common.members import file_on_disk
from lavis_lite.common.pixels import normalised
from lavis_lite.common.precision import PRECISIONS, resolve_precision
from lavis_lite.common.registry import registry
from lavis_lite.common.rng import preserve_rng_state
from lavis_lite.common.sharding import check_shardable
from lavis_lite.common.sources import download
from lavis_lite.datasets.base import BaseDataset
from lavis_lite.datasets.protocols import SampleDataset
from lavis_lite.datasets.streams import StreamDataset
from lavis_lite.models.base import BaseModel
from lavis_lite.models.tokenizers import unknown_share
from lavis_lite.nn.features import FEATURES
from lavis_lite.runners.loaders import Datasets, first_samples_missing, train_sets
from lavis_lite.runners.plan import Plan, make_plan
from lavis_lite.runners.streaming import describe_streams
from lavis_lite.tasks.base import BaseTask

logger = logging.getLogger(__name__)

NUM_THREADS = 32  # a network drive answers many at once
MAX_LOOKED_UP = 4_000_000  # samples of a split; the names of more would take gigabytes
CHUNK = 2000  # files that a thread looks up at a time
UNKNOWN_SHARE = 0.2  # of the tokens: more than the rare names and symbols in texts of a known language
SHOWN = 60  # characters of a text in a message
NUM_READ = {"image": 32, "video": 4}  # samples read of a split of images or videos

IDS = ("instance_id", "image_id", "img_id", "question_id", "id")
NEVER_SKIPPED = "Evaluation never skips samples."
MAY_BE_SKIPPED = "To skip such samples, set run.max_unreadable_share to a small share."


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """Findings about one split."""

    where: str
    """`<dataset>/<split>`"""
    kind: str
    """`image` or `video`"""
    files: set[str]
    shape: tuple[int, ...] | None
    """Shape of one sample's image, (3, H, W) or (3, F, H, W)."""
    batches: list[dict[str, Any]]
    """The samples that were read, a batch of each, with tensors on the meta device."""

    def line(self, trained_on: set[str], *, num_repeated: int) -> str:
        """Return the dry run's line; `trained_on` are the files of the training splits, for the others."""
        parts = [f"{len(self.files):,} {self.kind} files found"] if self.files else []
        if num_repeated:
            parts.append(f"{num_repeated:,} records repeat an earlier one")
        if shared := len(self.files & trained_on):
            parts.append(f"{shared:,} of them also trained on")
        if self.shape is not None:
            parts.append(f"{len(self.batches)} samples read, {self.kind}s {' x '.join(map(str, self.shape))}")
        return f"files       {self.where}: {'; '.join(parts) or 'not checked'}"


@dataclass(kw_only=True)
class DataReport:
    """Findings about a run's data: of each split (on rank 0), and of the training."""

    splits: list[SplitReport] = field(default_factory=list)
    plan: Plan | None = None
    """The plan of the training; None for an evaluation."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Keys of samples that mixed batches do without, and the datasets that lack them."""


def check_task(cfg: Config, task: BaseTask) -> None:
    """Raise ConfigError if the model lacks what the task evaluates with, or what a setting of the training needs."""
    arch = cfg.model["arch"]
    model_class = registry.get_model_class(arch)
    if not cfg.run.evaluate and cfg.run.loss_average == "tokens" and not model_class.reports_num_labels:
        problem = f"{model_class.__name__} (model.arch: {arch}) does not report its num_labels; set it to batches"
        raise ConfigError(f"{cfg.source}: run.loss_average: tokens needs a language model's loss, and {problem}")
    if cfg.run.evaluate and cfg.run.resume == "auto" and (why := task.unresumable()) is not None:
        raise ConfigError(f"--resume auto (run.resume): {why}; evaluate without it")
    missing = _missing_methods(type(task), model_class)
    if not missing or not (cfg.run.valid_splits or cfg.run.test_splits):
        return
    others: dict[str, type[BaseTask]] = {name: registry.get_task_class(name) for name in registry.list_tasks()}
    fitting = [name for name, one in others.items() if one.model_methods and not _missing_methods(one, model_class)]
    problem = f"evaluates by `{missing[0]}`, which {model_class.__name__} (model.arch: {arch}) does not have"
    advice = f"tasks that fit: {', '.join(fitting) or 'none'}"
    raise ConfigError(f"{cfg.source}: run.task: {cfg.run.task} {problem}; {advice}")


def _missing_methods(task_class: type[BaseTask], model_class: type) -> list[str]:
    methods = {name for parent in model_class.__mro__ for name, value in vars(parent).items() if callable(value)}
    return [name for name in task_class.model_methods if name not in methods]


def check_device(cfg: Config) -> None:
    """Raise InputError if this machine lacks the device, or the device the precision."""
    resolve_precision(cfg.run.precision, dist.resolve_device(cfg.run.device))


def check_data(cfg: Config, task: BaseTask, datasets: Datasets) -> DataReport:
    """Check every split's files and some of its samples, on rank 0 for all ranks, and make the plan of a training.

    Raises:
        MissingFileError: files do not exist; of training data, more than `run.max_unreadable_share` of the samples'.
        UnreadableSample: a sample cannot be read.
        InputError: a sample does not fit the model or the task, or the training sets do not fit the run.
    """
    report = DataReport()
    dist.on_main(lambda: report.splits.extend(_check_splits(cfg, task, datasets)))  # millions of names stay here
    check_transforms(cfg, datasets)
    if not cfg.run.evaluate:
        sets = train_sets(datasets, cfg.run.train_splits)
        lengths = {name: len(dataset) for name, dataset in sets.items()}
        streams = describe_streams(sets, cfg.run, world=dist.world_size())
        report.plan = make_plan(cfg.run, lengths, dist.world_size(), streams=streams)
        if report.plan.sampler.is_concat:
            report.left_out = {key: names for key, names in first_samples_missing(sets).items() if names}
    return report


def check_model(cfg: Config, task: BaseTask, model: BaseModel, datasets: Datasets, found: "DataReport") -> None:
    """Check lengths against the model's sizes, and warn of training texts with many unknown tokens; on rank 0 for all.

    Raises:
        InputError: a setting does not fit the model's sizes, or a text cannot be read.
    """

    def check() -> None:
        check_encoder(cfg, model)
        if model.llm_device_map is not None and not (cfg.run.evaluate and dist.world_size() == 1):
            advice = "leave it out; a training of several GPUs sets run.parallel: fsdp"
            raise SettingError("model.llm_device_map", f"is for evaluations by one process; {advice}")
        if cfg.run.parallel == "fsdp" and not cfg.run.evaluate:
            model.shard_units()
            check_shardable(model, dtype=PRECISIONS.get(cfg.run.precision, torch.float32))
        for report in found.splits:
            name, _, split = report.where.rpartition("/")
            if split in cfg.run.train_splits and not cfg.run.evaluate:
                _warn_of_unknown_tokens(cfg, model, report)
            if split in (*cfg.run.valid_splits, *cfg.run.test_splits):
                try:
                    task.check_model(model, datasets[name][split], report.batches, split=split)
                except InputError as error:
                    raise InputError(f"{report.where}: {error}") from error

    if isinstance(model, BaseModel):  # another module has its methods only
        dist.on_main(check)


def _warn_of_unknown_tokens(cfg: Config, model: BaseModel, report: SplitReport) -> None:
    for key, setting, tokenizer in model.text_readers(report.batches[0]) if report.batches else []:
        texts = [text for batch in report.batches for text in batch.get(key, ())]
        share, text, decoded = unknown_share(tokenizer, texts)
        if share > UNKNOWN_SHARE:
            logger.warning(
                f"{report.where}: {share:.0%} of the tokens of {key} are unknown to the tokenizer of "
                f"model.{setting}={model_setting(cfg.model, setting)}, and nothing is learned from them: "
                f"{text[:SHOWN]!r} is read as {decoded[:SHOWN]!r}. Choose another, or translate the texts"
            )


def missing_weights(cfg: Config) -> list[tuple[str, str]]:
    """Return the keys of weights and checkpoints that name a file which does not exist, and that file."""
    model, run = cfg.model, cfg.run
    own = {key: model.get(key) for key in ("pretrained", "finetuned") if model.get(f"load_{key}", True)}
    own = {"checkpoint": model["checkpoint"]} if model.get("checkpoint") else own
    named = {f"model.{key}": source for key, source in own.items()} | {"run.resume_ckpt_path": run.resume_ckpt_path}
    return [
        (key, str(source))
        for key, source in named.items()
        if source and not (download.is_url(source) or download.is_folder(source) or Path(source).expanduser().exists())
    ]


def _check_splits(cfg: Config, task: BaseTask, datasets: Datasets) -> list[SplitReport]:
    evaluated = {*cfg.run.valid_splits, *cfg.run.test_splits}
    reports = []
    for name, splits in datasets.items():
        for split, dataset in splits.items():
            where, is_evaluated = f"{name}/{split}", split in evaluated
            if is_evaluated and isinstance(dataset, StreamDataset):
                advice = "name its shards as another split, or leave out the key `stream`"
                raise InputError(f"{where}: is read as a stream, which has no end and cannot be evaluated: {advice}")
            share = cfg.run.max_unreadable_share if task.skips_unreadable or not is_evaluated else None
            files = check_files(dataset, where, share=share) if isinstance(dataset, BaseDataset) else set()
            kind = _kind(dataset)
            samples = read_some(dataset, where, count=NUM_READ[kind], share=share)
            with preserve_rng_state():
                batches = [_on_meta(normalised(dataset.collater([sample]))) for sample in samples]
            batch = batches[0] if batches else {}
            shape = check_size(cfg.model, batch, where)
            if split in cfg.run.train_splits and not cfg.run.evaluate:
                _check_answers(cfg.model, batch, where)
            if is_evaluated:
                _check_evaluated(cfg, task, batch, where)
                task.check(registry.get_model_class(cfg.model["arch"]), dataset, batch, split=split)
            reports.append(SplitReport(where=where, kind=kind, files=files, shape=shape, batches=batches))
    return reports


def check_files(dataset: BaseDataset, where: str, *, share: float | None) -> set[str]:
    """Look up each file of a split and return them. `share` of the samples may lack theirs; None: none may."""
    root = os.fspath(dataset.vis_root)
    if len(dataset) > MAX_LOOKED_UP:
        logger.info(f"{where}: of {len(dataset):,} samples, the files of {MAX_LOOKED_UP:,} are looked up")
    step = -(-len(dataset) // MAX_LOOKED_UP)
    looked_up = dataset.annotation[:: max(1, step)] if step > 1 else dataset.annotation
    files = {os.path.join(root, file) for record in looked_up for file in dataset.files_of(record)}
    wrong = wrong_files(files)
    affected = [
        number
        for number, record in enumerate(dataset.annotation if wrong else [])
        if any(os.path.join(root, file) in wrong for file in dataset.files_of(record))
    ]
    if not affected:
        return files - wrong.keys()
    with contextlib.suppress(UnreadableSample, OSError), preserve_rng_state():
        dataset[affected[0]]
        return files - wrong.keys()  # a user's class may open others than `files_of` says
    path, reason = next(iter(wrong.items()))
    kind = _kind(dataset)
    others = f", and {len(wrong) - 1:,} more of {len(files):,} files" if len(wrong) > 1 else ""
    text = f"{kind} file {reason}: {path} ({where}{others})"
    if share and len(affected) <= share * len(dataset.annotation):
        logger.warning(f"{text}: {len(affected):,} samples will be skipped, as run.max_unreadable_share={share} allows")
        return files - wrong.keys()
    if share:
        text += f": {len(affected):,} samples, more than run.max_unreadable_share={share} allows"
    raise MissingFileError(
        f"{text}. Check the dataset's build_info.{kind}s.storage (relative paths are below the data root, "
        "LAVIS_LITE_DATA) or remove the records; `lavis-lite data check` names every such file. "
        f"({NEVER_SKIPPED if share is None else MAY_BE_SKIPPED})"
    )


def wrong_files(files: Iterable[str]) -> dict[str, str]:
    """Return, in alphabetical order, those of `files` that are not regular files with content, and why."""
    on_disk = {path: file_on_disk(path) for path in sorted(files)}
    paths = list(dict.fromkeys(on_disk.values()))
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    with ThreadPoolExecutor(max(1, min(NUM_THREADS, len(chunks)))) as pool:
        found = pool.map(lambda chunk: [(path, reason) for path in chunk if (reason := _wrong(path))], chunks)
        wrong = dict(pair for pairs in found for pair in pairs)
    return {path: wrong[file] for path, file in on_disk.items() if file in wrong}


def _wrong(path: str) -> str | None:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "not found"
    except (OSError, ValueError) as error:
        return f"not readable ({error})"
    if not stat.S_ISREG(status.st_mode):
        return "is not a file"
    return None if status.st_size else "is empty"


def num_repeated(records: Iterable[Mapping[str, Any]]) -> int:
    """Return how many records differ from an earlier one in their ids only."""
    hashes = [hash(repr([item for item in record.items() if item[0] not in IDS])) for record in records]
    return len(hashes) - len(set(hashes))


def _kind(dataset: SampleDataset) -> str:
    records = dataset.annotation[:1] if isinstance(dataset, BaseDataset) else []
    return "video" if any(record.get("video") is not None for record in records) else "image"


def read_some(dataset: SampleDataset, where: str, *, count: int, share: float | None) -> list[dict[str, Any]]:
    """Return `count` samples spread over the split; skip unreadable ones only where `share` allows some."""
    samples, error, length = [], None, len(dataset)
    count = min(count, length)
    with preserve_rng_state():
        for read in _reads(dataset, count):
            try:
                samples.append(read())
            except UnreadableSample as caught:
                error = caught
                if not share:
                    rule = NEVER_SKIPPED if share is None else MAY_BE_SKIPPED
                    raise UnreadableSample(f"{caught} ({rule})") from caught
                logger.warning(f"{where}: {caught}")
    if error is not None and not samples:
        raise UnreadableSample(f"{where}: none of {count} samples can be read. One of them: {error}") from error
    return samples


def _reads(dataset: SampleDataset, count: int) -> Iterator[Callable[[], dict[str, Any]]]:
    """Yield functions that read `count` samples spread over the split, or the first ones of a stream."""
    if isinstance(dataset, StreamDataset):
        yield from (item.read for item in dataset.first(count))
    else:
        yield from (partial(dataset.__getitem__, number * len(dataset) // count) for number in range(count))


def _on_meta(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.to("meta") if torch.is_tensor(value) else value for key, value in batch.items()}


def _check_evaluated(cfg: Config, task: BaseTask, batch: Mapping[str, Any], where: str) -> None:
    """Raise InputError if the samples lack a key that the task evaluates with, or for a prompt around a question where
    the task generates from images alone.
    """
    missing = [key for key in task.sample_keys if batch and key not in batch]
    if missing:
        problem = f"{type(task).__name__} evaluates samples by {missing[0]!r}, which these lack ({', '.join(batch)})"
        raise InputError(f"{where}: {problem}: choose a dataset that fits the task, or another run.task")
    if "generate" in task.model_methods and batch and not batch.keys() & {"prompt", "text_input"}:
        prompt = cfg.task.get("prompt") or model_setting(cfg.model, "prompt") or ""
        if "{}" in prompt:
            advice = "set run.prompt to a prompt without it"
            raise InputError(f"{where}: the prompt {prompt!r} has a '{{}}', and these samples no question: {advice}")


def check_size(model: Mapping[str, Any], batch: Mapping[str, Any], where: str) -> tuple[int, ...] | None:
    """Return the shape of a sample's image. Raises InputError if the model takes another height or width."""
    image = next((batch[key] for key in ("image", "image0") if torch.is_tensor(batch.get(key))), None)
    if image is None:
        return None
    if image.dim() == 5 and not registry.get_model_class(model["arch"]).takes_video:
        problem = f"samples show videos, {tuple(image.shape[1:])}, and {model['arch']} takes images only"
        advice = "choose an architecture of BLIP, or of BLIP-2 with a language model, or other data"
        raise InputError(f"{where}: {problem}: {advice}")
    size, takes_features = model_setting(model, "image_size"), model_setting(model, "vit_model") == FEATURES
    if takes_features != (image.dim() == 3) and size is not None:
        takes, gives = ("features", "images") if takes_features else ("images", "features")
        advice = "vis_processor {name: features} goes with model.vit_model: features"
        raise InputError(f"{where}: samples hold {gives} {tuple(image.shape[1:])}, the model takes {takes}: {advice}")
    if takes_features:
        return _check_width(model, tuple(image.shape[1:]), where)
    if size is not None and tuple(image.shape[-2:]) != (size, size):
        sizes = f"the processor gives {image.shape[-2]} x {image.shape[-1]} pixels, the model takes {size} x {size}"
        raise InputError(f"{where}: {sizes}: set image_size of the processor and model.image_size to one value")
    return tuple(image.shape[1:])


def fit_features(cfg: Config, found: "DataReport") -> None:
    """Set the width of the features that the model takes to that of the data, on every rank, if it is not given."""
    if model_setting(cfg.model, "vit_model") != FEATURES or cfg.model.get("vit"):
        return
    widths = dist.on_main(lambda: [report.shape[1] for report in found.splits if report.shape is not None])
    if not widths or len(set(widths)) > 1:
        raise InputError(f"model.vit: the datasets' features have the widths {widths}; set it to {{width: W}}")
    cfg.model["vit"] = {"width": widths[0]}


def _check_width(model: Mapping[str, Any], shape: tuple[int, ...], where: str) -> tuple[int, ...]:
    """Return the shape of a sample's features. Raises InputError if the model takes another width."""
    own, width = (model.get("vit") or {}).get("width"), shape[1]
    if own is not None and own != width:
        raise InputError(f"{where}: features have width {width}, the model takes {own}: set model.vit.width={width}")
    return shape


def _check_answers(model: Mapping[str, Any], batch: Mapping[str, Any], where: str) -> None:
    """Raise InputError if the samples are questions or instructions with a target text, and the model would learn the
    former.
    """
    if "text_output" in batch and not registry.get_model_class(model["arch"]).learns_answers:
        raise InputError(
            f"{where}: samples have a question or an instruction (text_input: {batch['text_input'][0]!r}), an answer "
            f"(text_output); {model['arch']} reads text_input alone, and would learn that; choose a dataset of "
            "captions, or an architecture of BLIP-2 with a language model"
        )
