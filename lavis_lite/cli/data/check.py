"""`data check`: are the files of a dataset there, can they be read, and is it the whole dataset?

Nothing is downloaded or changed. Every split is checked to its end: one finding does not hide the next. A *problem* is
what a run would fail at, or a number of samples other than the published one. A *note* is what may be meant:
repetitions, images of the training splits in others, blank texts that the dataset's YAML leaves out.
"""

import argparse
import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from lavis_lite.cli.data.named import NamedDataset, find_datasets, offline, require_samples
from lavis_lite.cli.preflight import num_repeated, wrong_files
from lavis_lite.common.errors import InputError, UnreadableSample, UserError
from lavis_lite.common.feature_io import holds_features, is_feature_file, read_features
from lavis_lite.common.records import Record, StoredImage
from lavis_lite.common.video_io import decode
from lavis_lite.datasets.annotations import as_list
from lavis_lite.datasets.base import BaseBuilder, BaseDataset
from lavis_lite.datasets.image import open_image
from lavis_lite.datasets.storage import annotation_files, section_of, split_folder, visual_folder

T = TypeVar("T")
Visual = str | StoredImage
"""The path of an image, a video or features, or one that is inside a table."""
SHOWN = 5
NUM_THREADS = 8


@dataclass
class SplitCheck:
    """Findings about one split."""

    where: str
    """`<dataset>/<split>`"""
    is_trained_on: bool
    facts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    files: set[str] = field(default_factory=set)
    """Images or videos of the split."""

    def lines(self) -> list[str]:
        marked = [("", self.facts), ("note: ", self.notes), ("PROBLEM: ", self.problems)]
        return [self.where, *(f"  {mark}{text}" for mark, texts in marked for text in texts)]


def run(args: argparse.Namespace) -> int:
    """Print the report; return 1 if there is a problem, or with `--strict` a note."""
    count = number_to_decode(args.decode)
    with offline():
        found = find_datasets(args.dataset, splits=args.split, options=args.options)
        require_samples(found, args.dataset)
        checks = [check_split(one, split, num_decoded=count) for one in found for split in one.splits]
    note_overlap(checks)
    print("\n".join(line for check in checks for line in check.lines()))
    problems, notes = sum(len(check.problems) for check in checks), sum(len(check.notes) for check in checks)
    print(f"problems: {problems}, notes: {notes}")
    return 1 if problems or (args.strict and notes) else 0


def number_to_decode(text: str) -> int | None:
    """Return the number of `--decode`, None for all. InputError for anything else."""
    if text == "all":
        return None
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"--decode: expected a number or all, got {text!r}")
    return int(text)


def check_split(named: NamedDataset, split: str, *, num_decoded: int | None) -> SplitCheck:
    """Check one split; `num_decoded` images or videos of it are decoded (None: all)."""
    check = SplitCheck(f"{named.name}/{split}", split in named.train_splits)
    if check_annotations(named, split, check):
        return check
    builder, has_images = without_stops(named, split, check)
    try:
        dataset = builder.build([split])[split]
    except (UserError, OSError) as error:
        check.problems.append(str(error))
        return check
    if not isinstance(dataset, BaseDataset):
        check.facts.append(
            f"{len(dataset):,} samples; {type(dataset).__name__} is not a BaseDataset: no file is checked"
        )
        return check
    check_count(named, split, dataset, check)
    check_blank(named.builder, dataset, check)
    if repeated := num_repeated(dataset.annotation):
        check.notes.append(f"{repeated:,} records repeat an earlier one")
    if has_images:
        check_images(dataset, check, num_decoded)
    return check


def check_annotations(named: NamedDataset, split: str, check: SplitCheck) -> bool:
    """Note the annotation files; return whether one is missing."""
    is_missing = False
    for key in section_of(named.build_info, "annotations"):
        if key != named.builder.source_of(split) and (
            key in named.builder.splits() or key not in named.annotation_keys()
        ):
            continue
        if named.builder.is_stream(key):
            check.facts.append("read as a stream: only its first samples are checked")
            continue
        for file in annotation_files(named.build_info, key, owner=named.name):
            path = file.found()
            if path is None:
                is_missing = True
                how = "`lavis-lite data download` fetches it" if file.is_remote else "put it there"
                check.problems.append(f"annotation file not found: {file.path()}; {how}")
            else:
                check.facts.append(f"annotations {path}")
    return is_missing


def without_stops(named: NamedDataset, split: str, check: SplitCheck) -> tuple[BaseBuilder, bool]:
    """Return a builder that counts blank texts in place of stopping at the first, and whether its images are there."""
    builder = copy.copy(named.builder)
    builder.blank_texts = "skip"
    own = split_folder(builder.build_info, builder.source_of(split))
    folder = own or visual_folder(builder.build_info, owner=named.name)
    if folder is None or folder.path().is_dir():
        return builder, True
    fetch = "; `lavis-lite data download --images` fetches them" if folder.is_published else ""
    check.problems.append(f"{folder.kind[:-1]} folder not found: {folder.path()}{fetch}")
    builder.build_info = builder.build_info | {"images": None, "videos": None}
    if own is not None:
        files, source = dict(section_of(builder.build_info, "annotations")), builder.source_of(split)
        builder.build_info = builder.build_info | {"annotations": {**files, source: {**files[source], "images": None}}}
    return builder, False


