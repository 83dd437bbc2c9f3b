"""Which sample is in which batch: permutations, and how several datasets are mixed.

Everything is a pure function of (run.seed, step), a step being an update by one global batch. A step's samples depend
neither on the number of workers, nor on how its global batch is divided into ranks and accumulated batches, nor on
whether the run was stopped before. Nothing here draws from the global generators.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import did_you_mean
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
    for name in factors or {}:
        if name not in lengths:
            raise InputError(
                f"run.train_dataset_factors: {name!r} is not a training dataset. {did_you_mean(name, lengths)}"
            )
    if ratios and set(ratios) != set(lengths):
        raise InputError(
            f"run.train_dataset_ratios: names {sorted(ratios)}, but the training datasets are {sorted(lengths)}"
        )
    own = ratios or {
        name: max(length, 1) ** POWERS[sampling] * (factors or {}).get(name, 1.0)  # the sampler refuses an empty one
        for name, length in lengths.items()
    }
    weights = np.array([own[name] for name in lengths], dtype=np.float64)
    if weights.min() < 0 or weights.sum() <= 0:
        setting = "ratios" if ratios else "factors"
        raise InputError(
            f"run.train_dataset_{setting}: must not be negative and not all 0, got {dict(ratios or factors or {})}"
        )
    return dict(zip(lengths, (weights / weights.sum()).tolist(), strict=True))


class TrainSampler:
    """An endless series of one rank's batches of `Key`s from `start_step` on; a step's batches are of one dataset.

    A step is a global batch of `accumulate` batches on each of `world` ranks. Its dataset is drawn by `shares` from the
    hash of (seed, step), the same on all ranks. A dataset's own epoch is a fresh permutation cut into global batches;
    the rest, smaller than one, is dropped. Ranks and batches divide a global batch in order, so that all of them
    together hold what one process without accumulation has in its batch.

    Raises:
        InputError: a dataset is smaller than the global batch.
    """

    is_concat: ClassVar[bool] = False

    def __init__(
        self,
        lengths: Mapping[str, int],
        shares: Mapping[str, float],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.lengths, self.shares = dict(lengths), {name: shares[name] for name in lengths}
        self.seed, self.rank = seed, rank
        self.division = (accumulate, world, batch_size)
        self.batch_size, self.global_batch = batch_size, batch_size * world * accumulate
        self.steps_per_epoch = sum(self.lengths.values()) // self.global_batch
        self._check_lengths()
        self.names = list(self.lengths)
        self.bounds = np.cumsum(list(self.shares.values()))
        self.start_step = 0
        self._orders: dict[str, tuple[int, np.ndarray]] = {}  # each dataset's present epoch and its order

    def __iter__(self) -> Iterator[list[Key]]:
        draws = dict.fromkeys(self.names, 0)
        for step in itertools.count():
            name = self.dataset_at(step)
            if step >= self.start_step:
                epoch, position = divmod(draws[name], self.lengths[name] // self.global_batch)
                for batch in self._own(self._order(name, epoch, self.lengths[name]), position):
                    yield [self._key(name, index, epoch) for index in batch.tolist()]
            draws[name] += 1

    @property
    def draws_datasets(self) -> bool:
        """Whether each step's samples are of one dataset out of several."""
        return len(self.names) > 1 and not self.is_concat

    def dataset_at(self, step: int) -> str:
        """Return the name of the dataset that the samples of `step` are from."""
        if len(self.names) == 1:
            return self.names[0]
        uniform = hash_seed(self.seed, "mix", step) / 2**63
        return self.names[min(int(np.searchsorted(self.bounds, uniform, side="right")), len(self.names) - 1)]

    def counts_between(self, first: int, end: int) -> dict[str, int]:
        """Return how many global batches each dataset gives in the steps from `first` to before `end`."""
        drawn = Counter(map(self.dataset_at, range(first, end)))
        return {name: drawn[name] for name in self.names}

    @property
    def mixture(self) -> dict[str, str]:
        """Each dataset's length and share, in words; both must stay for a resumed run to draw the same samples."""
        return {name: f"{length} samples, share {self.shares[name]:.6g}" for name, length in self.lengths.items()}

    @property
    def division_text(self) -> str:
        """The factors of the global batch, in words."""
        accumulate, world, batch_size = self.division
        parts = [f"{batch_size} on each of {world} processes"]
        return " x ".join([*parts, f"{accumulate} accumulated batches"] if accumulate > 1 else parts)

    def _check_lengths(self) -> None:
        for name, length in self.lengths.items():
            if length < self.global_batch:
                others = ", or set run.train_dataset_mixing: concat" if len(self.lengths) > 1 else ""
                raise InputError(
                    f"dataset {name!r} has {length} training samples, fewer than a global batch of {self.global_batch} "
                    f"({self.division_text}): lower run.batch_size_train{others}"
                )

    def _own(self, order: np.ndarray, position: int) -> np.ndarray:
        """Return this rank's batches (accumulate, batch_size) of the global batch at `position` of an epoch's order."""
        start = position * self.global_batch
        return order[start : start + self.global_batch].reshape(self.division)[:, self.rank]

    def _order(self, name: str, epoch: int, length: int) -> np.ndarray:
        known = self._orders.get(name)
        if known is None or known[0] != epoch:
            generator = np.random.Generator(np.random.PCG64(hash_seed(self.seed, "order", name, epoch)))
            known = self._orders[name] = (epoch, generator.permutation(length))
        return known[1]

    def _key(self, name: str, index: int, epoch: int) -> Key:
        return Key(name, index, hash_seed(self.seed, epoch, name, index))


