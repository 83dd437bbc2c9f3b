"""Kernel locks on files and folders: held by one process, and released by the kernel when the process ends.

Note: `filelock`, which guards downloads, does not replace this module: it locks no folders, it may delete its file on
release, so the file cannot name the holder, and on file systems without locks it falls back to files that survive a
killed process.
"""

import errno
import logging
import os
import socket
from datetime import datetime
from pathlib import Path

from lavis_lite.common.errors import FolderInUseError

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""Errors of a file system without locks, such as some network drives."""


class Lock:
    """An exclusive `flock` on a path. Processes forked from the holder, such as loader workers, do not hold it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def take(self) -> bool:
        """Take the lock without waiting and return whether it is held now.

        Raises:
            OSError: the file system has no locks, or the path cannot be opened.
        """
        import fcntl

        flags = os.O_RDONLY if self.path.is_dir() else os.O_RDWR | os.O_CREAT
        descriptor = os.open(self.path, flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        self._descriptor = descriptor
        os.register_at_fork(after_in_child=self.release)  # closes the child's copy only
        return True

    def release(self) -> None:
        """Close this process's copy of the lock, if there is one."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def write(self, text: str) -> None:
        """Replace the content of the locked file."""
        assert self._descriptor is not None, f"{self.path} is not locked"
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)


class FolderLock:
    """Lets one process write into a job's folder: a `Lock` on its file `.lock`, which names the holder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = Lock(folder / LOCK_FILE)

    def take(self) -> None:
        """Take the lock, or continue without one, with a warning, where the file system has none.

        Raises:
            FolderInUseError: another process holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            taken = self._lock.take()
        except (OSError, ImportError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise
            logger.warning(f"{self.folder} cannot be locked ({error}): make sure that no other process writes to it")
            return
        if not taken:
            holder = self._lock.path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
            raise FolderInUseError(f"{self.folder}: in use by {holder}; wait, or choose another --job-id")
        now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        self._lock.write(f"process {os.getpid()} on host {socket.gethostname()} since {now}\n")

    def release(self) -> None:
        """Release the lock; the file stays."""
        self._lock.release()
