"""Progress of a command over many images."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from lavis_lite.common import progress as common

T = TypeVar("T")


def progress(results: Iterable[T], total: int) -> Iterator[T]:
    """Yield results while rank 0 shows their number, rate and the time left: a bar on a terminal, else a line every 30
    seconds.
    """
    return common.progress(results, total, say=lambda line: print(line, file=sys.stderr))