class ConcatSampler(TrainSampler):
    """An endless series of one rank's batches of `Key`s, in which the samples of all datasets are mixed.

    An epoch is one permutation of all datasets' samples, cut into global batches (the rest is dropped). A dataset may
    be smaller than a global batch, all together may not.
    """

    is_concat = True

    def __init__(self, lengths: Mapping[str, int], **placement: int) -> None:
        total = max(sum(lengths.values()), 1)
        super().__init__(lengths, {name: length / total for name, length in lengths.items()}, **placement)
        self.ends = np.cumsum(list(self.lengths.values()))  # of each dataset among all samples

    def __iter__(self) -> Iterator[list[Key]]:
        for step in itertools.count(self.start_step):
            epoch, position = divmod(step, self.steps_per_epoch)
            for numbers in self._own(self._epoch_order(epoch), position):
                owners = self._owners(numbers)
                indices = numbers - (self.ends - list(self.lengths.values()))[owners]
                named = zip((self.names[owner] for owner in owners), indices.tolist(), strict=True)
                yield [self._key(name, index, epoch) for name, index in named]

    def counts_between(self, first: int, end: int) -> dict[str, int]:
        """Return how many samples of each dataset all ranks together get in the steps from `first` to before `end`."""
        found: Counter[str] = Counter(dict.fromkeys(self.names, 0))
        while first < end:
            epoch, position = divmod(first, self.steps_per_epoch)
            num_steps = min(end - first, self.steps_per_epoch - position)
            start = position * self.global_batch
            numbers = self._epoch_order(epoch)[start : start + num_steps * self.global_batch]
            counts = np.bincount(self._owners(numbers), minlength=len(self.names))
            found.update(dict(zip(self.names, counts.tolist(), strict=True)))
            first += num_steps
        return dict(found)

    @property
    def mixture(self) -> dict[str, str]:
        return {name: f"{length} samples, concat" for name, length in self.lengths.items()}

    def _check_lengths(self) -> None:
        for name, length in self.lengths.items():
            if not length:
                raise InputError(f"dataset {name!r} has no training samples: leave it out, or check its annotations")
        total = sum(self.lengths.values())
        if total < self.global_batch:
            raise InputError(
                f"the {len(self.lengths)} datasets have {total} training samples together, fewer than a global batch "
                f"of {self.global_batch} ({self.division_text}): lower run.batch_size_train"
            )

    def _epoch_order(self, epoch: int) -> np.ndarray:
        return self._order("", epoch, int(self.ends[-1]))  # no dataset has an empty name

    def _owners(self, numbers: np.ndarray) -> np.ndarray:
        """Return the number of the dataset that each of all samples' numbers belongs to."""
        return np.searchsorted(self.ends, numbers, side="right")


def make_sampler(run: Any, lengths: Mapping[str, int], *, rank: int = 0, world: int = 1) -> TrainSampler:
    """Return the sampler of `run` (a RunConfig) over training datasets of these lengths, by name.

    Raises:
        InputError: there is no dataset, one is smaller than a global batch, or shares do not fit the datasets.
    """
    if not lengths:
        raise InputError("no dataset to train on: run.train_splits and the datasets section have no split in common")
    placement = {"batch_size": run.batch_size_train, "accumulate": run.accum_grad_iters, "seed": run.seed}
    placement |= {"rank": rank, "world": world}
    if len(lengths) > 1 and run.mixing == "concat":
        return ConcatSampler(lengths, **placement)
    shares = dataset_shares(
        lengths,
        sampling=run.train_dataset_sampling,
        factors=run.train_dataset_factors,
        ratios=run.train_dataset_ratios,
    )
    return TrainSampler(lengths, shares, **placement)
