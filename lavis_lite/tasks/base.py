"""Base class of the tasks: datasets and model from the config, a training step, and an evaluation on every rank.

A task's dataclass fields are keys of the YAML's `run` section. Rank 0 computes the metrics; every rank gets them.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from lavis_lite.common import dist
from lavis_lite.common.bounds import Bounds, check_numbers, one_of
from lavis_lite.common.config.config import Config
from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.config.schema import schema_of
from lavis_lite.common.config.sections import PROCESSOR_KEYS, builder_name
from lavis_lite.common.errors import InputError, MissingFileError, MissingInputError, did_you_mean
from lavis_lite.common.registry import registry
from lavis_lite.common.sources import download
from lavis_lite.datasets.base import BaseBuilder, BaseDataset
from lavis_lite.datasets.protocols import EvalDataset, SampleDict, Samples
from lavis_lite.models.base import BaseModel, build_model
from lavis_lite.nn.decoding import BOUNDS
from lavis_lite.tasks.predictions import Prediction
from lavis_lite.tasks.results import BatchResults, Result, gather

Metrics = dict[str, Any]

DECODING_BOUNDS: Mapping[str, Bounds] = BOUNDS | {"max_len": BOUNDS["max_length"], "min_len": BOUNDS["min_length"]}


class EvalLoader(Protocol):
    """This rank's batches of a split; `dataset` is the whole split, `batches` what `eval_batches` returned."""

    @property
    def dataset(self) -> EvalDataset: ...

    @property
    def batches(self) -> Sequence[Sequence[int]] | None: ...

    def __iter__(self) -> Iterator[Samples]: ...


