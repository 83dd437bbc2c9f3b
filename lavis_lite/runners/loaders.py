"""Loaders: training batches from several datasets, evaluation batches in order, and their way to the device.

A training sample is read under its own seed (see sampling.py), so results do not depend on the number of workers. An
unreadable sample travels to the main process as data, since an exception out of a worker loses its plain message.
"""

import bisect
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from lavis_lite.common.errors import InputError, UnreadableSample
from lavis_lite.runners.mixing import (
    batch_of_runs,
    check_mixable,
    lacking_sets,
    with_own_image_id,
)
from lavis_lite.runners.sampling import (
    ConcatSampler,
    Key,
    TrainSampler,
    dataset_shares,
    kept_rng,
    seed_sample,
)
from lavis_lite.runners.stopping import held_back, outlive_signals

logger = logging.getLogger(__name__)

SHARE_WINDOW = 1000
"""The share of unreadable samples is judged over at least this many samples (or the data's length, if that is less)."""


class Batch(NamedTuple):
    """A collated batch (None if an unreadable sample had no replacement) and the errors of unreadable samples."""

    samples: dict[str, Any] | None
    errors: list[str]


class SeededDatasets(Dataset):
    """The training datasets of one loader: a list of `Key`s in, one `Batch` out.

    Keys of several datasets make one batch in their order, with those `keys` of the sample dict that all of them have.
    """

    def __init__(
        self, datasets: Mapping[str, Dataset], *, skip_unreadable: bool, keys: Sequence[str] | None = None
    ) -> None:
        self.datasets, self.skip_unreadable, self.keys = dict(datasets), skip_unreadable, keys
        self.positions = {name: position for position, name in enumerate(self.datasets)}

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets.values())

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        errors: list[str] = []
        with kept_rng():
            samples = [self._read(key, errors) for key in keys]
            if any(sample is None for sample in samples):
                return Batch(None, errors)
            return Batch(self._collate([key.dataset for key in keys], samples), errors)

    def _collate(self, names: Sequence[str], samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate each run of samples of one dataset by its own collater, and join the runs."""
        runs = []
        for name, run in itertools.groupby(zip(names, samples, strict=True), key=lambda pair: pair[0]):
            runs.append((name, self.datasets[name].collater([sample for _, sample in run])))
        return batch_of_runs(runs, keys=self.keys)

    def _read(self, key: Key, errors: list[str]) -> dict[str, Any] | None:
        """The sample of `key`, or the next readable one after it if skipping is allowed; adds its error to `errors`."""
        dataset = self.datasets[key.dataset]
        for offset in range(min(len(dataset), SHARE_WINDOW) if self.skip_unreadable else 1):
            seed_sample(key.seed)
            try:
                sample = dataset[(key.index + offset) % len(dataset)]
                return with_own_image_id(sample, self.positions[key.dataset])
            except UnreadableSample as error:
                if offset == 0:  # what is met while looking for a replacement was not drawn
                    errors.append(str(error))
        return None


class TrainLoader:
    """Endless training batches of this rank, on the CPU; `seek` sets where the next `iter()` starts.

    `steps_per_epoch` is the sum of the datasets' lengths over the global batch, rounded down. `seen` and `unreadable`
    count this rank's samples. `left_out` has the keys that mixed batches do without, and the datasets that lack them.
    """

    def __init__(
        self, datasets: Mapping[str, Dataset], run: Any, *, rank: int = 0, world: int = 1, pin: bool = False
    ) -> None:
        if not datasets:
            raise InputError(
                "no dataset to train on: run.train_splits and the datasets section have no split in common"
            )
        lengths = {name: len(dataset) for name, dataset in datasets.items()}
        self.is_concat = len(lengths) > 1 and run.mixing == "concat"
        placed = {"batch_size": run.batch_size_train, "seed": run.seed, "rank": rank, "world": world}
        self.sampler = ConcatSampler(lengths, **placed) if self.is_concat else _drawing_sampler(lengths, run, placed)
        self.steps_per_epoch = sum(lengths.values()) // self.sampler.global_batch
        self.max_share, self.window = run.max_unreadable_share, min(SHARE_WINDOW, sum(lengths.values()) // world)
        self.seen = self.unreadable = 0
        lacking = _lacking_sets(datasets) if self.is_concat else None
        self.left_out = {key: names for key, names in (lacking or {}).items() if names}
        keys = None if lacking is None else [key for key, names in lacking.items() if not names]
        self.loader = DataLoader(
            SeededDatasets(datasets, skip_unreadable=self.max_share > 0, keys=keys),
            batch_sampler=self.sampler,
            collate_fn=_as_is,
            num_workers=run.num_workers,
            pin_memory=pin,
            worker_init_fn=outlive_signals,
            generator=torch.Generator().manual_seed(run.seed),
        )

    def seek(self, epoch: int, step: int = 0) -> None:
        """Makes the next `iter()` start at iteration `step` of `epoch` (both 0-based), loading nothing before it."""
        self.sampler.start_step = epoch * self.steps_per_epoch + step

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with held_back():
            batches = iter(self.loader)
        for batch in batches:
            self.seen += self.sampler.batch_size
            if batch.errors:
                self._count(batch)
            yield batch.samples

    def _count(self, batch: Batch) -> None:
        """Counts a batch's unreadable samples and raises UnreadableSample if they are more than allowed."""
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


def _drawing_sampler(lengths: Mapping[str, int], run: Any, placed: Mapping[str, int]) -> TrainSampler:
    shares = dataset_shares(
        lengths,
        sampling=run.train_dataset_sampling,
        factors=run.train_dataset_factors,
        ratios=run.train_dataset_ratios,
    )
    return TrainSampler(lengths, shares, **placed)


def _lacking_sets(datasets: Mapping[str, Dataset]) -> dict[str, list[str]]:
    """`lacking_sets` of the datasets' first samples. Raises InputError for datasets that cannot share a batch."""
    firsts = {name: first_batch(dataset, name) for name, dataset in datasets.items()}
    check_mixable(firsts)
    return lacking_sets(firsts)


def first_batch(dataset: Dataset, name: str) -> dict[str, Any]:
    """Return the batch of the first readable sample of a training set. Raises UnreadableSample if there is none."""
    errors: list[str] = []
    read = SeededDatasets({name: dataset}, skip_unreadable=True)
    with kept_rng():
        sample = read._read(Key(name, 0, 0), errors)
        if sample is None:
            raise UnreadableSample(f"dataset {name!r}: none of its first samples is readable: {errors[0]}")
        return dataset.collater([sample])


def train_loader(
    datasets: Mapping[str, Dataset], run: Any, *, rank: int = 0, world: int = 1, pin: bool = False
) -> TrainLoader:
    """The loader of `run` (a RunConfig) over the training datasets by name; `pin` puts batches into pinned memory.

    Raises:
        ValueError: there is no dataset, one is smaller than the global batch, or the ratios or factors name others.
    """
    return TrainLoader(datasets, run, rank=rank, world=world, pin=pin)


class _Collated(Dataset):
    """A dataset whose items are whole batches, or the UnreadableSample that prevented one."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any] | UnreadableSample:
        try:
            return self.dataset.collater([self.dataset[index] for index in indices])
        except UnreadableSample as error:
            return UnreadableSample(str(error))


class EvalLoader:
    """One rank's share (`indices`) of `dataset`, in order, not padded and perhaps empty; batches arrive on `device`."""

    def __init__(self, dataset: Dataset, run: Any, *, indices: range, device: torch.device) -> None:
        self.dataset, self.batch_size, self.indices, self.device = dataset, run.batch_size_eval, indices, device
        self.loader = DataLoader(
            _Collated(dataset),
            batch_size=self.batch_size,
            sampler=indices,
            collate_fn=_as_is,
            num_workers=min(run.num_workers, len(indices)),
            pin_memory=device.type == "cuda",
            worker_init_fn=outlive_signals,
            generator=torch.Generator().manual_seed(0),
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with held_back():
            batches = iter(self.loader)
        for batch in batches:
            if isinstance(batch, UnreadableSample):
                raise UnreadableSample(f"{batch} (Evaluation never skips samples.)")
            yield to_device(batch, self.device)


def eval_loader(
    dataset: Dataset, run: Any, *, rank: int = 0, world: int = 1, device: torch.device | str = "cpu"
) -> EvalLoader:
    """The evaluation loader of `run` (a RunConfig): samples rank, rank + world, ... of `dataset`, each exactly once."""
    return EvalLoader(dataset, run, indices=range(rank, len(dataset), world), device=torch.device(device))


def to_device(batch: Any, device: torch.device | str) -> Any:
    """`batch` with every tensor in its dicts, lists and tuples moved to `device`; asynchronous from pinned memory."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def train_sets(datasets: Mapping[str, Mapping[str, Dataset]], splits: Sequence[str]) -> dict[str, Dataset]:
    """Of each dataset that has any of `splits`, those splits, concatenated where there are several.

    Raises:
        ValueError: a split is in none of the datasets, or is laid out for evaluation.
    """
    check_splits(datasets, splits, setting="train_splits")
    parts = {name: {s: by_split[s] for s in splits if s in by_split} for name, by_split in datasets.items()}
    for name, found in parts.items():
        check_layout(name, found)
    return {name: _concatenated(list(found.values())) for name, found in parts.items() if found}


def check_layout(name: str, found: Mapping[str, Dataset]) -> None:
    """Raises ValueError if a dataset's split to train on is laid out for evaluation, without what is learned."""
    differ = len(set(map(type, found.values()))) > 1
    for split, dataset in found.items():
        if not getattr(dataset, "training", True) or (differ and split != "train"):
            raise InputError(
                f"run.train_splits names {split!r}, which {name!r} lays out for evaluation, as all splits but 'train': "
                "name its files under build_info.annotations.train, whose storage may be a list"
            )


def eval_sets(datasets: Mapping[str, Mapping[str, Dataset]], splits: Sequence[str]) -> dict[str, Dataset]:
    """The datasets of `splits` by the key of their results: the split, or `<dataset>_<split>` if several have it."""
    found: dict[str, Dataset] = {}
    for split in splits:
        have = {name: by_split[split] for name, by_split in datasets.items() if split in by_split}
        found.update({split if len(have) == 1 else f"{name}_{split}": dataset for name, dataset in have.items()})
    return found


def check_splits(datasets: Mapping[str, Mapping[str, Dataset]], splits: Sequence[str], *, setting: str) -> None:
    """Raises ValueError naming `run.<setting>` if one of `splits` is in none of the datasets."""
    have = {name: sorted(by_split) for name, by_split in datasets.items()}
    for split in splits:
        if not any(split in by_split for by_split in datasets.values()):
            raise InputError(f"run.{setting} names the split {split!r}, which no dataset has; there are {have}")


class JoinedSplits(ConcatDataset):
    """Several splits of one dataset as one, whose image ids do not coincide."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        part = bisect.bisect_right(self.cumulative_sizes, index)
        return with_own_image_id(super().__getitem__(index), part, kind="split")


def _concatenated(parts: Sequence[Dataset]) -> Dataset:
    if len(parts) == 1:
        return parts[0]
    joined = JoinedSplits(parts)
    joined.collater = parts[0].collater
    return joined


def _as_is(batch: Any) -> Any:
    return batch
