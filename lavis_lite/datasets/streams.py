"""A training split that is read from shards in their order, and whose position can be saved and restored.

A stream is read in parts, of which each loader worker of each process has its own. The samples of a part are a pure
function of seed, part and number of parts: an endless series of shards, whose samples are cut into blocks of
`shuffle_buffer` samples. A block is permuted as a whole, so a position is the place where a block begins and the number
of its samples that were given. To resume, the block is read again: its samples, and those before it in the same shard.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from lavis_lite.common.bounds import check_numbers
from lavis_lite.common.errors import InputError, SettingError, UnreadableSample
from lavis_lite.common.rng import hash_seed, seed_sample
from lavis_lite.datasets.protocols import SampleDataset, Samples
from lavis_lite.datasets.shard_records import KEY
from lavis_lite.datasets.stream_shards import Loaded, check_installed, scattered_problem
from lavis_lite.datasets.stream_tables import is_part, read_part

logger = logging.getLogger(__name__)

MOST_PROBLEMS = 100
"""Problems in a row, without a sample between them, that end a stream."""
NUM_FIRST, NUM_TRIED = 8, 3
"""Samples that are read at the start, to check the fields, and shards that are tried for it."""


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """The keys of `stream`."""

    epoch_length: int
    """Samples per epoch, of all processes together."""
    resampled: bool = False
    """Whether shards are drawn with replacement; else each pass reads every shard once."""
    shuffle_buffer: int = 1000
    """Samples that are held in memory, undecoded, and shuffled; per part."""
    parts: int | None = None
    """Parts into which the shards are divided, a multiple of the number of processes; None: as many as the loader
    workers of all processes at a run's first start."""

    def __post_init__(self) -> None:
        given = {key: value for key, value in vars(self).items() if value is not None}
        check_numbers("stream", given, epoch_length=(1, 10**12), shuffle_buffer=(1, 10**6), parts=(1, 10**6))


@dataclass(frozen=True, kw_only=True)
class Position:
    """The position in one part of a stream."""

    draw: int = 0
    """Shards of the part that were read before the present block."""
    sample: int = 0
    """Samples of the next shard that were read before it."""
    number: int = 0
    """Samples that were given before it."""
    taken: int = 0
    """Samples of the present block that were given."""
    problems: int = 0
    """Problems of the present block that were reported."""


class Part(NamedTuple):
    """A worker's part of a stream: its number from 0, and how many parts there are."""

    number: int
    of: int


class Item(NamedTuple):
    """A sample of a stream, or None and the problem; and the position after it."""

    sample: dict[str, Any] | None
    problem: str
    position: Position

    def read(self) -> dict[str, Any]:
        """Return the sample. Raises UnreadableSample with the problem."""
        if self.sample is None:
            raise UnreadableSample(self.problem)
        return self.sample


MakeBlock = Callable[[Sequence[Loaded]], SampleDataset]
"""From loaded samples to a dataset of the split's layout; InputError for records that do not fit it."""