@dataclass(kw_only=True)
class BaseTask:
    """Subclasses define `valid_step` and `score`, or `evaluate` as a whole."""

    model_methods: ClassVar[tuple[str, ...]] = ()
    """The model's methods that evaluation calls beside `forward`; a model without one of them is refused."""

    sample_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of the sample dict that the task itself reads in evaluation; a dataset without one of them is refused."""

    skips_unreadable: ClassVar[bool] = False
    """Whether an evaluation leaves out unreadable samples, up to `run.max_unreadable_share`; see `eval_batches`."""

    resumes: ClassVar[bool] = False
    """Whether an evaluation that was interrupted continues after its last batch: `valid_step` depends on its batch
    alone, and its results are plain values. See `unresumable`."""

    bounds: ClassVar[Mapping[str, Bounds]] = {}
    """Least and most of numeric fields; two integers ask for a whole number. None is always allowed."""

    choices: ClassVar[Mapping[str, Sequence[str]]] = {}
    """The values that a field may have."""

    fractions: ClassVar[frozenset[str]] = frozenset()
    """Metrics that are printed as fractions of 1; others are in percent."""

    _kept = tuple[Prediction, ...]()  # no field, so that it is not a key of the YAML
    _batches = BatchResults()

    def __post_init__(self) -> None:
        """Raise InputError for a field with a value that it cannot have."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        check_numbers("run", given, **self.bounds)
        for name, choices in self.choices.items():
            if vars(self)[name] is not None:
                one_of(f"run.{name}", vars(self)[name], choices)
        if given.get("min_len", 0) > given.get("max_len", float("inf")):
            raise InputError(f"run.min_len={given['min_len']} is above run.max_len={given['max_len']}: lower it")

    def check(self, model_class: type, dataset: EvalDataset, batch: Samples, *, split: str) -> None:
        """Raise InputError, before weights are loaded, if this split cannot be evaluated. Subclasses override it.

        `batch` holds the split's first sample; it is empty if none could be read.
        """

    def check_model(self, model: BaseModel, dataset: EvalDataset, batches: Sequence[Samples], *, split: str) -> None:
        """Raise InputError, before the first step, if the model has no room for this split's texts. Subclasses override
        it.

        `batches` hold one sample each, from across the split, with tensors on the meta device; so may the model be.
        """

    def unresumable(self) -> str | None:
        """Return why an interrupted evaluation starts anew; None if it continues. Subclasses override it for settings
        by which a batch depends on earlier ones.
        """
        return None if self.resumes else f"{type(self).__name__} does not compute its results batch by batch"

    def metric_names(self) -> tuple[str, ...]:
        """Return the names of the metrics that `score` gives for a split with answers, for the checks of `expected`.

        A name stands for what is below it too: `per_answer_type` for `per_answer_type.number`.
        """
        return ()

    @classmethod
    def setup_task(cls, cfg: Config) -> "BaseTask":
        """Return the task of a configuration. A task that is written after LAVIS's tutorial overrides it."""
        return cls(**cfg.task)

    @classmethod
    def lavis_defaults(cls, arch: str | None) -> dict[str, Any]:
        """Return LAVIS's defaults of fields that have others here, for an architecture; for `run.defaults: lavis`."""
        return {}

    def decoding_settings(self) -> dict[str, Any]:
        """Return the fields that set how a model decodes, without those left to the model (None)."""
        names = {*DECODING_BOUNDS, "use_nucleus_sampling"}
        return {name: value for name, value in vars(self).items() if name in names and value is not None}

    def generate_settings(self) -> dict[str, Any]:
        """Return the settings of a model's `generate`, which also returns scores if the task has `save_scores`."""
        return self.decoding_settings() | ({"return_scores": True} if vars(self).get("save_scores") else {})

    def build_datasets(self, cfg: Config) -> dict[str, dict[str, Any]]:
        """Return `{dataset name: {split: dataset}}` for the splits that the run uses and the dataset has.

        Raises InputError if a split of the run is in none of the datasets.
        """
        wanted = wanted_splits(cfg.run)
        built, existing = {}, {}
        for name in cfg.datasets:
            builder = make_builder(cfg, name)
            existing[name] = list(builder.splits())
            if splits := builder.build([split for split in wanted if split in existing[name]]):
                built[name] = splits
        check_splits(wanted, existing)
        if cfg.run.limit is not None:
            for name, split, dataset in ((name, *item) for name, splits in built.items() for item in splits.items()):
                if not isinstance(dataset, BaseDataset):
                    raise InputError(f"run.limit: {name}/{split} ({type(dataset).__name__}) is not a BaseDataset")
                dataset.keep_first(cfg.run.limit)
        return built

    def build_model(self, cfg: Config) -> BaseModel:
        """Return the model of `cfg.model`, with its weights."""
        device = dist.resolve_device(cfg.run.device)
        return build_model(registry.get_model_class(cfg.model["arch"]), cfg.model, device=device)

    def train_step(self, model: nn.Module, samples: Samples) -> dict[str, Any]:
        """Return the model's output for a batch: `loss`, which is differentiated, and its parts `loss_*`."""
        with naming_missing_keys(samples, model):
            return dict(model(samples))  # without what an Output computes later, which would hold its tensors

    def eval_batches(
        self, dataset: EvalDataset, *, batch_size: int, split: str, result_dir: Path
    ) -> Sequence[Sequence[int]] | None:
        """Return the indices of the samples in each batch that this rank evaluates; called on every rank.

        None: a contiguous share of the samples, in order, none of which may be unreadable.
        """
        return None

    def evaluate(self, model: nn.Module, loader: EvalLoader, *, split: str, result_dir: Path) -> Metrics:
        """Score all ranks' results for `loader.dataset`; files go to `result_dir`.

        Every rank gets the same metrics. `agg_metrics` is the number to maximise, None where nothing could be scored.
        """
        dataset, model = loader.dataset, unwrap(model)
        context = self.batch_context(dataset)
        results = self._batches.finished()
        with evaluating(model):
            for samples in loader:
                with naming_missing_keys(samples, model):
                    results += self._batches.add(self.valid_step(model, {**samples, **context}))
        results = gather(results, dataset)
        if not results:
            raise InputError(f"the {split} split is empty: there is nothing to evaluate")

        def conclude() -> Metrics:
            metrics = self.score(results, dataset=dataset, split=split, result_dir=Path(result_dir))
            self._kept = tuple(self.predictions(results, metrics, dataset=dataset, split=split))
            return metrics

        return dist.on_main(conclude)

    def predictions(
        self, results: list[Result], metrics: Metrics, *, dataset: EvalDataset, split: str
    ) -> list[Prediction]:
        """Return the samples' predictions with what was expected, for the run's files and the report; called on rank 0
        after `score`. Subclasses define it; the base class keeps none.
        """
        return []

    @contextlib.contextmanager
    def keeping(self, batches: BatchResults) -> Iterator[None]:
        """Within the body `evaluate` keeps the results of each batch, and begins with those that are finished."""
        self._batches = batches
        try:
            yield
        finally:
            self._batches = BatchResults()

    def take_predictions(self) -> tuple[Prediction, ...]:
        """Return the predictions of the last `evaluate`, once; on other ranks than 0 none."""
        kept, self._kept = self._kept, ()
        return kept

    def batch_context(self, dataset: EvalDataset) -> Samples:
        """Return keys that are added to every batch of this dataset, such as an answer list."""
        return {}

    def valid_step(self, model: Any, samples: Samples) -> list[Result]:
        """Return one dict of plain Python values per sample, each with its `instance_id`.

        `model` is `Any` here because each task asks for a protocol of its own (`models/protocols.py`).
        """
        raise NotImplementedError(f"{type(self).__name__} does not define valid_step")

    def score(self, results: list[Result], *, dataset: EvalDataset, split: str, result_dir: Path) -> Metrics:
        """Return the metrics of all results, with `agg_metrics` (higher is better, or None). Called on rank 0 only."""
        raise NotImplementedError(f"{type(self).__name__} does not define score")


