"""The shards of texts that the task `capfilt` writes: which are missing, their files, and the manifest.

A shard holds the texts of a fixed range of samples, so which samples are done does not depend on the number of
processes. A shard's table is written aside and renamed; that it is there means that the shard is complete. Until
then the texts of its finished batches are in a hidden file, one JSON line per batch; a kill can only cut the last line.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from lavis_lite.common import checkpoint
from lavis_lite.common.errors import InputError, MissingPackageError, WriteError
from lavis_lite.common.records import Record, StoredImage, printable
from lavis_lite.datasets.image import read_image_file
from lavis_lite.datasets.readers.capfilt import KIND, Manifest, read_manifest
from lavis_lite.tasks.results import write_json

OutputFormat = Literal["jsonl", "parquet", "webdataset"]
ImageOf = Callable[[int], Path | StoredImage]
"""From a sample's number to its image."""
SUFFIXES: Mapping[OutputFormat, str] = {"jsonl": ".jsonl", "parquet": ".parquet", "webdataset": ".jsonl"}
"""The suffix of the table with all texts of a shard; with `webdataset` there is a .tar of the kept ones beside it."""


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The files of one split's texts."""

    folder: Path
    num_samples: int
    size: int
    """Samples per shard; the last one may have fewer."""
    output_format: OutputFormat = "jsonl"

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    def __len__(self) -> int:
        return -(-self.num_samples // self.size)

    def samples(self, number: int) -> range:
        """Return the indices of a shard's samples."""
        return range(number * self.size, min((number + 1) * self.size, self.num_samples))

    def table(self, number: int) -> Path:
        """Return the file with all texts of a shard."""
        return self.folder / f"{number:06d}{SUFFIXES[self.output_format]}"

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are still to be written."""
        there = {path.name for path in self.folder.glob(f"*{SUFFIXES[self.output_format]}")}
        return [number for number in range(len(self)) if self.table(number).name not in there]

    def batches(self, number: int, size: int) -> Iterator[range]:
        """Yield a shard's samples in batches."""
        samples = self.samples(number)
        for start in range(0, len(samples), size):
            yield samples[start : start + size]

    def part(self, number: int) -> Path:
        """Return the file with the finished batches of a shard that is being made."""
        return self.folder / f".{number:06d}.part"

    def finished(self, number: int, size: int) -> list[list[Record]]:
        """Return the texts of the batches (of `size` samples) of an unfinished shard that an interrupted run finished,
        without those of its last batch, with which the shard is written.
        """
        found: list[list[Record]] = []
        if self.part(number).is_file():
            lines = self.part(number).read_bytes().split(b"\n")[:-1]  # a line without its end was cut by a kill
            for line, batch in zip(lines, list(self.batches(number, size))[:-1], strict=False):
                try:
                    content = json.loads(line)
                except ValueError:  # the machine stopped while it was written
                    break
                if content["first"] != batch[0]:
                    break
                found.append(content["texts"])
        return found

    def unfinished(self, number: int, size: int) -> list[range]:
        """Return the batches of a shard that are still to be done."""
        return list(self.batches(number, size))[len(self.finished(number, size)) :]

    def begin_part(self, number: int, size: int) -> list[Record]:
        """Return the texts of the finished batches of a shard, and let its file end after them."""
        found = self.finished(number, size)
        firsts = [batch[0] for batch in self.batches(number, size)]
        lines = [_line(first, texts) for first, texts in zip(firsts, found, strict=False)]
        with self.naming_full_disk():
            checkpoint.atomic_write(self.part(number), lambda file: file.writelines(lines))
        return [record for texts in found for record in texts]

    def add(self, number: int, first: int, texts: Sequence[Record]) -> None:
        """Note the texts of the batch that begins with sample `first`."""
        with self.naming_full_disk():
            try:
                with self.part(number).open("ab") as file:
                    file.write(_line(first, texts))
            except OSError as error:
                raise WriteError(error.errno, f"cannot write {self.part(number)}: {error.strerror}.") from error

    def begin(self, image_root: Path | None, settings: dict[str, Any]) -> None:
        """Write the manifest, or compare it with that of the run that is continued. `image_root` is None if the images
        are inside tables.

        Raises InputError if the texts that are there were made with other settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.sweep_temporaries(self.folder)
        if not self.manifest.is_file():
            self._write_manifest(image_root, settings, [])
            return
        old = read_manifest(self.manifest)["settings"]
        settings = json.loads(json.dumps(settings))
        for key in {**old, **settings}:
            if old.get(key) != settings.get(key):
                raise InputError(
                    f"{self.manifest}: its texts were made with {key}={old.get(key)!r}, this run has "
                    f"{settings.get(key)!r}: choose another run.job_id, or delete the folder"
                )

    def finish(self) -> None:
        """Name all shards in the manifest, which makes it readable as a dataset."""
        for number in range(len(self)):
            self.part(number).unlink(missing_ok=True)
        old = read_manifest(self.manifest)
        names = [self.table(number).name for number in range(len(self))]
        if names != old["shards"]:
            self._write_manifest(old["image_root"], old["settings"], names)

    def _write_manifest(self, image_root: Path | str | None, settings: dict[str, Any], names: list[str]) -> None:
        root = "" if image_root is None else str(image_root)
        write_json(self.manifest, Manifest(kind=KIND, image_root=root, settings=settings, shards=names))

    def write(self, number: int, records: Sequence[Record], image_of: ImageOf) -> None:
        """Write a shard, the table last. With `webdataset`, a shard without a kept text has no .tar, since readers take
        an empty one for damaged.

        Raises WriteError if the disk is full; the shards that are there stay, and the next run continues after them.
        """
        with self.naming_full_disk():
            kept = [record for record in records if record["kept"]]
            if self.output_format == "webdataset" and kept:
                tar = self.folder / f"{number:06d}.tar"
                checkpoint.atomic_write(tar, lambda file: write_tar(file, kept, image_of))
            write = write_parquet if self.output_format == "parquet" else write_jsonl
            checkpoint.atomic_write(self.table(number), lambda file: write(file, records))
        self.part(number).unlink(missing_ok=True)

    @contextlib.contextmanager
    def naming_full_disk(self) -> Iterator[None]:
        """Say in an error about a full disk how to continue."""
        try:
            yield
        except WriteError as error:
            text = str(error.strerror).partition(" Free some space")[0]
            advice = "Free some space there, and start the same command again: the finished shards are kept"
            raise WriteError(error.errno, f"{text} {advice}") from error


def _line(first: int, texts: Sequence[Record]) -> bytes:
    return json.dumps({"first": first, "texts": texts}).encode() + b"\n"


def write_jsonl(file: BinaryIO, records: Sequence[Record]) -> None:
    """Write one JSON object per line."""
    for record in records:
        file.write(printable(json.dumps(record, ensure_ascii=False)).encode() + b"\n")


def write_parquet(file: BinaryIO, records: Sequence[Record]) -> None:
    """Write a parquet table. Its columns are the same in every shard; ids of images are texts, of whatever type."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingPackageError("run.output_format: parquet needs pyarrow: pip install 'lavis-lite[data]'") from error
    texts, scores = ("image", "image_id", "caption", "source"), ("itm", "itc", "clip")
    kinds = {"sample": arrow.int64(), "kept": arrow.bool_()}
    kinds |= dict.fromkeys(texts, arrow.string()) | dict.fromkeys(scores, arrow.float64())
    rows = [
        {name: None if row.get(name) is None else printable(str(row[name])) for name in texts}
        | {name: row.get(name) for name in ("sample", "kept", *scores)}
        for row in records
    ]
    parquet.write_table(arrow.Table.from_pylist(rows, arrow.schema(list(kinds.items()))), file)


def write_tar(file: BinaryIO, records: Sequence[Record], image_of: ImageOf) -> None:
    """Write a WebDataset shard: per text the image's file as it is, the caption as .txt, and the record as .json, with
    an `image_id` that is the same in all texts of an image: the record's own, else the image's path.
    """
    try:
        import webdataset
    except ImportError as error:
        advice = "pip install 'lavis-lite[shards]'"
        raise MissingPackageError(f"run.output_format: webdataset needs webdataset: {advice}") from error
    with webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
        for number, record in enumerate(records):
            image = image_of(record["sample"])
            suffix, content = read_image_file(image)
            tar.write(
                {
                    "__key__": f"{record['sample']:09d}_{number:06d}",
                    suffix: content,
                    "txt": printable(record["caption"]).encode(),
                    "json": printable(json.dumps({"image_id": str(image), **record}, ensure_ascii=False)).encode(),
                }
            )
