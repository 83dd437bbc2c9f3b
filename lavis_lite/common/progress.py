"""Progress of long work on rank 0: a bar on a terminal, above which log lines stay, else a line every 30 seconds."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lavis_lite.common import dist

logger = logging.getLogger(__name__)

T = TypeVar("T")
REPORT_SECONDS = 30


@contextlib.contextmanager
def bar(total: int, *, name: str = "", unit: str = "image", initial: int = 0) -> Iterator[tqdm]:
    """Show a bar on rank 0's terminal; it is disabled elsewhere. Log lines are written above it."""
    is_off = None if dist.is_main() else True  # None: where stderr is not a terminal
    shown = tqdm(total=total, initial=initial, desc=name or None, unit=unit, leave=False, disable=is_off)
    with shown, contextlib.nullcontext() if shown.disable else logging_redirect_tqdm():
        yield shown


def progress(
    items: Iterable[T],
    total: int,
    *,
    name: str = "",
    unit: str = "image",
    sizes: Iterable[int] | None = None,
    say: Callable[[str], None] = logger.info,
) -> Iterator[T]:
    """Yield items while rank 0 shows their number, rate and the time left. `sizes` are those of the items, 1 by
    default; `say` gets the lines without a terminal.
    """
    started = reported = time.monotonic()
    number = 0
    own = iter(() if sizes is None else sizes)
    with bar(total, name=name, unit=unit) as shown:
        for item in items:
            yield item
            size = next(own, 1)
            number += size
            shown.update(size)
            now = time.monotonic()
            if shown.disable and dist.is_main() and now - reported > REPORT_SECONDS:
                reported, rate = now, number / (now - started)
                left = (total - number) / rate
                where = f"{name}: " if name else ""
                say(f"{where}{number:,} of {total:,} {unit}s, {rate:.1f} {unit}s/s, {left:.0f} s left")