class StreamDataset:
    """The training split of a dataset with the key `stream`.

    Raises:
        InputError: none of the first samples can be read or fits the layout.
    """

    def __init__(self, shards: Sequence[str], settings: StreamSettings, *, make_block: MakeBlock) -> None:
        if not all(map(is_part, shards)):
            check_installed()
        self.shards, self.settings, self.make_block = list(shards), settings, make_block
        self.collater: Callable[[list[dict[str, Any]]], Samples] = self.first_block().collater

    def __len__(self) -> int:
        """Return the declared number of samples per epoch."""
        return self.settings.epoch_length

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise InputError(f"{self.source}: is read as a stream, whose samples have no index; leave out its key `stream`")

    @property
    def source(self) -> str:
        """The first shard."""
        return self.shards[0]

    @property
    def names(self) -> list[str]:
        """The shards' names without the place that they are in."""
        return [name.rpartition("/")[2] for name in self.shards]

    @property
    def description(self) -> str:
        """The settings that a position depends on, in words."""
        order = "drawn with replacement" if self.settings.resampled else "one pass after another"
        parts = "" if self.settings.parts is None else f", {self.settings.parts} parts"
        return f"a stream of {len(self.shards)} shards, {order}, shuffle_buffer {self.settings.shuffle_buffer}{parts}"

    def check_parts(self, count: int, name: str) -> None:
        """Raise InputError about the dataset `name` if there are fewer shards than parts."""
        if not self.settings.resampled and len(self.shards) < count:
            raise InputError(
                f"dataset {name!r}: {len(self.shards)} shards cannot be divided among {count} parts (by default "
                "processes x run.num_workers): lower run.num_workers or stream.parts, make more shards, or set "
                "stream.resampled: true"
            )

    def first(self, count: int) -> Iterator[Item]:
        """Yield the first `count` items, for checks before the run."""
        yield from itertools.islice(self.items(Part(0, 1), seed=0, block_size=count), count)

    def items(self, part: Part, *, seed: int, start: Position | None = None, block_size: int = 0) -> Iterator[Item]:
        """Yield the part's samples from a position on, without end but for `MOST_PROBLEMS` problems in a row."""
        at, in_a_row = start or Position(), 0
        source = self._read(part, at, seed=seed)
        while True:
            block = _Block(self, block_size or self.settings.shuffle_buffer)
            for problem in itertools.islice(block.read(source), at.problems, None):
                at, in_a_row = replace(at, problems=at.problems + 1), in_a_row + 1
                yield Item(None, problem, at)
                if in_a_row == MOST_PROBLEMS:
                    return
            places = block.order(hash_seed(seed, "block", part.number, at.number))
            end = replace(block.end, number=at.number + len(places))
            for taken in range(at.taken, len(places)):
                position = end if taken + 1 == len(places) else replace(at, taken=taken + 1)
                seed_sample(hash_seed(seed, "sample", part.number, at.number + taken))
                try:
                    sample = block.sample(places[taken])
                except UnreadableSample as error:
                    in_a_row += 1
                    yield Item(None, str(error), position)
                else:
                    in_a_row = 0
                    yield Item(self._identified(sample, part, at.number, taken), "", position)
                if in_a_row == MOST_PROBLEMS:
                    return
            at = end

    def _read(self, part: Part, at: Position, *, seed: int) -> Iterator[tuple[Loaded, Position]]:
        """Yield the samples and problems of the part's shards, and where the next one is.

        As many shards in a row as the stream has, all without samples, are a problem.
        """
        num_empty = 0
        for draw in itertools.count(at.draw):
            first = count = at.sample if draw == at.draw else 0
            shard = self.shard_at(part, draw, seed=seed)
            for count, loaded in enumerate(itertools.islice(read_part(shard), first, None), start=first + 1):
                yield loaded, Position(draw=draw, sample=count)
            num_empty = 0 if count else num_empty + 1
            if num_empty == len(self.shards):
                problem = f"{shard}: has no samples, nor have the {num_empty:,} shards read last"
                yield Loaded(shard, {}, problem), Position(draw=draw + 1)
                num_empty = 0

    def _identified(self, sample: dict[str, Any], part: Part, first: int, taken: int) -> dict[str, Any]:
        """Return the sample with ids that no other of the stream has; `first` is the number of its block's first."""
        own: dict[str, Any] = {"instance_id": f"{part.number}-{first + taken}"}
        if isinstance(sample.get("image_id"), int):  # the image's number in its block
            own["image_id"] = (first + sample["image_id"]) * part.of + part.number
        return {**sample, **own}

    def shard_at(self, part: Part, draw: int, *, seed: int) -> str:
        """Return the shard that the part reads as its `draw`th."""
        if self.settings.resampled:
            return self.shards[hash_seed(seed, "shard", part.number, draw) % len(self.shards)]
        mine = range(part.number, len(self.shards), part.of)
        number, place = divmod(draw, len(mine))
        return self.shards[self._pass(seed, number)[mine[place]]]

    @functools.lru_cache(maxsize=2)  # noqa: B019  # a run has one or two streams, for its whole life
    def _pass(self, seed: int, number: int) -> list[int]:
        generator = np.random.Generator(np.random.PCG64(hash_seed(seed, "pass", number)))
        order: list[int] = generator.permutation(len(self.shards)).tolist()
        return order

    def fitting(self, loaded: Sequence[Loaded]) -> tuple[SampleDataset | None, list[str]]:
        """Return the dataset of the samples that fit the layout (None if none does), and the problems of the others."""
        try:
            return (self.make_block(loaded) if loaded else None), []
        except InputError:
            fitting, problems = [], []
            for one in loaded:
                try:
                    self.make_block([one])
                    fitting.append(one)
                except InputError as error:
                    problems.append(str(error).replace(": record 0", f": sample {one.record[KEY]}", 1))
            return (self.make_block(fitting) if fitting else None), problems

    def first_block(self) -> SampleDataset:
        """Return a dataset of at most `NUM_FIRST` samples, read anew. InputError if none of the first can be used."""
        problems: list[str] = []
        for shard in self.shards[:NUM_TRIED]:
            first = list(itertools.islice(read_part(shard), NUM_FIRST))
            dataset, found = self.fitting([loaded for loaded in first if not loaded.problem])
            if dataset is not None:
                return dataset
            problems += [*found, *(loaded.problem for loaded in first if loaded.problem)]
        problem = (not is_part(self.source) and scattered_problem(self.source)) or problems[0]
        raise InputError(f"{self.source}: none of the first samples can be used: {problem}")


class _Block:
    """The samples of a stream that are shuffled together."""

    def __init__(self, stream: StreamDataset, size: int) -> None:
        self.stream, self.size, self.end = stream, size, Position()
        self.dataset: SampleDataset | None = None

    def read(self, source: Iterator[tuple[Loaded, Position]]) -> Iterator[str]:
        """Read the block, and yield its problems as they are found."""
        whole: list[Loaded] = []
        while len(whole) < self.size:
            loaded, self.end = next(source)
            if loaded.problem:
                yield loaded.problem
            else:
                whole.append(loaded)
        self.dataset, problems = self.stream.fitting(whole)
        yield from problems

    def order(self, seed: int) -> list[int]:
        """Return the numbers of the block's samples in the order in which they are given."""
        count = len(self.dataset) if self.dataset else 0
        order: list[int] = np.random.Generator(np.random.PCG64(seed)).permutation(count).tolist()
        return order

    def sample(self, place: int) -> dict[str, Any]:
        """Return a sample. Raises UnreadableSample."""
        assert self.dataset is not None, place
        return self.dataset[place]


def stream_settings(given: StreamSettings | Mapping[str, Any]) -> StreamSettings:
    """Return the settings of a section of a YAML. Raises SettingError for one that is missing or unknown."""
    if isinstance(given, StreamSettings):
        return given
    try:
        return StreamSettings(**given)
    except TypeError as error:
        raise SettingError("stream", str(error)) from None
