"""Arrow files: are they whole?"""

from __future__ import annotations

import os
from pathlib import Path

from lavis_lite.common.errors import InputError

INDEXED_END, STREAM_END = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"
"""The last bytes of an Arrow file with an index, and of a stream."""


def check_end(path: Path) -> None:
    """Raise InputError for an Arrow file without its end marker. Note: `pyarrow` takes a stream that is cut between two
    blocks of rows for a whole one.
    """
    try:
        with path.open("rb") as file:
            file.seek(-min(len(STREAM_END), path.stat().st_size), os.SEEK_END)
            end = file.read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if not end.endswith((INDEXED_END, STREAM_END)):
        raise InputError(f"{path}: is not an Arrow file, or is cut off, as its end marker is missing; fetch it again")
