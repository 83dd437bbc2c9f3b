"""Loaders: training batches from several datasets, evaluation batches in order, and their transfer to the device.

A training sample is read under its own seed (see sampling.py), so results do not depend on the number of workers. An
unreadable sample is passed to the main process as data, since an exception raised in a worker loses its plain message.
"""

import bisect
import itertools
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.errors import InputError, UnreadableSample
from lavis_lite.common.rng import preserve_rng_state, seed_sample
from lavis_lite.datasets.base import BaseDataset
from lavis_lite.datasets.protocols import EvalDataset, SampleDataset
from lavis_lite.runners.mixing import check_mixable, join_batches, missing_keys, with_own_image_id
from lavis_lite.runners.sampling import Key, make_sampler
from lavis_lite.runners.stopping import ignore_stop_signals, signals_blocked
from lavis_lite.tasks.base import check_splits

logger = logging.getLogger(__name__)

SHARE_WINDOW = 1000
"""The share of unreadable samples is judged over at least this many samples (or the data's length, if that is less)."""

T = TypeVar("T")
Sample = dict[str, Any]


Datasets = Mapping[str, Mapping[str, EvalDataset]]
"""{dataset name: {split: dataset}}"""


class Batch(NamedTuple):
    """A collated batch (None if an unreadable sample had no replacement) and the errors of unreadable samples."""

    samples: Sample | None
    errors: list[str]


class SeededDatasets(Dataset[Batch]):
    """The training datasets of one loader: a list of `Key`s in, one `Batch` out.

    Keys of several datasets make one batch in their order, with those `keys` of the sample dict that all of them have.
    """

    def __init__(
        self, datasets: Mapping[str, SampleDataset], *, skip_unreadable: bool, keys: Sequence[str] | None = None
    ) -> None:
        self.datasets, self.skip_unreadable, self.keys = dict(datasets), skip_unreadable, keys
        self.positions = {name: position for position, name in enumerate(self.datasets)}

    def __len__(self) -> int:
        return sum(map(len, self.datasets.values()))

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        errors: list[str] = []
        with preserve_rng_state():
            samples = [sample for key in keys if (sample := self.read(key, errors)) is not None]
            if len(samples) < len(keys):
                return Batch(None, errors)
            return Batch(self._collate([key.dataset for key in keys], samples), errors)

    def _collate(self, names: Sequence[str], samples: Sequence[Sample]) -> Sample:
        """Collate each run of samples of one dataset by its own collater, and join the runs."""
        parts = []
        for name, run in itertools.groupby(zip(names, samples, strict=True), key=lambda pair: pair[0]):
            parts.append((name, self.datasets[name].collater([sample for _, sample in run])))
        return join_batches(parts, keys=self.keys)

    def read(self, key: Key, errors: list[str]) -> Sample | None:
        """Return the sample of `key`, or the next readable one if skipping is allowed; add its error to `errors`."""
        dataset = self.datasets[key.dataset]
        for offset in range(min(len(dataset), SHARE_WINDOW) if self.skip_unreadable else 1):
            seed_sample(key.seed)
            try:
                sample = dataset[(key.position + offset) % len(dataset)]
                return with_own_image_id(sample, self.positions[key.dataset])
            except UnreadableSample as error:
                if offset == 0:  # only what was drawn counts, not what is skipped while looking for a replacement
                    errors.append(str(error))
        return None


