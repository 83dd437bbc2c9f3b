"""What a run will need, checked before weights are loaded: files, samples, sizes, and that task and model fit.

A dry run and the start of every run do the same checks. What needs the model's own sizes is checked before the first
step. Files are looked up on rank 0 only.
"""

import logging
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from lavis_lite.common import dist
from lavis_lite.common.config.agreement import model_setting
from lavis_lite.common.config.config import Config, ConfigError
from lavis_lite.common.errors import InputError, MissingFileError, UnreadableSample
from lavis_lite.common.registry import registry
from lavis_lite.common.sources import download
from lavis_lite.runners.loaders import train_loader, train_sets
from lavis_lite.runners.plan import resolve_precision
from lavis_lite.runners.sampling import kept_rng

logger = logging.getLogger(__name__)

NUM_THREADS = 32  # a network drive answers many at once
CHUNK = 2000  # files of one thread's turn
MANY_FILES = 500_000  # worth a line in the log
UNKNOWN_SHARE = 0.2  # of the tokens: more than the rare names and symbols that texts of a known language have
SHOWN = 60  # characters of a text in a message
NUM_READ = {"image": 32, "video": 4}  # samples of a split that are read, by what they show

IDS = ("instance_id", "image_id", "img_id", "question_id", "id")

Datasets = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """What was found of one split."""

    where: str
    """`<dataset>/<split>`"""
    kind: str
    """`image` or `video`"""
    files: set[str]
    num_read: int
    shape: tuple[int, ...] | None
    """of one sample's image, (3, H, W) or (3, F, H, W)"""
    batches: list[dict[str, Any]]
    """The samples that were read, a batch of each, without pixels: tensors are on the meta device."""

    def line(self, trained_on: set[str], *, num_repeated: int) -> str:
        """Return the dry run's line; `trained_on` are the files of the training splits, for the others."""
        parts = [f"{len(self.files):,} {self.kind} files found"] if self.files else []
        if num_repeated:
            parts.append(f"{num_repeated:,} records say the same as an earlier one")
        if shared := len(self.files & trained_on):
            parts.append(f"{shared:,} of them also trained on")
        if self.shape is not None:
            parts.append(f"{self.num_read} samples read, {self.kind}s {' x '.join(map(str, self.shape))}")
        return f"files       {self.where}: {'; '.join(parts) or 'not checked'}"


def check_task(cfg: Config, task: Any) -> None:
    """Raise ConfigError if the model lacks what the task evaluates with."""
    if cfg.run.valid_splits or cfg.run.test_splits:
        _check_methods(cfg, task)


def check_device(cfg: Config) -> None:
    """Raise InputError if this machine lacks the device, or the device the precision."""
    resolve_precision(cfg.run, dist.resolve_device(cfg.run.device))


def check_data(cfg: Config, task: Any, datasets: Datasets) -> list[SplitReport]:
    """Check every split's files and some of its samples, on rank 0 for all ranks; return there what was found.

    Raises:
        MissingFileError: files are not there; of training data, more than `run.max_unreadable_share` of the samples'.
        UnreadableSample: a sample cannot be read.
        InputError: a sample does not fit the model or the task, or the training sets do not fit the run.
    """
    found: list[SplitReport] = []
    dist.on_main(lambda: found.extend(_check_splits(cfg, task, datasets)))  # names of millions of files stay here
    if not cfg.run.evaluate:
        train_loader(train_sets(datasets, cfg.run.train_splits), cfg.run, world=dist.world_size())
    return found


def check_model(cfg: Config, task: Any, model: Any, datasets: Datasets, found: Sequence[SplitReport]) -> None:
    """Check that the model has room for what it is asked, on rank 0 for all ranks, and warn of training texts that its
    tokenizers do not know; `found` is `check_data`'s.

    Raises:
        InputError: a setting does not fit the model's sizes, or a text cannot be read.
    """
    dist.on_main(lambda: _check_model(cfg, task, model, datasets, found))


def _check_model(cfg: Config, task: Any, model: Any, datasets: Datasets, found: Sequence[SplitReport]) -> None:
    evaluated = {*cfg.run.valid_splits, *cfg.run.test_splits}
    for report in found:
        name, _, split = report.where.rpartition("/")
        if split in cfg.run.train_splits and not cfg.run.evaluate:
            _warn_of_unknown_tokens(cfg, model, report)
        if split in evaluated and hasattr(task, "check_model"):
            try:
                task.check_model(model, datasets[name][split], report.batches, split=split)
            except InputError as error:
                raise InputError(f"{report.where}: {error}") from error


