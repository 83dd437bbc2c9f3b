"""Assignment of samples to batches: permutations, and mixtures of several datasets.

Everything is a pure function of (run.seed, step), a step being an update by one global batch. A step's samples depend
neither on the number of workers, nor on how its global batch is divided into ranks and accumulated batches, nor on
whether the run was stopped before. Nothing here draws from the global generators.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.errors import InputError
from lavis_lite.common.rng import hash_seed

POWERS = {"size": 1.0, "sqrt": 0.5, "uniform": 0.0}
"""`run.train_dataset_sampling`: the power of a dataset's length to which its share is proportional."""


class Key(NamedTuple):
    """One draw: a dataset, the position of a sample in it, and the seed of that sample's transforms."""

    dataset: str
    position: int
    seed: int


def dataset_shares(
    lengths: Mapping[str, int],
    *,
    sampling: str = "size",
    factors: Mapping[str, float] | None = None,
    ratios: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return the probability that a step's batch comes from each dataset; they sum to 1.

    `ratios`, or else a power of the lengths (`POWERS`; the square root in InstructBLIP, section 2.4) times `factors`.

    Raises:
        InputError: `ratios` or `factors` do not fit the datasets, or leave none.
    """
    setting, given = ("ratios", ratios) if ratios else ("factors", factors or {})
    unknown, missing = given.keys() - lengths.keys(), lengths.keys() - given.keys() if ratios else set()
    if unknown or missing:
        raise InputError(
            f"run.train_dataset_{setting}: names {sorted(given)}, but the training datasets are {sorted(lengths)}"
        )
    own = ratios or {
        name: max(length, 1) ** POWERS[sampling] * given.get(name, 1.0)  # the sampler refuses an empty one
        for name, length in lengths.items()
    }
    weights = np.array([own[name] for name in lengths], dtype=np.float64)
    if weights.min() < 0 or weights.sum() <= 0:
        raise InputError(f"run.train_dataset_{setting}: must not be negative and not all 0, got {dict(given)}")
    return dict(zip(lengths, (weights / weights.sum()).tolist(), strict=True))


class TrainSampler:
    """An endless series of one rank's batches of `Key`s from `start_step` on.

    A step is a global batch of `accumulate` batches on each of `world` ranks. Its samples are of one dataset, drawn by
    `shares` from the hash of (seed, step), the same on all ranks; or, without shares, of all datasets as if they were
    one, each by its length. A dataset's own epoch (or that of all) is a fresh permutation cut into global batches; the
    rest, smaller than one, is dropped. Ranks and batches divide a global batch in order, so that all of them together
    hold what one process without accumulation has in its batch.

    `streams` are the datasets whose samples have no numbers, with a description: their steps are left out of the
    series.

    Raises:
        InputError: streams would be mixed within batches; a dataset (or all together) is smaller than the global batch.
    """

    def __init__(
        self,
        lengths: Mapping[str, int],
        shares: Mapping[str, float] | None,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        streams: Mapping[str, str] | None = None,
    ) -> None:
        self.streams = dict(streams or {})
        self.lengths, self.names, self.is_concat = dict(lengths), list(lengths), shares is None
        total = sum(self.lengths.values())
        shares = shares or {name: length / max(total, 1) for name, length in lengths.items()}
        self.shares = {name: shares[name] for name in self.names}
        self.seed, self.rank, self.start_step = seed, rank, 0
        self.division = (accumulate, world, batch_size)
        self.batch_size, self.global_batch = batch_size, batch_size * world * accumulate
        self.steps_per_epoch = total // self.global_batch
        self.groups = {"": self.names} if self.is_concat else {name: [name] for name in self.names}
        """Datasets that are permuted as a whole: one, or all (no dataset has an empty name)."""
        self._check_lengths()
        self.ends = {group: np.cumsum([self.lengths[name] for name in names]) for group, names in self.groups.items()}
        self.bounds = np.cumsum(list(self.shares.values()))
        self._orders: dict[str, tuple[int, np.ndarray]] = {}  # each group's present epoch and its order

    def __iter__(self) -> Iterator[list[Key]]:
        if len(self.streams) == len(self.names):
            return
        draws = dict.fromkeys(self.groups, 0)
        for step in itertools.count():
            group = "" if self.is_concat else self.dataset_at(step)
            if step >= self.start_step and group not in self.streams:
                epoch, position = divmod(draws[group], int(self.ends[group][-1]) // self.global_batch)
                start = position * self.global_batch
                numbers = self._order(group, epoch)[start : start + self.global_batch]
                for batch in numbers.reshape(self.division)[:, self.rank]:
                    yield self._keys(group, epoch, batch)
            draws[group] += 1

    @property
    def draws_datasets(self) -> bool:
        """Return whether each step's samples are of one dataset out of several."""
        return len(self.names) > 1 and not self.is_concat

    def dataset_at(self, step: int) -> str:
        """Return the name of the dataset that is drawn for `step`."""
        uniform = hash_seed(self.seed, "mix", step) / 2**63
        return self.names[min(int(np.searchsorted(self.bounds, uniform, side="right")), len(self.names) - 1)]

    def counts_between(self, first: int, end: int) -> dict[str, int]:
        """Return what each dataset gives in the steps from `first` to before `end`: global batches, or samples where
        all are mixed.
        """
        found: Counter[str] = Counter(dict.fromkeys(self.names, 0))
        if not self.is_concat:
            found.update(map(self.dataset_at, range(first, end)))
        while self.is_concat and first < end:
            epoch, position = divmod(first, self.steps_per_epoch)
            num_steps = min(end - first, self.steps_per_epoch - position)
            start = position * self.global_batch
            numbers = self._order("", epoch)[start : start + num_steps * self.global_batch]
            counts = np.bincount(self._owners("", numbers), minlength=len(self.names))
            found.update(dict(zip(self.names, counts.tolist(), strict=True)))
            first += num_steps
        return dict(found)

    @property
    def mixture(self) -> dict[str, str]:
        """Each dataset's length and share, in words; both must stay for a resumed run to draw the same samples."""
        shares = {name: "concat" if self.is_concat else f"share {share:.6g}" for name, share in self.shares.items()}
        how = {name: ", ".join([share, *filter(None, [self.streams.get(name)])]) for name, share in shares.items()}
        return {name: f"{length} samples, {how[name]}" for name, length in self.lengths.items()}

    def _check_lengths(self) -> None:
        accumulate, world, batch_size = self.division
        if self.streams and self.is_concat:
            raise InputError(
                "run.train_dataset_mixing: concat mixes samples by their numbers, which a stream does not have: "
                f"{', '.join(self.streams)}. Set per_step, with run.train_dataset_ratios or sizes as shares"
            )
        for group, names in self.groups.items():
            total = sum(self.lengths[name] for name in names)
            if empty := [name for name in names if not self.lengths[name]]:
                raise InputError(f"dataset {empty[0]!r} has no training samples; leave it out or check its annotations")
            if total < self.global_batch:
                owner = f"dataset {group!r} has" if group else f"the {len(names)} datasets together have"
                raise InputError(
                    f"{owner} {total} training samples, fewer than a global batch of {self.global_batch} ({batch_size} "
                    f"x {world} processes x {accumulate} batches); lower run.batch_size_train, or mix within batches"
                )

    def _order(self, group: str, epoch: int) -> np.ndarray:
        known = self._orders.get(group)
        if known is None or known[0] != epoch:
            generator = np.random.Generator(np.random.PCG64(hash_seed(self.seed, "order", group, epoch)))
            known = self._orders[group] = (epoch, generator.permutation(int(self.ends[group][-1])))
        return known[1]

    def _owners(self, group: str, numbers: np.ndarray) -> np.ndarray:
        """Return the position in the group of the dataset that each of all its samples' numbers belongs to."""
        return np.searchsorted(self.ends[group], numbers, side="right")

    def _keys(self, group: str, epoch: int, numbers: np.ndarray) -> list[Key]:
        keys, ends = [], self.ends[group]
        for owner, number in zip(self._owners(group, numbers).tolist(), numbers.tolist(), strict=True):
            name = self.groups[group][owner]
            index = number - (int(ends[owner]) - self.lengths[name])
            keys.append(Key(name, index, hash_seed(self.seed, epoch, name, index)))
        return keys


def make_sampler(
    run: RunConfig,
    lengths: Mapping[str, int],
    *,
    rank: int = 0,
    world: int = 1,
    streams: Mapping[str, str] | None = None,
) -> TrainSampler:
    """Return the sampler of a run over training datasets of these lengths, by name; `streams` as for `TrainSampler`.

    Raises:
        InputError: no dataset is given, one is smaller than a global batch, or shares do not fit the datasets.
    """
    if not lengths:
        raise InputError("no dataset to train on: run.train_splits and the datasets section have no split in common")
    sampling, factors, ratios = run.train_dataset_sampling, run.train_dataset_factors, run.train_dataset_ratios
    is_concat = len(lengths) > 1 and run.mixing != "per_step"
    shares = None if is_concat else dataset_shares(lengths, sampling=sampling, factors=factors, ratios=ratios)
    sizes = {"batch_size": run.batch_size_train, "accumulate": run.accum_grad_iters, "seed": run.seed}
    return TrainSampler(lengths, shares, **sizes, rank=rank, world=world, streams=streams)