class TrainLoader:
    """Endless training batches of this rank, on the CPU: `run.accum_grad_iters` of them for each step.

    `seen` and `unreadable` count this rank's samples. `left_out` has the keys that mixed batches do without, and the
    datasets that lack them. `pin` puts batches into pinned memory.

    Raises:
        InputError: as `make_sampler`; or datasets that are mixed within batches do not fit.
    """

    def __init__(
        self,
        datasets: Mapping[str, SampleDataset],
        run: RunConfig,
        *,
        rank: int = 0,
        world: int = 1,
        pin: bool = False,
    ) -> None:
        self.sampler = make_sampler(
            run, {name: len(dataset) for name, dataset in datasets.items()}, rank=rank, world=world
        )
        missing = first_samples_missing(datasets) if self.sampler.is_concat else {}
        self.left_out = {key: names for key, names in missing.items() if names}
        keys = [key for key, names in missing.items() if not names] if self.sampler.is_concat else None
        self.max_share = run.max_unreadable_share
        self.window = min(SHARE_WINDOW, sum(self.sampler.lengths.values()) // world)
        self.seen = self.unreadable = 0
        reader = SeededDatasets(datasets, skip_unreadable=self.max_share > 0, keys=keys)
        self.loader = _data_loader(
            reader, seed=run.seed, num_workers=run.num_workers, pin_memory=pin, batch_sampler=self.sampler
        )

    def seek(self, step: int) -> None:
        """Make the next `iter()` start at `step` (0-based), without loading the batches before it."""
        self.sampler.start_step = step

    def __iter__(self) -> Generator[Sample]:
        for batch in _started(self.loader):
            self.seen += self.sampler.batch_size
            if batch.errors:
                self._count(batch)
            yield batch.samples

    def _count(self, batch: Batch) -> None:
        """Count a batch's unreadable samples; raise UnreadableSample if they are more than allowed."""
        self.unreadable += len(batch.errors)
        example = batch.errors[-1]
        if self.max_share == 0:
            raise UnreadableSample(f"{example} (To skip such samples, set run.max_unreadable_share to a small share.)")
        if batch.samples is None or self.unreadable > self.max_share * max(self.seen, self.window):
            raise UnreadableSample(
                f"{self.unreadable} of {self.seen} training samples are unreadable, more than "
                f"run.max_unreadable_share={self.max_share} allows. One of them: {example}"
            )
        logger.warning(f"{self.unreadable} of {self.seen} training samples so far are unreadable; skipped: {example}")


def first_samples_missing(datasets: Mapping[str, SampleDataset]) -> dict[str, list[str]]:
    """Return `missing_keys` of the datasets' first readable samples.

    Raises:
        InputError: the datasets cannot share a batch.
        UnreadableSample: a dataset has no readable sample.
    """
    firsts = {name: _first_batch(dataset, name) for name, dataset in datasets.items()}
    check_mixable(firsts)
    return missing_keys(firsts)


def _first_batch(dataset: SampleDataset, name: str) -> Sample:
    errors: list[str] = []
    with preserve_rng_state():
        sample = SeededDatasets({name: dataset}, skip_unreadable=True).read(Key(name, 0, 0), errors)
        if sample is None:
            raise UnreadableSample(f"dataset {name!r}: none of its first samples is readable: {errors[0]}")
        return dataset.collater([sample])


class _Collated(Dataset[Any]):
    """A dataset whose items are whole batches, or the UnreadableSample that prevented one."""

    def __init__(self, dataset: SampleDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> Sample | UnreadableSample:
        try:
            return self.dataset.collater([self.dataset[index] for index in indices])
        except UnreadableSample as error:
            return UnreadableSample(str(error))


class EvalLoader:
    """Evaluation batches of one rank, on `device`: samples rank, rank + world, ... of `dataset`, each exactly once."""

    def __init__(
        self,
        dataset: EvalDataset,
        run: RunConfig,
        *,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.dataset, self.batch_size, self.device = dataset, run.batch_size_eval, torch.device(device)
        self.indices = range(rank, len(dataset), world)
        workers = {"num_workers": min(run.num_workers, len(self.indices)), "pin_memory": self.device.type == "cuda"}
        self.loader = _data_loader(
            _Collated(dataset), seed=0, **workers, batch_size=self.batch_size, sampler=self.indices
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Sample]:
        for batch in _started(self.loader):
            if isinstance(batch, UnreadableSample):
                raise UnreadableSample(f"{batch} (Evaluation never skips samples.)")
            yield to_device(batch, self.device)


def _data_loader(dataset: Dataset[Any], *, seed: int, **options: Any) -> DataLoader[Any]:
    """Return a loader of batches that `dataset` makes itself; `seed` keeps it from drawing from torch's generator."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, collate_fn=_identity, worker_init_fn=ignore_stop_signals, generator=generator, **options)


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    with signals_blocked():
        return iter(loader)


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Return `batch` with every tensor in its dicts, lists and tuples on `device`; asynchronous from pinned memory."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and type(batch) is not tuple:
        return type(batch)(*(to_device(value, device) for value in batch))  # a named tuple
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def train_sets(datasets: Datasets, splits: Sequence[str]) -> dict[str, SampleDataset]:
    """Return, for each dataset that has any of `splits`, those splits, concatenated where there are several.

    Raises:
        InputError: a split is in none of the datasets, or is laid out for evaluation.
    """
    check_splits(splits, split_names(datasets))
    parts = {name: {s: by_split[s] for s in splits if s in by_split} for name, by_split in datasets.items()}
    for name, found in parts.items():
        _check_layout(name, found)
    found_parts = {name: list(found.values()) for name, found in parts.items() if found}
    return {name: JoinedSplits(found) if len(found) > 1 else found[0] for name, found in found_parts.items()}


def _check_layout(name: str, found: Mapping[str, SampleDataset]) -> None:
    """Raise InputError if a split to train on is laid out for evaluation, so that it lacks the training target."""
    differ = len(set(map(type, found.values()))) > 1
    for split, dataset in found.items():
        is_for_evaluation = isinstance(dataset, BaseDataset) and not dataset.training
        if is_for_evaluation or (differ and split != "train"):
            raise InputError(
                f"run.train_splits: {name!r} lays out {split!r} for evaluation, as all splits but 'train'; name its "
                "files under build_info.annotations.train, whose storage may be a list"
            )


def eval_sets(datasets: Datasets, splits: Sequence[str]) -> dict[str, EvalDataset]:
    """Return the datasets of `splits` by the name of their results: the split, or `<dataset>_<split>` of several."""
    found: dict[str, EvalDataset] = {}
    for split in splits:
        have = {name: by_split[split] for name, by_split in datasets.items() if split in by_split}
        found.update({split if len(have) == 1 else f"{name}_{split}": dataset for name, dataset in have.items()})
    return found


def split_names(datasets: Datasets) -> dict[str, list[str]]:
    """Return the names of each dataset's splits."""
    return {name: sorted(by_split) for name, by_split in datasets.items()}


class JoinedSplits(Dataset[Sample]):
    """Several splits of one dataset as one, collated as the first is; their image ids do not coincide."""

    def __init__(self, splits: Sequence[SampleDataset]) -> None:
        self.splits, self.collater = splits, splits[0].collater
        self.ends = list(itertools.accumulate(map(len, splits)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        number = bisect.bisect_right(self.ends, index)
        split = self.splits[number]
        return with_own_image_id(split[index - self.ends[number] + len(split)], number, kind="split")


def _identity(batch: T) -> T:
    return batch