def _warn_of_unknown_tokens(cfg: Config, model: Any, report: SplitReport) -> None:
    """Warn if much of the texts that were read is no token of a tokenizer that reads them."""
    from lavis_lite.models.tokenizers import unknown_share

    readers = model.text_readers(report.batches[0]) if report.batches and hasattr(model, "text_readers") else []
    for key, setting, tokenizer in readers:
        texts = [text for batch in report.batches for text in batch.get(key, ())]
        share, text, read = unknown_share(tokenizer, texts)
        if share > UNKNOWN_SHARE:
            logger.warning(
                f"{report.where}: {share:.0%} of the tokens of {key} are unknown to the tokenizer of "
                f"model.{setting}={model_setting(cfg.model, setting)}, and nothing is learned from them: "
                f"{text[:SHOWN]!r} is read as {read[:SHOWN]!r}. Choose a model.{setting} whose vocabulary has the "
                "language of the texts, or translate the texts"
            )


def opening(cfg: Config, runner: Any) -> str:
    """Return what a run says of itself at its start."""
    parameters = list(runner.model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    name = f"{cfg.model['arch']} {cfg.model.get('model_type') or ''}".strip()
    precision = str(runner.dtype).removeprefix("torch.")
    return (
        f"{name}: {sum(p.numel() for p in parameters):,} parameters, {trainable:,} trainable; task {cfg.run.task}\n"
        f"device {runner.device}{f' x {dist.world_size()} processes' if dist.world_size() > 1 else ''}, {precision}; "
        f"seed {cfg.run.seed}\n"
        f"folder {runner.job_dir}"
    )


def closing(result: Mapping[str, Any], job_dir: Path, *, seconds: float) -> str:
    """Return the lines that end a training: its time, and its best weights."""
    best = result.get("best") or {}
    chosen = "the last weights: nothing chose better ones"
    if best.get("metric") is not None:
        chosen = f"agg_metrics {best['metric']:.4g} after epoch {best['epoch'] + 1}"
    return f"done in {timedelta(seconds=round(seconds))}; {job_dir / 'checkpoint_best.pth'}: {chosen}"


def report(cfg: Config, found: Sequence[SplitReport], datasets: Datasets) -> list[str]:
    """Return the dry run's lines about files, repeated records and the device."""
    trained = {f"{name}/{split}" for name in cfg.datasets for split in cfg.run.train_splits}
    trained_on = set().union(*(split.files for split in found if split.where in trained))
    lines = []
    for split in found:
        name, _, key = split.where.rpartition("/")
        repeated = num_repeated(getattr(datasets[name][key], "annotation", ()))
        lines.append(split.line(set() if split.where in trained else trained_on, num_repeated=repeated))
    lines += [
        f"weights     not found: {path} ({key}); without it the run ends at its start"
        for key, path in lost_weights(cfg)
    ]
    try:
        check_device(cfg)
        return [*lines, f"device      {dist.resolve_device(cfg.run.device)}"]
    except InputError as error:
        return [*lines, f"device      not checked on this machine: {error}"]


def lost_weights(cfg: Config) -> list[tuple[str, str]]:
    """Return the keys of weights and checkpoints that name a file which is not there, and that file."""
    model, run = cfg.model, cfg.run
    own = {key: model.get(key) for key in ("pretrained", "finetuned") if model.get(f"load_{key}", True)}
    own = {"checkpoint": model["checkpoint"]} if model.get("checkpoint") else own
    named = {f"model.{key}": source for key, source in own.items()} | {"run.resume_ckpt_path": run.resume_ckpt_path}
    return [
        (key, str(source))
        for key, source in named.items()
        if source and not (download.is_url(source) or download.is_folder(source) or Path(source).expanduser().exists())
    ]


def _check_methods(cfg: Config, task: Any) -> None:
    arch = cfg.model["arch"]
    model_class = registry.get_model_class(arch)
    lacking = _lacking(type(task), model_class)
    if not lacking:
        return
    others = {name: registry.get_task_class(name) for name in registry.list_tasks()}
    fitting = [name for name, other in others.items() if _methods(other) and not _lacking(other, model_class)]
    advice = f"tasks that fit: {', '.join(sorted(fitting))}" if fitting else "no task evaluates this model"
    raise ConfigError(
        f"{cfg.source}: run.task: {cfg.run.task} evaluates by `{lacking[0]}`, which {model_class.__name__} "
        f"(model.arch: {arch}) does not have; {advice}"
    )


def _methods(task_class: type) -> Sequence[str]:
    return getattr(task_class, "model_methods", ())


def _lacking(task_class: type, model_class: type) -> list[str]:
    return [name for name in _methods(task_class) if not callable(getattr(model_class, name, None))]


def _check_splits(cfg: Config, task: Any, datasets: Datasets) -> list[SplitReport]:
    evaluated = {*cfg.run.valid_splits, *cfg.run.test_splits}
    share = cfg.run.max_unreadable_share
    reports = []
    for name, splits in datasets.items():
        for split, dataset in splits.items():
            where, is_evaluated = f"{name}/{split}", split in evaluated
            files = _check_files(dataset, where, share=None if is_evaluated else share)
            kind = _kind(dataset)
            samples = _read_some(dataset, where, count=NUM_READ[kind], share=None if is_evaluated else share)
            batches = _batches_of_one(dataset, samples)
            batch = batches[0] if batches else {}
            shape = _check_size(cfg.model, batch, where)
            if split in cfg.run.train_splits and not cfg.run.evaluate:
                _check_answers(cfg.model, batch, where)
            if is_evaluated and hasattr(task, "check"):
                _check_keys(task, batch, where)
                _check_prompt(cfg, task, batch, where)
                task.check(registry.get_model_class(cfg.model["arch"]), dataset, batch, split=split)
            read = {"num_read": len(samples), "shape": shape, "batches": batches}
            reports.append(SplitReport(where=where, kind=kind, files=files, **read))
    return reports


def _check_files(dataset: Any, where: str, *, share: float | None) -> set[str]:
    """Return the files of a split after looking each of them up. `share` of the samples may lack theirs; None: none."""
    if not hasattr(dataset, "files_of"):
        return set()
    root = os.fspath(dataset.vis_root)
    files = {os.path.join(root, file) for record in dataset.annotation for file in dataset.files_of(record)}
    wrong = wrong_files(files, where)
    if not wrong or _opens_others(dataset, wrong, root):
        return files - wrong.keys()
    path, reason = next(iter(wrong.items()))
    kind = _kind(dataset)
    others = f", and {len(wrong) - 1:,} more of {len(files):,} files" if len(wrong) > 1 else ""
    text = f"{kind} file {reason}: {path} ({where}{others})"
    if share:
        lost = sum(
            any(os.path.join(root, file) in wrong for file in dataset.files_of(record)) for record in dataset.annotation
        )
        if lost <= share * len(dataset.annotation):
            logger.warning(f"{text}: {lost:,} samples will be skipped, as run.max_unreadable_share={share} allows")
            return files - wrong.keys()
        text += f": {lost:,} samples, more than run.max_unreadable_share={share} allows"
    way_out = "To skip such samples, set run.max_unreadable_share to a small share."
    raise MissingFileError(
        f"{text}. Check the dataset's build_info.{kind}s.storage{' or images.storage' if kind == 'video' else ''} "
        "(relative paths are below the data root, environment variable LAVIS_LITE_DATA) or remove the records from "
        f"the annotations. ({'Evaluation never skips samples.' if share is None else way_out})"
    )


def _opens_others(dataset: Any, wrong: Mapping[str, str], root: str) -> bool:
    """Whether a sample is read although its file is wrong: a user's class may look elsewhere than `files_of` says."""
    for index, record in enumerate(dataset.annotation):
        if any(os.path.join(root, file) in wrong for file in dataset.files_of(record)):
            try:
                with kept_rng():
                    dataset[index]
            except (UnreadableSample, OSError):
                return False
            return True
    return False


def wrong_files(files: Iterable[str], where: str = "") -> dict[str, str]:
    """Return those of `files` that are not regular files with something in them, and why, in alphabetical order."""
    paths = sorted(files)
    if len(paths) > MANY_FILES:
        logger.info("%s: looking for %s files", where, f"{len(paths):,}")
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    with ThreadPoolExecutor(max(1, min(NUM_THREADS, len(chunks)))) as pool:
        found = pool.map(lambda chunk: [(path, reason) for path in chunk if (reason := _wrong(path))], chunks)
        return dict(pair for pairs in found for pair in pairs)


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
    seen: set[int] = set()
    count = 0
    for record in records:
        key = hash(repr([item for item in record.items() if item[0] not in IDS]))
        count += key in seen
        seen.add(key)
    return count


def _kind(dataset: Any) -> str:
    first = next(iter(getattr(dataset, "annotation", ())), {})
    return "video" if first.get("video") is not None else "image"


def _read_some(dataset: Any, where: str, *, count: int, share: float | None) -> list[dict[str, Any]]:
    """Return `count` samples spread over the split; unreadable ones are passed over only where `share` allows some."""
    samples, error, length = [], None, len(dataset)
    count = min(count, length)
    with kept_rng():
        for index in (number * length // count for number in range(count)):
            try:
                samples.append(dataset[index])
            except UnreadableSample as caught:
                error = caught
                if not share:
                    rule = (
                        "Evaluation never skips samples."
                        if share is None
                        else ("To skip such samples, set run.max_unreadable_share to a small share.")
                    )
                    raise UnreadableSample(f"{caught} ({rule})") from caught
                logger.warning(f"{where}: {caught}")
    if error is not None and not samples:
        raise UnreadableSample(f"{where}: none of {count} samples can be read. One of them: {error}") from error
    return samples


def _batches_of_one(dataset: Any, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a batch of each sample, its tensors on the meta device."""
    if not hasattr(dataset, "collater"):
        return []
    with kept_rng():
        batches = [dataset.collater([sample]) for sample in samples]
    return [
        {key: value.to("meta") if torch.is_tensor(value) else value for key, value in batch.items()}
        for batch in batches
    ]


def _check_keys(task: Any, batch: Mapping[str, Any], where: str) -> None:
    """Raise InputError if the samples lack a key that the task evaluates with."""
    lacking = [key for key in getattr(task, "sample_keys", ()) if batch and key not in batch]
    if lacking:
        raise InputError(
            f"{where}: {type(task).__name__} evaluates samples by {lacking[0]!r}, which these lack (they have "
            f"{', '.join(batch)}): choose a dataset that fits the task, or another run.task"
        )


def _check_prompt(cfg: Config, task: Any, batch: Mapping[str, Any], where: str) -> None:
    """Raise InputError for a prompt around a question where the task generates from images alone."""
    if "generate" not in _methods(type(task)) or not batch or batch.keys() & {"prompt", "text_input"}:
        return
    given = {"run.prompt": cfg.task.get("prompt"), "model.prompt": model_setting(cfg.model, "prompt")}
    key, prompt = next(((key, prompt) for key, prompt in given.items() if prompt), ("", ""))
    if "{}" in prompt:
        raise InputError(
            f"{where}: {key} {prompt!r} has a '{{}}' for a question, and these samples have none: set run.prompt to a "
            "prompt without it"
        )


def _check_size(model: Mapping[str, Any], batch: Mapping[str, Any], where: str) -> tuple[int, ...] | None:
    """Return the shape of a sample's image. Raises InputError if the model takes another height or width."""
    image = next((batch[key] for key in ("image", "image0") if torch.is_tensor(batch.get(key))), None)
    if image is None:
        return None
    if image.dim() == 5 and not getattr(registry.get_model_class(model["arch"]), "takes_video", True):
        raise InputError(
            f"{where}: samples show videos, {tuple(image.shape[1:])}, and {model['arch']} takes images only: choose an "
            "architecture of BLIP-2 with a language model, or other data"
        )
    size = model_setting(model, "image_size")
    if size is not None and tuple(image.shape[-2:]) != (size, size):
        raise InputError(
            f"{where}: the image processor gives {image.shape[-2]} x {image.shape[-1]} pixels, the model takes "
            f"{size} x {size}: set image_size of the processor and of the model (model.image_size) to the same value"
        )
    return tuple(image.shape[1:])


def _check_answers(model: Mapping[str, Any], batch: Mapping[str, Any], where: str) -> None:
    """Raise InputError if the samples tell what to write about a question or an instruction, and the model would learn
    that instead.
    """
    if "text_output" in batch and not getattr(registry.get_model_class(model["arch"]), "learns_answers", True):
        raise InputError(
            f"{where}: samples have a question or an instruction (text_input: {batch['text_input'][0]!r}) and what "
            f"to write (text_output: {batch['text_output'][0]!r}); {model['arch']} reads text_input alone, and "
            "would learn that: choose a dataset of captions, or an architecture of BLIP-2 with a language model"
        )
