"""Who sees which sample when: seeds, permutations, the draw between datasets.

Everything is a pure function of (run.seed, step): the batch of a step depends neither on the number of workers, nor on
the number of ranks (at the same global batch), nor on whether the run was stopped before. Nothing here draws from the
global generators.
"""

import contextlib
import hashlib
import random
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from lavis_lite import dist
from lavis_lite.errors import InputError
from lavis_lite.registry import did_you_mean

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
    """An endless series of batches of `Key`s for one rank, from `start_step` on.

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
        for name, length in self.lengths.items():
            if length < self.global_batch:
                raise InputError(
                    f"dataset {name!r} has {length} training samples, fewer than a global batch of {self.global_batch} "
                    f"({batch_size} on each of {world} processes): lower run.batch_size_train"
                )
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

    def _keys(self, name: str, draw: int) -> list[Key]:
        epoch, position = divmod(draw, self.lengths[name] // self.global_batch)
        first = position * self.global_batch + self.rank * self.batch_size
        chosen = self._order(name, epoch)[first : first + self.batch_size].tolist()
        return [Key(name, index, hash_seed(self.seed, epoch, name, index)) for index in chosen]

    def _order(self, name: str, epoch: int) -> np.ndarray:
        known = self._orders.get(name)
        if known is None or known[0] != epoch:
            generator = np.random.Generator(np.random.PCG64(hash_seed(self.seed, "order", name, epoch)))
            known = self._orders[name] = (epoch, generator.permutation(self.lengths[name]))
        return known[1]
