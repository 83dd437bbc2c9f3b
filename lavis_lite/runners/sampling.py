"""Which sample is in which batch: seeds, permutations, and how several datasets are mixed.

Everything is a pure function of (run.seed, step): the batch of a step depends neither on the number of workers, nor on
the number of ranks (at the same global batch), nor on whether the run was stopped before. Nothing here draws from the
global generators.
"""

import contextlib
import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from lavis_lite.common import dist
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import did_you_mean

POWERS = {"size": 1.0, "sqrt": 0.5, "uniform": 0.0}
"""`run.train_dataset_sampling`: the power of a dataset's length to which its share is proportional."""


class Key(NamedTuple):
    """One draw: which dataset, which of its samples, and the seed of that sample's transforms."""

    dataset: str
    index: int
    seed: int


def hash_seed(*parts: object) -> int:
    """63 bits from the text of `parts`; the same on every machine and in every process."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_everything(seed: int) -> None:
    """Seeds the global generators of python, numpy and torch (CPU and CUDA)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_rank(seed: int, *, step: int = 0) -> None:
    """Gives each rank its own stream (dropout must differ between ranks), from the run's seed and the step."""
    seed_everything(hash_seed(seed, "rank", dist.rank(), step))


def seed_sample(seed: int) -> None:
    """Seeds the global CPU generators, cheaply: torch.manual_seed would also queue a call for CUDA each time."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def kept_rng() -> Iterator[None]:
    """Gives the body the global CPU generators to seed as it likes and puts their states back afterwards."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


