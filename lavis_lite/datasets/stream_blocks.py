"""Datasets of some samples of a stream: the layout of a split, applied to records that were read already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from lavis_lite.common.records import Record
from lavis_lite.datasets.protocols import SampleDataset
from lavis_lite.datasets.readers.files import Reader, SplitFiles
from lavis_lite.datasets.stream_shards import Loaded


class _Block(SampleDataset, Protocol):
    warned_of_constant: np.ndarray


class BlockMaker:
    """Makes datasets of loaded samples by `make`, from paths, the folder of images and a reader."""

    def __init__(self, make: Callable[[Sequence[str], Path, Reader], _Block], root: Path, *, reader: Reader) -> None:
        self.make, self.root, self.reader = make, root, reader
        self.warned_of_constant: np.ndarray | None = None

    def __call__(self, loaded: Sequence[Loaded]) -> SampleDataset:
        """Return the dataset of these samples. Raises InputError for a record that does not fit the layout."""
        records = [dict(one.record) for one in loaded]

        def read(files: SplitFiles) -> Iterator[Record]:
            for record in self.reader(replace(files, loaded=records)):
                record.pop("instance_id", None)  # a block may have a sample twice, and the stream gives ids of its own
                yield record

        dataset = self.make([loaded[0].shard], self.root, read)
        if self.warned_of_constant is None:  # the first block is made before there are workers, which share its flag
            self.warned_of_constant = dataset.warned_of_constant
        dataset.warned_of_constant = self.warned_of_constant
        return dataset
