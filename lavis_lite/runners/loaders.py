"""Loaders: training batches from several datasets, evaluation batches in order, and their transfer to the device.

A training sample is read under its own seed (see sampling.py), so results do not depend on the number of workers. An
unreadable sample is passed to the main process as data, since an exception raised in a worker loses its plain message.
"""

import bisect
import itertools
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.errors import InputError, UnreadableSample
from lavis_lite.common.pixels import normalised
from lavis_lite.common.progress import progress
from lavis_lite.common.rng import preserve_rng_state, seed_sample
from lavis_lite.common.transfer import pins_memory, to_device
from lavis_lite.datasets.base import BaseDataset
from lavis_lite.datasets.protocols import EvalDataset, SampleDataset
from lavis_lite.datasets.streams import StreamDataset
from lavis_lite.models.shared_images import with_repeats, without_repeats
from lavis_lite.runners.ahead import on_device
from lavis_lite.runners.mixing import check_mixable, join_batches, missing_keys, with_own_image_id
from lavis_lite.runners.profiling import StepProfiler
from lavis_lite.runners.sampling import Key, make_sampler
from lavis_lite.runners.stopping import ignore_stop_signals, signals_blocked
from lavis_lite.runners.streaming import Batch, Item, ReadBatch, StreamLoader, describe_streams, unchanged
from lavis_lite.runners.workers import worker_options
from lavis_lite.tasks.base import check_splits

logger = logging.getLogger(__name__)

SHARE_WINDOW = 1000
"""The share of unreadable samples is judged over at least this many samples (or the data's length, if that is less)."""

T = TypeVar("T")
Sample = dict[str, Any]


Datasets = Mapping[str, Mapping[str, EvalDataset]]
"""{dataset name: {split: dataset}}"""