def dataset_shares(
    lengths: Mapping[str, int],
    *,
    sampling: str = "size",
    factors: Mapping[str, float] | None = None,
    ratios: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The probability that a step's batch comes from each dataset; they sum to 1.

    `ratios`, or else a power of the lengths (`POWERS`; the square root in InstructBLIP, section 2.4) times `factors`.

    Raises:
        ValueError: `ratios` or `factors` do not fit the datasets, or leave none.
    """
    for name in factors or {}:
        if name not in lengths:
            text = f"run.train_dataset_factors names {name!r}, which is no training dataset"
            raise InputError(f"{text}. {did_you_mean(name, lengths)}")
    if ratios and set(ratios) != set(lengths):
        raise InputError(
            f"run.train_dataset_ratios names {sorted(ratios)}, but the training datasets are {sorted(lengths)}"
        )
    own = ratios or {
        name: max(length, 1) ** POWERS[sampling] * (factors or {}).get(name, 1.0)  # TrainSampler refuses an empty one
        for name, length in lengths.items()
    }
    weights = np.array([own[name] for name in lengths], dtype=np.float64)
    if weights.min() < 0 or weights.sum() <= 0:
        setting = "ratios" if ratios else "factors"
        raise InputError(
            f"run.train_dataset_{setting} must not be negative and not all 0: {dict(ratios or factors or {})}"
        )
    return dict(zip(lengths, (weights / weights.sum()).tolist(), strict=True))


class TrainSampler:
    """An endless series of batches of `Key`s for one rank, from `start_step` on; each batch is from one dataset.

    One dataset is drawn per step by `shares`, the same on all ranks, from the hash of (seed, step).
    A dataset's own epoch is a fresh permutation cut into global batches (the rest is dropped); rank r takes the r-th
    slice of a global batch, so that W ranks with batch B gather, in this order, what one process with batch W*B sees.

    Raises:
        ValueError: a dataset is smaller than the global batch.
    """

    def __init__(
        self,
        lengths: Mapping[str, int],
        shares: Mapping[str, float],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.lengths, self.shares = dict(lengths), {name: shares[name] for name in lengths}
        self.batch_size, self.seed, self.rank = batch_size, seed, rank
        self.global_batch = batch_size * world
        self._check_lengths(world)
        self.names = list(self.lengths)
        self.bounds = np.cumsum(list(self.shares.values()))
        self.start_step = 0
        self._orders: dict[str, tuple[int, np.ndarray]] = {}  # each dataset's present epoch and its order

    def __iter__(self) -> Iterator[list[Key]]:
        draws = dict.fromkeys(self.names, 0)
        step = 0
        while True:
            name = self.dataset_at(step)
            if step >= self.start_step:
                yield self._keys(name, draws[name])
            draws[name] += 1
            step += 1

    def dataset_at(self, step: int) -> str:
        """The name of the dataset that the batch of `step` comes from."""
        if len(self.names) == 1:
            return self.names[0]
        uniform = hash_seed(self.seed, "mix", step) / 2**63
        return self.names[min(int(np.searchsorted(self.bounds, uniform, side="right")), len(self.names) - 1)]

    def describe(self) -> dict[str, Any]:
        """What must stay for a resumed run to see the same data, under the names of `Plan`."""
        mixture = {name: f"{length} samples, share {self.shares[name]:.6g}" for name, length in self.lengths.items()}
        return {"global_batch": self.global_batch, "mixture": mixture}

    def _check_lengths(self, world: int) -> None:
        for name, length in self.lengths.items():
            if length < self.global_batch:
                others = ", or set run.train_dataset_mixing: concat" if len(self.lengths) > 1 else ""
                raise InputError(
                    f"dataset {name!r} has {length} training samples, fewer than a global batch of {self.global_batch} "
                    f"({self.batch_size} on each of {world} processes): lower run.batch_size_train{others}"
                )

    def _keys(self, name: str, draw: int) -> list[Key]:
        epoch, position = divmod(draw, self.lengths[name] // self.global_batch)
        chosen = self._share(self._order(name, epoch, self.lengths[name]), position).tolist()
        return [Key(name, index, hash_seed(self.seed, epoch, name, index)) for index in chosen]

    def _share(self, order: np.ndarray, position: int) -> np.ndarray:
        """Return this rank's slice of the global batch at `position` of an epoch's order."""
        first = position * self.global_batch + self.rank * self.batch_size
        return order[first : first + self.batch_size]

    def _order(self, name: str, epoch: int, length: int) -> np.ndarray:
        known = self._orders.get(name)
        if known is None or known[0] != epoch:
            generator = np.random.Generator(np.random.PCG64(hash_seed(self.seed, "order", name, epoch)))
            known = self._orders[name] = (epoch, generator.permutation(length))
        return known[1]


class ConcatSampler(TrainSampler):
    """An endless series of batches of `Key`s for one rank, in which the samples of all datasets are mixed.

    An epoch is one permutation of all datasets' samples, cut into global batches (the rest is dropped). A dataset may
    be smaller than a global batch, all together may not.
    """

    def __init__(
        self, lengths: Mapping[str, int], *, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        total = max(sum(lengths.values()), 1)
        shares = {name: length / total for name, length in lengths.items()}
        super().__init__(lengths, shares, batch_size=batch_size, seed=seed, rank=rank, world=world)
        self.ends = np.cumsum(list(self.lengths.values()))  # of each dataset among all samples
        self.steps_per_epoch = int(self.ends[-1]) // self.global_batch

    def __iter__(self) -> Iterator[list[Key]]:
        for step in itertools.count(self.start_step):
            epoch, position = divmod(step, self.steps_per_epoch)
            numbers = self._share(self._epoch_order(epoch), position)
            owners = self._owners(numbers)
            indices = numbers - (self.ends - list(self.lengths.values()))[owners]
            named = zip((self.names[owner] for owner in owners), indices.tolist(), strict=True)
            yield [Key(name, index, hash_seed(self.seed, epoch, name, index)) for name, index in named]

    def samples_between(self, first: int, end: int) -> dict[str, int]:
        """Return how many samples of each dataset all ranks together see in the steps from `first` to before `end`."""
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

    def describe(self) -> dict[str, Any]:
        """What must stay for a resumed run to see the same data, under the names of `Plan`."""
        mixture = {name: f"{length} samples, concat" for name, length in self.lengths.items()}
        return {"global_batch": self.global_batch, "mixture": mixture}

    def _check_lengths(self, world: int) -> None:
        for name, length in self.lengths.items():
            if not length:
                raise InputError(f"dataset {name!r} has no training samples: leave it out, or check its annotations")
        total = sum(self.lengths.values())
        if total < self.global_batch:
            raise InputError(
                f"the {len(self.lengths)} datasets have {total} training samples together, fewer than a global batch "
                f"of {self.global_batch} ({self.batch_size} on each of {world} processes): lower run.batch_size_train"
            )

    def _epoch_order(self, epoch: int) -> np.ndarray:
        return self._order("", epoch, int(self.ends[-1]))  # no dataset has an empty name

    def _owners(self, numbers: np.ndarray) -> np.ndarray:
        """Return the position of the dataset that each of all samples' numbers belongs to."""
        return np.searchsorted(self.ends, numbers, side="right")
