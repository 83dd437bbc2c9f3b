"""Disks that cannot be written."""

import errno
import os
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk, and of a user's full share of it."""


def why_unwritable(path: Path, error: BaseException) -> str:
    """Return why a file or folder cannot be written, with the free space of its disk."""
    place = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    what = "the disk is full" if is_full(error) else reason
    return f"{what} ({shutil.disk_usage(place).free / 2**20:,.1f} MiB free in {place})"


def is_full(error: BaseException) -> bool:
    """Return whether an error, or what it was raised from, says that the disk is full, be it in words alone, as
    libraries that are not written in Python have them.
    """
    texts = [text for number in FULL for text in (os.strerror(number), f"os error {number})")]
    own = (isinstance(error, OSError) and error.errno in FULL) or any(text in str(error) for text in texts)
    cause = error.__cause__ or error.__context__
    return own or (cause is not None and is_full(cause))