class SeededDatasets(Dataset[Batch]):
    """The training datasets of one loader: a list of `Key`s in, one `Batch` out.

    Keys of several datasets make one batch in their order, with those `keys` of the sample dict that all of them have.
    """

    def __init__(
        self, datasets: Mapping[str, SampleDataset], *, skip_unreadable: bool, keys: Sequence[str] | None = None
    ) -> None:
        self.datasets, self.skip_unreadable, self.keys = dict(datasets), skip_unreadable, keys
        self.read_batch: ReadBatch = unchanged
        self.positions = {name: position for position, name in enumerate(self.datasets)}

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        errors: list[str] = []
        with preserve_rng_state():
            pairs = [(key.dataset, sample) for key in keys if (sample := self.read(key, errors)) is not None]
            if len(pairs) < len(keys):
                return Batch(None, errors)
            runs = itertools.groupby(pairs, key=lambda pair: pair[0])
            parts = [(name, self.datasets[name].collater([sample for _, sample in run])) for name, run in runs]
            return Batch(self.read_batch(join_batches(parts, keys=self.keys)), errors)

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
    """Endless training batches of this rank, on `device`: `run.accum_grad_iters` of them for each step.

    `seen` and `unreadable` count this rank's samples. `left_out` has the keys that mixed batches do without, and the
    datasets that lack them.

    Raises:
        InputError: as `make_sampler` and `describe_streams`; or datasets that are mixed within batches do not fit.
    """

    def __init__(
        self,
        datasets: Mapping[str, SampleDataset],
        run: RunConfig,
        *,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        lengths = {name: len(dataset) for name, dataset in datasets.items()}
        streams = describe_streams(datasets, run, world=world)
        self.sampler = make_sampler(run, lengths, rank=rank, world=world, streams=streams)
        missing = first_samples_missing(datasets) if self.sampler.is_concat else {}
        self.left_out = {key: names for key, names in missing.items() if names}
        keys = [key for key, names in missing.items() if not names] if self.sampler.is_concat else None
        self.accumulate, self.max_share = run.accum_grad_iters, run.max_unreadable_share
        self.window = min(SHARE_WINDOW, sum(self.sampler.lengths.values()) // world)
        self.seen = self.unreadable = 0
        self.reader = reader = SeededDatasets(datasets, skip_unreadable=self.max_share > 0, keys=keys)
        pin = pins_memory(self.device)
        options = {"pin_memory": pin, "batch_sampler": self.sampler, **worker_options(run)}
        self.loader = _data_loader(reader, seed=run.seed, **options)
        self.streams = {
            name: StreamLoader(name, dataset, run, number=reader.positions[name], rank=rank, world=world, pin=pin)
            for name, dataset in datasets.items()
            if isinstance(dataset, StreamDataset)
        }
        """The loaders of the datasets that are streams; each has its own workers."""

    def read_by(self, read_batch: ReadBatch) -> None:
        """Let the loader workers change each batch on the CPU; before the iteration begins."""
        self.reader.read_batch = read_batch
        for stream in self.streams.values():
            stream.reader.read_batch = read_batch

    def __iter__(self) -> Generator[Sample]:
        for batch, take in on_device(self._items(), self.device):
            take()
            self.seen += self.sampler.batch_size
            if batch.errors:
                self._count(batch)
            assert batch.samples is not None, batch.errors
            yield batch.samples

    def _items(self) -> Iterator[Item]:
        if not self.streams:
            return map(Item, _started(self.loader))
        has_others = len(self.streams) < len(self.sampler.names)
        numbered: Iterator[Item] = map(Item, _started(self.loader)) if has_others else iter(())
        sources = dict.fromkeys(self.sampler.names, numbered) | {name: iter(one) for name, one in self.streams.items()}
        steps = itertools.count(self.sampler.start_step)
        return (next(sources[self.sampler.dataset_at(step)]) for step in steps for _ in range(self.accumulate))

    def _count(self, batch: Batch) -> None:
        """Count a batch's unreadable samples; raise UnreadableSample if they are more than allowed."""
        self.unreadable += len(batch.errors)
        counts = f"{self.unreadable} of {self.seen} training samples"
        is_few = batch.samples is not None and self.unreadable <= self.max_share * max(self.seen, self.window)
        warn_of_unreadable(batch.errors[-1], counts, self.max_share, is_few=is_few)


def warn_of_unreadable(example: str, counts: str, max_share: float, *, is_few: bool) -> None:
    """Log that unreadable samples are skipped, or raise UnreadableSample if they are more than a few."""
    if max_share == 0:
        raise UnreadableSample(f"{example} (To skip such samples, set run.max_unreadable_share to a small share.)")
    if not is_few:
        allowed = f"more than run.max_unreadable_share={max_share} allows"
        raise UnreadableSample(f"{counts} are unreadable, {allowed}: {example}")
    logger.warning(f"{counts} are unreadable so far; skipped: {example}")


def first_samples_missing(datasets: Mapping[str, SampleDataset]) -> dict[str, list[str]]:
    """Return `missing_keys` of the datasets' first readable samples.

    Raises:
        InputError: the datasets cannot share a batch.
        UnreadableSample: a dataset has no readable sample.
    """
    reader, firsts = SeededDatasets(datasets, skip_unreadable=True), {}
    for name in datasets:
        batch = reader.__getitems__([Key(name, 0, 0)])
        if batch.samples is None:
            raise UnreadableSample(f"dataset {name!r}: none of its first samples is readable: {batch.errors[0]}")
        firsts[name] = batch.samples
    check_mixable(firsts)
    return missing_keys(firsts)


class _Collated(Dataset[Batch]):
    """A dataset whose items are whole batches, or the error about the sample that prevented one. A batch has each image
    once, see models/shared_images.py.

    With `skip_unreadable` batches have the readable samples, whose indices are added as `positions`, and all errors.
    """

    def __init__(self, dataset: SampleDataset, *, skip_unreadable: bool) -> None:
        self.dataset, self.skip_unreadable = dataset, skip_unreadable

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        if not isinstance(self.dataset, BaseDataset):
            return self._batch(indices)
        with self.dataset.processing_once():
            return self._batch(indices)

    def _batch(self, indices: Sequence[int]) -> Batch:
        samples: dict[int, Sample] = {}
        errors: list[str] = []
        for index in indices:
            try:
                samples[index] = self.dataset[index]
            except UnreadableSample as error:
                errors.append(str(error))
                if not self.skip_unreadable:
                    return Batch(None, errors)
        if not self.skip_unreadable:
            return Batch(without_repeats(self.dataset.collater([*samples.values()])), [])
        collated = without_repeats(self.dataset.collater([*samples.values()])) if samples else {}
        return Batch({**collated, "positions": [*samples]}, errors)


class EvalLoader:
    """Evaluation batches of one rank, on `device`: its share of `dataset` in order, which is contiguous, so that the
    samples of one image stay in one batch; the ranks have each sample exactly once.

    The first `num_finished` batches are left out, as an earlier run has evaluated them.
    A task may choose the `batches` itself, lists of indices. Then up to `run.max_unreadable_share` of the samples are
    left out of them, and batches have the key `positions`, the indices of the others.
    """

    def __init__(
        self,
        dataset: EvalDataset,
        run: RunConfig,
        *,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        batches: Sequence[Sequence[int]] | None = None,
        name: str = "evaluation",
        profiler: StepProfiler | None = None,
        num_finished: int = 0,
    ) -> None:
        self.dataset, self.device, self.batches = dataset, torch.device(device), batches
        self.name, self.profiler = name, profiler or StepProfiler()
        self.max_share, self.seen, self.unreadable = run.max_unreadable_share, 0, 0
        size = run.batch_size_eval
        begin, end = (number * len(dataset) // world for number in (rank, rank + 1))
        indices = range(begin, end)[num_finished * size :]
        starts = range(0, len(indices), size)
        self.sizes = [min(size, len(indices) - start) for start in starts] if batches is None else [*map(len, batches)]
        count = len(indices if batches is None else batches)
        workers = {"pin_memory": pins_memory(self.device), **worker_options(run, at_most=count)}
        order: dict[str, Any] = {"batch_size": size, "sampler": indices}
        order = order if batches is None else {"batch_sampler": batches}
        reader = _Collated(dataset, skip_unreadable=batches is not None)
        self.loader = _data_loader(reader, seed=0, **order, **workers)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Sample]:
        batches = self.profiler.batches(_started(self.loader))
        for batch in progress(batches, sum(self.sizes), name=self.name, sizes=self.sizes):
            if batch.errors and self.batches is None:
                raise UnreadableSample(f"{batch.errors[0]} (Evaluation never skips samples.)")
            if self.batches is not None:
                self._count(batch)
            assert batch.samples is not None, batch.errors
            yield normalised(with_repeats(to_device(batch.samples, self.device)))

    def _count(self, batch: Batch) -> None:
        """Count a batch's unreadable samples; raise UnreadableSample if they are more than allowed."""
        assert batch.samples is not None
        self.seen += len(batch.samples["positions"]) + len(batch.errors)
        self.unreadable += len(batch.errors)
        if batch.errors:
            window = min(SHARE_WINDOW, sum(map(len, self.batches or ())))
            is_few = self.unreadable <= self.max_share * max(self.seen, window)
            warn_of_unreadable(
                batch.errors[-1], f"{self.unreadable} of {self.seen} samples", self.max_share, is_few=is_few
            )


def _data_loader(dataset: Dataset[Any], *, seed: int, **options: Any) -> DataLoader[Any]:
    """Return a loader of batches that `dataset` makes itself; `seed` keeps it from drawing from torch's generator."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, collate_fn=_identity, worker_init_fn=ignore_stop_signals, generator=generator, **options)


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    with signals_blocked():
        return iter(loader)


def train_sets(datasets: Datasets, splits: Sequence[str]) -> dict[str, SampleDataset]:
    """Return, for each dataset that has any of `splits`, those splits, concatenated where there are several.

    Raises:
        InputError: a split is in none of the datasets, or is laid out for evaluation.
    """
    check_splits(splits, datasets)
    sets: dict[str, SampleDataset] = {}
    for name, by_split in datasets.items():
        found = {split: by_split[split] for split in splits if split in by_split}
        differ = len(set(map(type, found.values()))) > 1
        for split, dataset in found.items():
            lacks_target = isinstance(dataset, BaseDataset) and not dataset.training
            if lacks_target or (differ and split != "train"):
                raise InputError(
                    f"run.train_splits: {name!r} lays out {split!r} for evaluation, as all splits but 'train'; name "
                    "its files under build_info.annotations.train, whose storage may be a list"
                )
        if any(isinstance(dataset, StreamDataset) for dataset in found.values()) and len(found) > 1:
            raise InputError(
                f"run.train_splits: of {name!r}, {', '.join(found)} cannot be joined, as one is a stream; list all "
                "shards under build_info.annotations.train, or make each split a dataset of its own"
            )
        if found:
            sets[name] = JoinedSplits(list(found.values())) if len(found) > 1 else next(iter(found.values()))
    return sets


def eval_sets(datasets: Datasets, splits: Sequence[str]) -> dict[str, EvalDataset]:
    """Return the datasets of `splits` by the name of their results: the split, or `<dataset>_<split>` of several."""
    found: dict[str, EvalDataset] = {}
    for split in splits:
        have = {name: by_split[split] for name, by_split in datasets.items() if split in by_split}
        found.update({split if len(have) == 1 else f"{name}_{split}": dataset for name, dataset in have.items()})
    return found


class JoinedSplits(ConcatDataset[Sample]):
    """Several splits of one dataset as one, collated as the first is; their image ids do not coincide."""

    def __init__(self, splits: Sequence[SampleDataset]) -> None:
        super().__init__(splits)  # type: ignore[arg-type]  # a dataset of the user's need not derive from torch's
        self.collater = splits[0].collater

    def __getitem__(self, index: int) -> Sample:
        number = bisect.bisect_right(self.cumulative_sizes, index)
        return with_own_image_id(super().__getitem__(index), number, kind="split")


def _identity(batch: T) -> T:
    return batch