def check_count(named: NamedDataset, split: str, dataset: BaseDataset, check: SplitCheck) -> None:
    """Compare the number of samples with the published one; those left out for blank texts count."""
    count, size = len(dataset), named.sizes.get(split)
    if size is None or size == count:
        check.facts.append(f"{count:,} samples" + ("" if size is None else ", as published"))
    elif count < size <= count + dataset.num_blank:
        check.facts.append(f"{count:,} samples and {size - count:,} left out, as published")
    else:
        check.problems.append(
            f"{count:,} samples, {size:,} were published: the files are incomplete or not the published ones"
        )


def check_blank(builder: BaseBuilder, dataset: BaseDataset, check: SplitCheck) -> None:
    """Note records with blank texts, which are a problem unless the dataset's YAML leaves them out."""
    if dataset.num_blank and builder.blank_texts == "skip":
        check.notes.append(f"{dataset.num_blank:,} records have blank texts, which are left out")
    elif dataset.num_blank:
        check.problems.append(
            f"{dataset.num_blank:,} records have blank texts: fill them in, remove the records, or set the dataset's "
            "blank_texts: skip"
        )


def check_images(dataset: BaseDataset, check: SplitCheck, num_decoded: int | None) -> None:
    """Look up every image or video of a split, and decode some of them; those in tables are only decoded."""
    root, is_video, stored = os.fspath(dataset.vis_root), {}, []
    for number, record in enumerate(dataset.annotation):
        if stored_in(record):
            stored.append(number)
        for file in dataset.files_of(record):
            is_video[os.path.join(root, file)] = record.get("video") is not None
    if stored:
        chosen = [one for n in spread(stored, num_decoded) for one in stored_in(dataset.annotation[n])]
        found: dict[str, list[Visual]] = {}
        for item, is_clip in chosen:
            found.setdefault(kind_of(item, is_clip), []).append(item)
        check.facts.append(f"{len(stored):,} samples with {' and '.join(found)} in the table")
        for kind, items in found.items():
            report_decoded(items, kind, check)
    if is_video:
        check_files(is_video, check, num_decoded)


def stored_in(record: Record) -> list[tuple[StoredImage, bool]]:
    """Return the images, videos and features of a record that are inside a table, and whether each is a video."""
    values = [(name, one) for name in ("image", "images", "video") for one in as_list(record.get(name))]
    return [(one, name == "video") for name, one in values if isinstance(one, StoredImage)]


def kind_of(item: Visual, is_video: bool) -> str:
    """Return `videos`, `features` or `images`; what is inside a table is known by its content."""
    if is_video:
        return "videos"
    if isinstance(item, str):
        return "features" if is_feature_file(item) else "images"
    try:
        return "features" if holds_features(item.read()) else "images"
    except (UnreadableSample, OSError):
        return "images"  # opening it gives the reason


def check_files(is_video: Mapping[str, bool], check: SplitCheck, num_decoded: int | None) -> None:
    """Look up the files of images, videos or features, and decode some of them."""
    check.files = set(is_video)
    wrong = wrong_files(check.files)
    kinds = {path: kind_of(path, is_clip) for path, is_clip in is_video.items()}
    words = " and ".join(sorted(set(kinds.values())))
    if wrong:
        named = listing([f"{path} ({why})" for path, why in wrong.items()])
        check.problems.append(f"{len(wrong):,} of {len(check.files):,} {words}: {named}")
    else:
        check.facts.append(f"{len(check.files):,} {words}, all there")
    chosen = spread(sorted(check.files - wrong.keys()), num_decoded)
    for kind in sorted(set(kinds.values())):
        report_decoded([path for path in chosen if kinds[path] == kind], kind, check)


def report_decoded(chosen: Sequence[Visual], kind: str, check: SplitCheck) -> None:
    """Decode the chosen files or stored images of a kind, and note those that cannot be decoded."""
    if chosen:
        broken = list(filter(None, _decoded(chosen, kind)))
        if broken:
            check.problems.append(f"{len(broken):,} of {len(chosen):,} {kind} cannot be decoded: {listing(broken)}")
        else:
            check.facts.append(f"{len(chosen):,} {kind} decoded")


def _decoded(chosen: Sequence[Visual], kind: str) -> Iterator[str | None]:
    """Yield the error of each file that cannot be decoded, None for the others."""
    reading: dict[str, Callable[[Visual], object]]
    reading = {"videos": lambda video: decode(video, 1), "features": read_features, "images": open_image}

    def problem(item: Visual) -> str | None:
        try:
            reading[kind](item)
        except UnreadableSample as error:
            return str(error)
        return None

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        yield from pool.map(problem, chosen)


def spread(items: Sequence[T], count: int | None) -> list[T]:
    """Return `count` items spread over a sequence, or all if it has no more (None: all)."""
    count = len(items) if count is None else min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def listing(items: Sequence[str]) -> str:
    """Return the first items, and how many there are beside them."""
    more = f"; and {len(items) - SHOWN:,} more" if len(items) > SHOWN else ""
    return "; ".join(items[:SHOWN]) + more


def note_overlap(checks: Sequence[SplitCheck]) -> None:
    """Note the images that are in a training split and in another one; two paths of one file count as one."""
    trained = {os.path.realpath(file) for check in checks if check.is_trained_on for file in check.files}
    for check in checks:
        if not check.is_trained_on and trained:
            shared = sorted({os.path.realpath(file) for file in check.files} & trained)
            if shared:
                check.notes.append(f"{len(shared):,} images are in a training split too, such as {Path(shared[0])}")