def setup_task(cfg: Config) -> BaseTask:
    """Return the task of a configuration."""
    task: BaseTask = registry.get_task_class(cfg.run.task).setup_task(cfg)
    return task


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model without DistributedDataParallel."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode and disable gradients; restore the model's mode afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextlib.contextmanager
def naming_missing_keys(samples: Samples, model: nn.Module) -> Iterator[None]:
    """Turn a KeyError on a sample key into an error that names the model and the keys that the dataset provides."""
    try:
        yield
    except KeyError as error:
        key = error.key if isinstance(error, MissingInputError) else error.args[0]
        if key not in SampleDict.__annotations__ or key in samples:
            raise
        name = type(unwrap(model)).__name__
        raise InputError(f"{name} needs {key!r}, which the dataset's samples lack (they have {[*samples]})") from error


@contextlib.contextmanager
def naming_setting(setting: str, samples: Samples, model: nn.Module) -> Iterator[None]:
    """Begin an InputError of the model with the setting to change."""
    with naming_missing_keys(samples, model):
        try:
            yield
        except MissingInputError:
            raise
        except InputError as error:
            raise InputError(f"{setting}: {error}") from error


def check_settings(model_class: type, method: str, settings: Mapping[str, Any]) -> None:
    """Raise InputError, before weights are loaded, unless a model's method takes the settings that a task passes."""
    found = [vars(owner)[method] for owner in model_class.__mro__ if method in vars(owner)]
    parameters, is_open = schema_of(found[0]) if found else ({}, True)  # refused by its name already
    missing = [name for name in settings if name not in parameters]
    if missing and not is_open:
        takes = ", ".join(name for name in parameters if name not in ("self", "samples"))
        name = f"{model_class.__name__}.{method}"
        raise InputError(f"{name}: must take the setting {missing[0]!r}, takes only {takes}; accept **settings")


def make_builder(cfg: Config, name: str) -> BaseBuilder:
    """Return the builder of a dataset of the configuration."""
    section = cfg.datasets[name]
    arguments = {key: value for key, value in section.items() if key not in ("type", "builder")}
    if name in cfg.prompts:
        arguments["instructions"] = cfg.prompts[name]
    builder: BaseBuilder = registry.get_builder_class(builder_name(name, section))(**arguments)
    return builder


def named_file(key: str, source: str) -> Path:
    """Return the path of a file that a setting names, downloaded if it is a URL. MissingFileError if there is none."""
    path = download.fetch(source) if download.is_url(source) else Path(source).expanduser()
    if not path.is_file():
        raise MissingFileError(f"{key}: no such file: {path}")
    return path


def with_columns(cfg: Config, **columns: str) -> Config:
    """Return the configuration whose datasets read our fields from fields of other names: `caption="text"`.

    A dataset's own `columns` replace these. A field of our name, and `instance_id`, which files lack, are left out.
    """
    renamed = {ours: theirs for ours, theirs in columns.items() if theirs not in (ours, "instance_id")}
    if not renamed:
        return cfg
    datasets = {
        name: section | {"columns": renamed | (section.get("columns") or {})} for name, section in cfg.datasets.items()
    }
    return replace(cfg, datasets=datasets)


def with_eval_processors(cfg: Config) -> Config:
    """Return the configuration whose split `train` is processed as the others: nothing is cropped at random."""
    datasets = {
        name: section | {key: {**blocks, "train": blocks["eval"]} for key, blocks in processors_of(section).items()}
        for name, section in cfg.datasets.items()
    }
    return replace(cfg, datasets=datasets)


def processors_of(section: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the processors of a dataset's section that have a block `eval`."""
    return {key: section[key] for key in PROCESSOR_KEYS if (section.get(key) or {}).get("eval")}


def wanted_splits(run: RunConfig) -> list[str]:
    """Return the splits that a run uses, each once; without those to train on if it only evaluates."""
    evaluated = [*run.valid_splits, *run.test_splits]
    if run.evaluate and not evaluated:
        raise InputError("run.evaluate: run.valid_splits and run.test_splits are empty; name a split")
    return list(dict.fromkeys(evaluated if run.evaluate else [*run.train_splits, *evaluated]))


def check_splits(wanted: Iterable[str], existing: Mapping[str, Iterable[str]]) -> None:
    """Raise InputError if a wanted split is in no dataset; `existing` are the splits of each."""
    known = {name: list(splits) for name, splits in existing.items()}
    for split in wanted:
        if not any(split in splits for splits in known.values()):
            where = "run.train_splits, valid_splits, test_splits"
            hint = did_you_mean(split, {name for splits in known.values() for name in splits})
            raise InputError(f"{where}: no dataset has the split {split!r}. {hint} There are {known}")
