"""`data download`: annotations and images from the addresses in the dataset's YAML, resumed where they were cut off."""

import argparse
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from lavis_lite.cli.data.named import NamedDataset, find_datasets, require_samples
from lavis_lite.cli.data.table import size_text
from lavis_lite.cli.data.unpack import check_path, unpack
from lavis_lite.common.errors import InputError, UserError
from lavis_lite.common.sources import download
from lavis_lite.datasets.annotations import as_records, read_json, read_records
from lavis_lite.datasets.packaged.builders import PackagedBuilder
from lavis_lite.datasets.storage import (
    AnnotationFile,
    ImageArchive,
    ImageList,
    VisualFolder,
    annotation_files,
    is_streamed,
    visual_folder,
)

logger = logging.getLogger(__name__)

NUM_THREADS = 16
BATCH = 1000  # downloads that are queued at a time
SHOWN = 5
FIELD = re.compile(r"\{(\w+)\}")


def run(args: argparse.Namespace) -> int:
    """Download what is missing; return 1 if a download failed, which is then named."""
    found = find_datasets(args.dataset, splits=args.split, options=args.options)
    if all(one.name.startswith("shapes") for one in found):
        print("the shapes datasets are generated at first use: nothing to download")
        return 0
    require_samples(found, args.dataset)
    failed = 0
    for named in found:
        if isinstance(named.builder, PackagedBuilder):
            print(f"{named.name}: prepared in {named.builder.folder()}, from {named.builder.package()}")
            continue
        failed += download_annotations(named)
        if args.images:
            failed += download_images(named, keep_archives=args.keep_archives)
    if failed:
        print(f"{failed} of the above could not be downloaded", file=sys.stderr)
    return 1 if failed else 0


def download_annotations(named: NamedDataset) -> int:
    """Fetch the annotation files of the splits that are meant; return how many are still missing."""
    failed = 0
    for key in named.annotation_keys():
        for file in annotation_files(named.build_info, key, owner=named.name):
            if named.builder.is_stream(key) and is_streamed(file):
                print(f"{named.name}/{key}: is read as a stream from {file.storage or file.url}", flush=True)
                continue
            failed += not _tried(f"{named.name}/{key}", partial(fetch_annotations, file))
    return failed


def fetch_annotations(file: AnnotationFile) -> str:
    """Fetch one source of records; return where it is."""
    return ", ".join(map(str, file.fetch()))


def download_images(named: NamedDataset, *, keep_archives: bool) -> int:
    """Fetch and unpack the archives, and the listed images, of the splits that are meant; return the failures."""
    folder = visual_folder(named.build_info, owner=named.name)
    if folder is None:
        return 0
    archives = list(dict.fromkeys(one for split in named.splits for one in folder.archives_of(split)))
    lists = [(split, one) for split in named.splits for one in folder.listed_of(split)]
    if not archives and not lists:
        home = named.build_info.get("homepage")
        print(
            f"{named.name}: no address of its {folder.kind} is known. Put them into {folder.path()}"
            + (f"; the owner's page is {home}" if home else ""),
            file=sys.stderr,
        )
        return 1
    root, failed = folder.path(), 0
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".download.lock"):
        for archive in archives:
            name = f"{named.name}/{archive.name}"
            failed += not _tried(name, partial(fetch_archive, archive, folder, keep=keep_archives))
        for split, one in lists:
            failed += not _tried(f"{named.name}/{split}", partial(fetch_listed, one, named, split, root))
    return failed


def _tried(name: str, fetch: Callable[[], object]) -> bool:
    """Print what `fetch` returns, or its error; return whether it was successful. The next file is tried anyway."""
    try:
        print(f"{name}: {fetch()}", flush=True)
    except UserError as error:
        print(f"error: {name}: {error}", file=sys.stderr, flush=True)
        return False
    return True


