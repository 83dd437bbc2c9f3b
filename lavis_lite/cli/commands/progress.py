"""Progress of a command over many images."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from lavis_lite.common import dist

T = TypeVar("T")
REPORT_SECONDS = 30


def progress(results: Iterable[T], total: int) -> Iterator[T]:
    """Yield results while rank 0 shows their number, rate and the time left: a bar on a terminal, else a line every 30
    seconds.
    """
    started = reported = time.monotonic()
    with tqdm(total=total, unit="image", disable=None if dist.is_main() else True, leave=False) as bar:
        for number, result in enumerate(results, start=1):
            bar.update()
            yield result
            now = time.monotonic()
            if bar.disable and dist.is_main() and now - reported > REPORT_SECONDS:
                reported, rate = now, number / (now - started)
                left = (total - number) / rate
                print(f"{number:,} of {total:,} images, {rate:.1f} images/s, {left:.0f} s left", file=sys.stderr)
