"""What every task is: datasets and model from the config, a training step, and an evaluation that runs on every rank.

A task's dataclass fields are keys of the YAML's `run` section. Metrics are computed on rank 0 and handed to all ranks.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from lavis_lite.common import dist
from lavis_lite.common.bounds import check_number
from lavis_lite.common.config.sections import builder_name
from lavis_lite.common.errors import InputError, MissingInputError
from lavis_lite.common.registry import did_you_mean, registry
from lavis_lite.tasks.results import Result, gather

Samples = dict[str, Any]
Metrics = dict[str, Any]

MOST_BEAMS, MOST_TOKENS = 1000, 100_000  # beyond, a setting is a slip that would end in a lack of memory

SAMPLE_KEYS = (
    *("image", "image0", "image1", "text_input", "image_id", "instance_id", "question_id", "index"),
    *("answer", "weight", "n_answers", "label", "text_output"),
)


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, out of DistributedDataParallel."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and no gradients; afterwards in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextlib.contextmanager
def batch_of(samples: Samples, model: nn.Module) -> Iterator[None]:
    """Says of a sample-dict key that is asked for and missing which model asked, and what the dataset gives."""
    try:
        yield
    except KeyError as error:
        key = error.key if isinstance(error, MissingInputError) else error.args[0]
        if key not in SAMPLE_KEYS or key in samples:
            raise
        raise InputError(
            f"{type(unwrap(model)).__name__} needs {key!r}, which the dataset's samples lack (they have "
            f"{', '.join(samples)}): choose a dataset that fits the model and the task"
        ) from error


@dataclass(kw_only=True)
class BaseTask:
    """Subclasses define `valid_step` and `score`, or `evaluate` as a whole."""

    model_methods: ClassVar[tuple[str, ...]] = ()
    """What evaluation calls of the model beside `forward`; a model without one of these is refused."""

    sample_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of the sample dict that the task itself reads in evaluation; a dataset without one of these is refused."""

    def check(self, model_class: type, dataset: Any, batch: Samples, *, split: str) -> None:
        """Raise, before weights are loaded, if this split cannot be evaluated: subclasses check files and settings.

        `batch` is of the split's first sample, or empty where none could be read.
        """

    def check_model(self, model: nn.Module, dataset: Any, batches: Sequence[Samples], *, split: str) -> None:
        """Raise, before the first step, if the model cannot answer this split: subclasses check lengths.

        `batches` hold one sample each, of some that are spread over the split, on the meta device; so may the model be.
        """

    def build_datasets(self, cfg: Any) -> dict[str, dict[str, Any]]:
        """`{dataset name: {split: dataset}}` for the splits that the run uses and the dataset has.

        Raises ValueError if a split of the run is in none of the datasets.
        """
        wanted, prompts = wanted_splits(cfg.run), getattr(cfg, "prompts", {})
        built, existing = {}, {}
        for name, section in cfg.datasets.items():
            arguments = {key: value for key, value in section.items() if key not in ("type", "builder")}
            if name in prompts:
                arguments["instructions"] = prompts[name]
            builder = registry.get_builder_class(builder_name(name, section))(**arguments)
            existing[name] = list(builder.splits())
            splits = builder.build([split for split in wanted if split in existing[name]])
            if splits:
                built[name] = splits
        check_splits(wanted, existing)
        return built

    def build_model(self, cfg: Any) -> nn.Module:
        """The model of `cfg.model`, with its weights."""
        device = dist.resolve_device(cfg.run.device)
        return registry.get_model_class(cfg.model["arch"]).from_config(cfg.model, device=device)

    def train_step(self, model: nn.Module, samples: Samples) -> dict[str, Any]:
        """One forward pass; the answer has `loss` (to differentiate) and its parts `loss_*`."""
        with batch_of(samples, model):
            return model(samples)

    def evaluate(self, model: nn.Module, loader: Iterable[Samples], *, split: str, result_dir: Path) -> Metrics:
        """Answer every sample of `loader` (this rank's share of `loader.dataset`) and score all ranks' answers.

        Every rank gets the same metrics, with the number to maximise under `agg_metrics`, None where nothing could be
        scored. Files go to `result_dir`.
        """
        dataset, model = loader.dataset, unwrap(model)
        context = self.batch_context(dataset)
        results: list[Result] = []
        with evaluating(model):
            for samples in loader:
                with batch_of(samples, model):
                    results += self.valid_step(model, {**samples, **context})
        results = gather(results, dataset)
        if not results:
            raise InputError(f"the {split} split is empty: there is nothing to evaluate")
        return dist.on_main(lambda: self.score(results, dataset=dataset, split=split, result_dir=Path(result_dir)))

    def batch_context(self, dataset: Any) -> Samples:
        """What every batch of this dataset needs beside its own keys (an answer list, say)."""
        return {}

    def valid_step(self, model: nn.Module, samples: Samples) -> list[Result]:
        """One plain-Python dict a sample, each with its `instance_id`."""
        raise NotImplementedError(f"{type(self).__name__} does not define valid_step")

    def score(self, results: list[Result], *, dataset: Any, split: str, result_dir: Path) -> Metrics:
        """Metrics of all results (rank 0 only), with a number under `agg_metrics` (higher is better), or None there if
        the split has nothing to score by.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define score")

    def arguments_for(self, method: Callable[..., Any], names: Mapping[str, str]) -> dict[str, Any]:
        """Keyword arguments for a model's method, out of this task's fields; `names` maps argument to field.

        A field that is None is left to the model's own default. What the method does not take is left out if the field
        has its default; raises ValueError if it was set, since it would have no effect.
        """
        parameters = inspect.signature(method).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        defaults = {field.name: field.default for field in fields(self)}
        arguments = {}
        for argument, name in names.items():
            value = getattr(self, name)
            if value is None:
                continue
            if open_ended or argument in parameters:
                arguments[argument] = value
            elif value != defaults[name]:
                is_bound = hasattr(method, "__self__")
                owner = type(method.__self__).__name__ if is_bound else method.__qualname__.split(".")[-2]
                raise InputError(
                    f"run.{name}={value!r} has no effect: {owner}.{method.__name__} takes no '{argument}', only "
                    f"{', '.join(p for p in parameters if p not in ('self', 'samples'))}. Leave run.{name} out."
                )
        return arguments


def check_range(task: Any, **bounds: tuple[float, float]) -> None:
    """Raise ValueError for a field outside of its bounds (least, most), or no whole number between two integers;
    None is left alone.
    """
    for name, (least, most) in bounds.items():
        value = getattr(task, name)
        if value is not None:
            check_number(f"run.{name}", value, least, most)
    if {"min_len", "max_len"} <= bounds.keys() and task.min_len > task.max_len:
        raise InputError(f"run.min_len={task.min_len} is above run.max_len={task.max_len}: lower it")


def check_method(
    task: Any,
    model: nn.Module,
    method: str,
    samples: Samples,
    names: Mapping[str, str],
    *,
    setting: str,
    **arguments: Any,
) -> None:
    """Raise InputError, which begins with the `setting` to change, if the model's `method` would refuse these samples.

    A model says so by `check_<method>`; one without it is not asked. `names` are as in `arguments_for`.
    """
    check = getattr(model, f"check_{method}", None)
    if check is None:
        return
    arguments |= task.arguments_for(check, names)
    with batch_of(samples, model):
        try:
            check(samples, **arguments)
        except MissingInputError:
            raise
        except InputError as error:
            raise InputError(f"{setting}: {error}") from error


def wanted_splits(run: Any) -> list[str]:
    """The splits that a run uses, each once: none to train on when it only evaluates."""
    evaluated = list(dict.fromkeys([*run.valid_splits, *run.test_splits]))
    if not getattr(run, "evaluate", False):
        return list(dict.fromkeys([*run.train_splits, *evaluated]))
    if not evaluated:
        raise InputError(
            "run.evaluate is true but run.valid_splits and run.test_splits are empty: name the splits, e.g. "
            "test_splits: [test]"
        )
    return evaluated


def check_splits(wanted: Iterable[str], existing: Mapping[str, list[str]]) -> None:
    """Raise ValueError if a wanted split is in no dataset, saying which splits there are."""
    every = sorted({split for splits in existing.values() for split in splits})
    listing = "; ".join(f"{name}: {', '.join(splits) or 'none'}" for name, splits in existing.items())
    for split in wanted:
        if split not in every:
            raise InputError(
                f"no dataset has the split '{split}' (run.train_splits, valid_splits, test_splits). "
                f"{did_you_mean(split, every)} Splits there are: {listing or 'none, since cfg.datasets is empty'}"
            )
