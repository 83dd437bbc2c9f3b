"""Output of a command over many images: written as it is computed, resumed after a kill, complete or not there.

While it is being computed the output is `<out>.partial`, JSON lines with a first line of settings; each process under
torchrun has its own. At the end it becomes the file in the format of its name, written aside and renamed.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lavis_lite.common import dist
from lavis_lite.common.checkpoint import atomic_write, write_text
from lavis_lite.common.errors import ExistingFileError, InputError, MissingPackageError
from lavis_lite.common.partial import PartialFile

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


class Results:
    """The output file of a command.

    Raises:
        InputError: an ending that is not of `formats`, or an unfinished output that was made with other settings.
        ExistingFileError: the output, or an unfinished one, is there, and neither `resume` nor `overwrite` is set.
    """

    def __init__(
        self,
        out: str | Path,
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        formats: Sequence[str] = FORMATS,
    ) -> None:
        self.out = Path(out)
        if self.out.suffix.lower() not in formats:
            raise InputError(f"--out {out}: the ending must be one of {', '.join(formats)}")
        check_folder(self.out)
        self.settings = dict(settings)
        if not resume and not overwrite:
            self._refuse_existing()
        if overwrite:
            dist.on_main(self.remove_partial)
        self.rows: dict[str, dict[str, Any]] = {}
        """Results of an earlier run, by `key_of`."""
        if resume:
            for path in self._partials():
                self.rows |= self._rows(path)
        self.is_complete = resume and self.out.exists() and not self._partials()
        """Whether an earlier run has finished the output."""
        self.file = self._partial(Path(f"{self.out}.partial{f'-{dist.rank()}' if dist.rank() else ''}"))

    def __enter__(self) -> Self:
        dist.barrier()  # all ranks have read the files that are written anew now
        self.file.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.file.close()
        if error is not None and not self.rows:
            self.file.path.unlink(missing_ok=True)  # there is nothing to continue
        elif error is not None:
            print(f"{len(self.rows):,} results are kept in {self.file.path}; --resume continues", file=sys.stderr)

    def add(self, row: dict[str, Any]) -> None:
        """Write a result; it is on disk when this returns."""
        self.rows[key_of(row)] = row
        self.file.add(row)

    def finish(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """Return, on every rank, all ranks' results in the order of `keys`."""
        self.file.close()
        dist.barrier()
        rows = {key: row for path in self._partials() for key, row in self._rows(path).items()}
        dist.barrier()
        return [rows[key] for key in keys if key in rows]

    def remove_partial(self) -> None:
        """Remove the unfinished output, once the output is written."""
        for path in self._partials():
            path.unlink()

    def _refuse_existing(self) -> None:
        if self.out.exists():
            raise ExistingFileError(f"--out {self.out} exists already: --overwrite replaces it")
        if self._partials():
            raise ExistingFileError(
                f"--out {self.out}: an earlier run did not finish it; --resume continues, --overwrite starts anew"
            )

    def _partials(self) -> list[Path]:
        return [Path(path) for path in sorted(glob.glob(f"{glob.escape(str(self.out))}.partial*"))]

    def _partial(self, path: Path) -> PartialFile:
        return PartialFile(path, self.settings, advice="give the same, or --overwrite")

    def _rows(self, path: Path) -> dict[str, dict[str, Any]]:
        return {key_of(row): row for row in self._partial(path).read()}


def check_folder(out: Path) -> None:
    """Raise InputError if an output's folder does not exist."""
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: the folder {out.parent} does not exist; make it first")


def key_of(row: Mapping[str, Any]) -> str:
    """Return what identifies a result: its image, and its question."""
    return json.dumps([row["image"], row.get("question")], ensure_ascii=False)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows in the format of the path's ending, aside and renamed."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        _write_parquet(path, rows)
    elif suffix == ".json":
        write_text(path, json.dumps(list(rows), ensure_ascii=False, indent=1) + "\n")
    elif suffix == ".jsonl":
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        write_text(path, _table(rows, "\t" if suffix == ".tsv" else ","))


def _table(rows: Iterable[Mapping[str, Any]], delimiter: str) -> str:
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        flat = {k: json.dumps(v, ensure_ascii=False) if isinstance(v, list | dict) else v for k, v in row.items()}
        writer.writerow(flat)
    return text.getvalue()


def _write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackageError('--out .parquet needs pyarrow: `pip install "lavis-lite[data]"`') from error
    table = pyarrow.Table.from_pylist([dict(row) for row in rows])
    atomic_write(path, lambda file: pyarrow.parquet.write_table(table, file))
