"""Results that are written as they are computed: JSON lines after a first line of settings, continued after a kill.

A kill, or a machine that stops, can only damage the end: reading ends before the first line that is not whole, and
writing continues there.
"""

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lavis_lite.common.disk import FULL
from lavis_lite.common.errors import InputError, WriteError


class PartialFile:
    """The file of one process. `settings` are what its results depend on, `advice` what to do if they have changed."""

    def __init__(self, path: Path, settings: Mapping[str, Any], *, advice: str) -> None:
        self.path, self.advice = path, advice
        self.settings = json.loads(json.dumps(dict(settings), default=str))
        self._file: io.FileIO | None = None

    def read(self) -> list[dict[str, Any]]:
        """Return the results that are there. Raises InputError if they were made with other settings."""
        made, rows, _ = self._scan()
        if made is not None and (changed := differences(made, self.settings)):
            raise InputError(f"{self.path}: was made with other settings ({', '.join(changed)}): {self.advice}")
        return rows

    def open(self, *, anew: bool = False) -> None:
        """Open the file to add results after those that are there; `anew` discards them."""
        length = 0 if anew else self._scan()[2]
        with naming(self.path):
            if self.path.exists():
                os.truncate(self.path, length)
            self._file = self.path.open("ab", buffering=0)  # nothing is left to write when it is closed
        if length == 0:
            self.add({"settings": self.settings})

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a result; it is in the file when this returns. TypeError for a value that JSON does not know."""
        assert self._file is not None, "not open"
        rest = memoryview((json.dumps(row) + "\n").encode())
        with naming(self.path):
            while rest:
                rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Close the file; it may not be open."""
        if self._file is not None:
            self._file.close()

    def _scan(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]], int]:
        """Return the settings of the first line, None without it, the rows, and where the last whole one ends."""
        if not self.path.is_file():
            return None, [], 0
        length, found = 0, list[dict[str, Any]]()
        with self.path.open("rb") as lines:
            for line in lines:
                try:
                    row = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    break
                if not isinstance(row, dict):
                    break
                found.append(row)
                length += len(line)
        if not found or "settings" not in found[0]:
            return None, [], 0
        return found[0]["settings"], found[1:], length


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError of the body the file's path, as WriteError."""
    try:
        yield
    except OSError as error:
        advice = "free some space there" if error.errno in FULL else "make the folder writable"
        raise WriteError(error.errno, f"{path}: {error.strerror}; {advice}") from error


def differences(made: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return each setting that differs, with both values."""
    keys = [key for key in {**made, **now} if made.get(key) != now.get(key)]
    return [f"{key} {_shown(made, key)}, now {_shown(now, key)}" for key in keys]


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return repr(settings[key]) if key in settings else "not set"
