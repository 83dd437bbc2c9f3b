"""Batches of a stream: a loader whose workers read the parts of the stream, and its position for checkpoints.

Batches come from the parts in turn, so the position of a process is the number of its batches and the positions in its
parts, as of the batches that training has taken: what workers have read ahead does not count.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.rng import hash_seed, preserve_rng_state
from lavis_lite.datasets.protocols import SampleDataset
from lavis_lite.datasets.streams import Part, Position, StreamDataset
from lavis_lite.runners.mixing import with_own_image_id
from lavis_lite.runners.stopping import ignore_stop_signals, signals_blocked
from lavis_lite.runners.workers import loader_workers, worker_options

Sample = dict[str, Any]


class Batch(NamedTuple):
    """A collated batch (None if an unreadable sample had no replacement) and the errors of unreadable samples."""

    samples: Sample | None
    errors: list[str]


class PartBatch(NamedTuple):
    """A batch of the process's part of this number, and the position after it."""

    batch: Batch
    part: int
    position: dict[str, int]


def _nothing() -> None:
    """Do nothing: numbered samples need no position."""


def describe_streams(datasets: Mapping[str, SampleDataset], run: RunConfig, *, world: int) -> dict[str, str]:
    """Return the streams among the datasets, with what their positions depend on in words.

    Raises:
        InputError: a stream cannot be divided among the loader workers of `world` processes.
    """
    num_parts = world * max(loader_workers(run), 1)
    streams = {name: dataset for name, dataset in datasets.items() if isinstance(dataset, StreamDataset)}
    for name, stream in streams.items():
        stream.check_parts(num_parts, name)
    parts = f"in {num_parts} parts (processes x run.num_workers) of batches of {run.batch_size_train}"
    return {name: f"{stream.description}, {parts}" for name, stream in streams.items()}


class Item(NamedTuple):
    """A batch, and what is called when training takes it: what was only read ahead does not count."""

    batch: Batch
    take: Callable[[], None] = _nothing


class StreamLoader:
    """Endless batches of this rank's parts of a stream, on the CPU.

    `name` is the dataset's, `number` its position among those of the run.
    """

    def __init__(
        self,
        name: str,
        stream: StreamDataset,
        run: RunConfig,
        *,
        number: int,
        rank: int,
        world: int,
        pin: bool = False,
    ) -> None:
        self.workers, self.pin = worker_options(run), pin
        self.num_batches = 0
        self.positions = [asdict(Position()) for _ in range(max(loader_workers(run), 1))]
        seed = hash_seed(run.seed, "stream", name)
        self.reader = _PartReader(stream, run, seed=seed, number=number, rank=rank, world=world)

    def __iter__(self) -> Iterator[Item]:
        self.reader.begin_at(self.num_batches, self.positions)
        loader = DataLoader(
            self.reader,
            batch_size=None,
            **self.workers,
            pin_memory=self.pin,
            collate_fn=_identity,
            worker_init_fn=ignore_stop_signals,
            generator=torch.Generator().manual_seed(0),  # else it draws from torch's
        )
        with signals_blocked():
            batches = iter(loader)
        for batch, part, position in batches:
            yield Item(batch, partial(self._advance, part, position))

    def _advance(self, part: int, position: dict[str, int]) -> None:
        self.num_batches += 1
        self.positions[part] = position

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that was taken."""
        return {"num_batches": self.num_batches, "positions": [dict(position) for position in self.positions]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which `state` was taken; the number of workers must be the same."""
        assert len(state["positions"]) == len(self.positions), (len(state["positions"]), len(self.positions))
        self.num_batches, self.positions = state["num_batches"], [dict(position) for position in state["positions"]]


class _PartReader(IterableDataset[PartBatch]):
    """Reads one part in each loader worker, or the only part in the process itself."""

    def __init__(self, stream: StreamDataset, run: RunConfig, *, seed: int, number: int, rank: int, world: int) -> None:
        self.stream, self.seed, self.number, self.rank, self.world = stream, seed, number, rank, world
        self.batch_size, self.skips = run.batch_size_train, run.max_unreadable_share > 0
        self.num_batches, self.positions = 0, [asdict(Position())]

    def begin_at(self, num_batches: int, positions: list[dict[str, int]]) -> None:
        """Set what the next iteration continues from."""
        self.num_batches, self.positions = num_batches, [dict(position) for position in positions]

    def __iter__(self) -> Iterator[PartBatch]:
        info, count = get_worker_info(), len(self.positions)
        own = ((info.id if info else 0) + self.num_batches) % count  # workers are asked in turn, from the first on
        position = Position(**self.positions[own])
        part = Part(self.rank * count + own, self.world * count)
        items = self.stream.items(part, seed=self.seed, start=position)
        while True:
            samples: list[Sample] = []
            errors: list[str] = []
            with preserve_rng_state():
                while len(samples) < self.batch_size and (self.skips or not errors):
                    item = next(items, None)
                    if item is None:
                        break
                    position = item.position
                    if item.sample is None:
                        errors.append(item.problem)
                    else:
                        samples.append(with_own_image_id(item.sample, self.number))
                is_whole = len(samples) == self.batch_size
                batch = Batch(self.stream.collater(samples) if is_whole else None, errors)
            yield PartBatch(batch, own, asdict(position))


def _identity(batch: Any) -> Any:
    return batch
