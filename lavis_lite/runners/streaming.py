"""Batches of a stream: a loader whose workers read the parts of the stream, and its position for checkpoints.

The parts are as many as a run's first start had loader workers, and stay so if it resumes with others: each process
then has an equal number of parts, and each of its workers. Batch k of all processes together, counted from 0 in the
order of accumulated batches and then of ranks, is read from part k modulo the number of parts. The position of a
process is the number of its batches and the positions in its parts, as of the batches that training has taken: what
workers have read ahead does not count.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.errors import InputError
from lavis_lite.common.rng import hash_seed, preserve_rng_state
from lavis_lite.datasets.protocols import SampleDataset
from lavis_lite.datasets.streams import Item as StreamItem
from lavis_lite.datasets.streams import Part, Position, StreamDataset
from lavis_lite.runners.mixing import with_own_image_id
from lavis_lite.runners.stopping import ignore_stop_signals, signals_blocked
from lavis_lite.runners.workers import loader_workers, worker_options

Sample = dict[str, Any]
ReadBatch = Callable[[Sample], Sample]
"""A change of a collated batch, in the loader workers."""


class Batch(NamedTuple):
    """A collated batch (None if an unreadable sample had no replacement) and the errors of unreadable samples."""

    samples: Sample | None
    errors: list[str]


class PartBatch(NamedTuple):
    """A batch of the part of this number, and the position after it."""

    batch: Batch
    part: int
    position: dict[str, int]


def unchanged(batch: Sample) -> Sample:
    """Return the batch."""
    return batch


def _nothing() -> None:
    """Do nothing: numbered samples need no position."""


def describe_streams(datasets: Mapping[str, SampleDataset], run: RunConfig, *, world: int) -> dict[str, str]:
    """Return the streams among the datasets, with what their positions depend on in words.

    Raises:
        InputError: a stream cannot be divided among the loader workers of `world` processes.
    """
    streams = {name: dataset for name, dataset in datasets.items() if isinstance(dataset, StreamDataset)}
    for name, stream in streams.items():
        num_parts = stream.settings.parts or default_parts(run, world)
        stream.check_parts(num_parts, name)
        check_division(num_parts, world, name)
    return {name: stream.description for name, stream in streams.items()}


def default_parts(run: RunConfig, world: int) -> int:
    """Return the number of parts of a stream that states none: one per loader worker of all processes."""
    return world * max(loader_workers(run), 1)


def check_division(num_parts: int, world: int, name: str) -> None:
    """Raise InputError about the dataset `name` if processes cannot have equal numbers of parts."""
    if num_parts % world:
        fitting = [str(number) for number in range(1, num_parts + 1) if num_parts % number == 0]
        raise InputError(
            f"dataset {name!r}: the {num_parts} parts of the stream cannot be divided among {world} processes: start "
            f"{', '.join(fitting)} of them (datasets.{name}.stream.parts sets the number of parts at the first start)"
        )


def merged_positions(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the state of a stream from the `state_dict` of all its processes: batches of all together, and the
    position of each part by its number.
    """
    positions = {part: position for state in ranks for part, position in state["positions"].items()}
    return {"num_batches": sum(state["num_batches"] for state in ranks), "positions": positions}


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
        self.name, self.run, self.pin, self.rank, self.world = name, run, pin, rank, world
        self.num_batches, self.num_parts = 0, stream.settings.parts or default_parts(run, world)
        self.positions = {part: asdict(Position()) for part in range(rank, self.num_parts, world)}
        self.reader = _PartReader(stream, run, seed=hash_seed(run.seed, "stream", name), number=number)

    def __iter__(self) -> Iterator[Item]:
        self.reader.begin_at(self.num_batches, self.positions, of=self.num_parts)
        loader = DataLoader(
            self.reader,
            batch_size=None,
            **worker_options(self.run, at_most=self.num_workers),
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

    @property
    def num_workers(self) -> int:
        """The largest number of workers, of at most `run.num_workers`, that have equal numbers of parts."""
        return next((n for n in range(loader_workers(self.run), 0, -1) if len(self.positions) % n == 0), 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that was taken."""
        positions = {part: dict(position) for part, position in self.positions.items()}
        return {"num_batches": self.num_batches, "positions": positions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which `state` was taken, the `merged_positions` of all processes then."""
        self.num_parts = len(state["positions"])
        check_division(self.num_parts, self.world, self.name)
        self.num_batches = state["num_batches"] // self.world
        self.positions = {part: dict(state["positions"][part]) for part in range(self.rank, self.num_parts, self.world)}


class _PartReader(IterableDataset[PartBatch]):
    """Reads a process's parts in turn: in each loader worker its share of them, or all in the process itself."""

    def __init__(self, stream: StreamDataset, run: RunConfig, *, seed: int, number: int) -> None:
        self.stream, self.seed, self.number = stream, seed, number
        self.batch_size, self.skips = run.batch_size_train, run.max_unreadable_share > 0
        self.num_batches, self.num_parts = 0, 1
        self.read_batch: ReadBatch = unchanged
        self.positions: dict[int, dict[str, int]] = {}

    def begin_at(self, num_batches: int, positions: Mapping[int, dict[str, int]], *, of: int) -> None:
        """Set what the next iteration continues from: the process's positions, by the numbers of its parts `of` all."""
        self.num_batches, self.num_parts = num_batches, of
        self.positions = {part: dict(position) for part, position in positions.items()}

    def __iter__(self) -> Iterator[PartBatch]:
        info, parts = get_worker_info(), sorted(self.positions)
        first, every = (info.id, info.num_workers) if info else (0, 1)  # workers are asked in turn, from the first on
        sources: dict[int, Iterator[StreamItem]] = {}
        for turn in itertools.count(self.num_batches + first, every):
            part = parts[turn % len(parts)]
            if part not in sources:
                start = Position(**self.positions[part])
                sources[part] = self.stream.items(Part(part, self.num_parts), seed=self.seed, start=start)
            yield self._batch(sources[part], part)

    def _batch(self, items: Iterator[StreamItem], part: int) -> PartBatch:
        samples: list[Sample] = []
        errors: list[str] = []
        with preserve_rng_state():
            while len(samples) < self.batch_size and (self.skips or not errors):
                item = next(items, None)
                if item is None:
                    break
                self.positions[part] = asdict(item.position)
                if item.sample is None:
                    errors.append(item.problem)
                else:
                    samples.append(with_own_image_id(item.sample, self.number))
            is_whole = len(samples) == self.batch_size
            batch = Batch(self.read_batch(self.stream.collater(samples)) if is_whole else None, errors)
        return PartBatch(batch, part, self.positions[part])


def _identity(batch: Any) -> Any:
    return batch