def fetch_archive(archive: ImageArchive, folder: VisualFolder, *, keep: bool) -> str:
    """Download and unpack one archive, unless it is there; return what was done."""
    root = folder.path()
    if archive.is_there(root, folder.archives):
        return f"{archive.folder(root)} is there"
    aside = root / ".archives"
    logger.info("%s %s", archive.url, f"({size_text(archive.size)})" if archive.size else "")
    file = download.fetch(archive.url, cache_dir=aside, sha256=archive.sha256, md5=archive.md5, size=archive.size)
    logger.info("unpacking %s", file)
    count = unpack(file, root, strip=archive.strip)
    archive.marker(root).touch()
    if not keep:
        file.unlink()
        file.with_name(f"{file.name}.lock").unlink(missing_ok=True)
        if not any(aside.iterdir()):
            aside.rmdir()
    return f"{count:,} files in {archive.folder(root)}"


def fetch_listed(listed: ImageList, named: NamedDataset, split: str, root: Path) -> str:
    """Download the images that a list names and that are missing; return what was done.

    Raises InputError if some cannot be downloaded: addresses of the web vanish.
    """
    wanted = dict(wanted_files(listed, named, split, root))
    missing = {path: url for path, url in wanted.items() if not (path.is_file() and path.stat().st_size)}
    failures = _fetch_all(missing)
    if failures:
        first = "; ".join(failures[:SHOWN])
        raise InputError(
            f"{len(failures):,} of {len(wanted):,} images could not be downloaded, the others are in {root}: {first}. "
            "Run the command again, or remove their records from the annotations"
        )
    return f"{len(wanted):,} images in {root}" + ("" if missing else ", all were there")


def wanted_files(listed: ImageList, named: NamedDataset, split: str, root: Path) -> Iterator[tuple[Path, str]]:
    """Yield path and address of each listed image. InputError for a record without the fields, or with a path outside
    the folder.
    """
    for source, records in _list_records(listed, named, split):
        for number, record in enumerate(records):
            where = f"{source}: record {number}"
            file, url = filled(listed.file, record, where), filled(listed.address, record, where)
            check_path(file, Path(source))
            if not download.is_url(url):
                raise InputError(f"{where}: {url!r} is not an http address")
            yield root / file, url


def _list_records(
    listed: ImageList, named: NamedDataset, split: str
) -> Iterator[tuple[str, Sequence[Mapping[str, Any]]]]:
    if listed.url is None:
        for file in annotation_files(named.build_info, split, owner=named.name):
            for path in file.fetch():
                yield str(path), read_records(path)
        return
    path = download.fetch(listed.url)
    content = read_json(path)
    if listed.records is not None:
        content = content.get(listed.records) if isinstance(content, dict) else None
    yield str(path), as_records(content, path)


def filled(pattern: str, record: Mapping[str, Any], where: str) -> str:
    """Return a pattern with the record's fields for `{field}`. InputError for a field that is missing."""

    def field(match: re.Match[str]) -> str:
        value = record.get(match[1])
        if not isinstance(value, str | int) or value == "":
            raise InputError(f"{where}: has no field {match[1]!r} for {pattern!r}; fields there: {', '.join(record)}")
        return str(value)

    return FIELD.sub(field, pattern)


def _fetch_all(missing: Mapping[Path, str]) -> list[str]:
    """Download files, several at once; return the errors. The log says how far it is, without a line per file."""
    log = logging.getLogger(download.__name__)
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        return _fetch_each(missing)
    finally:
        log.setLevel(level)


def _fetch_each(missing: Mapping[Path, str]) -> list[str]:
    failures: list[str] = []
    pairs, done, reported = list(missing.items()), 0, time.monotonic()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for start in range(0, len(pairs), BATCH):
            jobs = [pool.submit(download.fetch_unlocked, url, path) for path, url in pairs[start : start + BATCH]]
            for job in as_completed(jobs):
                done += 1
                error = job.exception()
                if isinstance(error, UserError):
                    failures.append(str(error))
                elif error is not None:
                    raise error
                if time.monotonic() - reported >= download.PROGRESS:
                    reported = time.monotonic()
                    logger.info("%s of %s images, %s failed", f"{done:,}", f"{len(pairs):,}", f"{len(failures):,}")
    return failures
