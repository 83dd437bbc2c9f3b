"""Dataset and builder that all others derive from, and `load_dataset`.

A builder is the dataset's YAML as a dataclass: `prepare()` fetches the annotations, `build()` makes the
datasets. The split named `train` gets the `train` processors and the training class, every other split the `eval` ones.
"""

from __future__ import annotations

import logging
import mmap
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch.utils.data import Dataset

from lavis_lite.common import dist
from lavis_lite.common.config.zoo import dataset_section
from lavis_lite.common.errors import InputError, MissingFileError, UnknownNameError
from lavis_lite.common.pixels import is_constant
from lavis_lite.common.records import Kind, Record, RecordCheck
from lavis_lite.common.registry import did_you_mean, registry
from lavis_lite.common.sources import download
from lavis_lite.datasets.annotations import (
    add_instance_ids,
    as_list,
    check_records,
    check_unique,
    place_of,
    read_records,
)
from lavis_lite.datasets.image import open_image

logger = logging.getLogger(__name__)

SEEN = ("images", "videos")
"""What `build_info` calls the folder of what is looked at."""
BlankTexts = Literal["error", "skip"]

OPENING = ("background", "max_pixels")
"""The settings of an image processor that hold for the files, too, that a dataset opens for it."""


def identity(value: Any) -> Any:
    """The processor of a dataset that names none."""
    return value


class BaseDataset(Dataset):
    """Records of one split, their images below `vis_root`, and the processors that make samples of them.

    `annotation` holds one record a sample. The sample's `instance_id` is its index as a string. `required` names the
    fields that every record of the files must have, `fields` says of what kind those are that are read.
    """

    required: ClassVar[tuple[str, ...]] = ()
    fields: ClassVar[Mapping[str, Kind]] = {}
    long_keys: ClassVar[tuple[str, ...]] = ("label",)
    training: bool = True
    """Whether a sample has what is learned; else it is laid out for evaluation."""

    def __init__(
        self,
        annotation_paths: Sequence[str | Path],
        vis_root: str | Path,
        *,
        split: str,
        vis_processor: Callable[[Any], Any] = identity,
        text_processor: Callable[[str], str] = identity,
        blank_texts: BlankTexts = "error",
    ) -> None:
        if blank_texts not in get_args(BlankTexts):
            raise InputError(f"no blank_texts {blank_texts!r}. {did_you_mean(blank_texts, get_args(BlankTexts))}")
        self.annotation_paths = [Path(path) for path in annotation_paths]
        self.vis_root = Path(vis_root)
        self.split = split
        self.vis_processor = vis_processor
        self.text_processor = text_processor
        self.warned_of_constant = np.frombuffer(mmap.mmap(-1, 1), dtype=np.bool_)  # of all loader workers together
        self.blank_texts = blank_texts
        self.record_check = RecordCheck(
            required=self.required, fields=self.fields, clean=text_processor, allow_blank=blank_texts == "skip"
        )
        self.sources: list[tuple[str | Path, int]] = []
        self.kept: list[int] | None = None
        records = self.load()
        check_unique(records, "instance_id", self.place)
        self.annotation = add_instance_ids(self.arrange(self.without_blank(records)))

    def load(self) -> list[Record]:
        """The checked records of the files, one after another; `sources` notes how many each file has."""
        records: list[Record] = []
        for path in self.annotation_paths:
            for where, part in self.read(path):
                self.sources.append((where, len(part)))
                records += part
        return records

    def read(self, path: Path) -> Iterator[tuple[str | Path, list[Record]]]:
        """The checked records of one file after what `place_of` takes; subclasses read other forms here."""
        yield path, check_records(read_records(path), self.record_check, path)

    def place(self, number: int) -> str:
        """Where the `number`th record is that `arrange` gets, for errors: file and line, or file and number."""
        number = self.kept[number] if self.kept is not None else number
        for where, count in self.sources:
            if number < count:
                return place_of(where, number)
            number -= count
        return f"{', '.join(map(str, self.annotation_paths))}: record {number}"

    def without_blank(self, records: list[Record]) -> list[Record]:
        """With `blank_texts: skip` the records without their blank texts, and without those that then lack a field."""
        if self.blank_texts == "error" or not self.fields:
            return records
        found = [self.record_check.without_blank(record) for record in records]
        kept = [number for number, record in enumerate(found) if record is not None]
        where = ", ".join(map(str, self.annotation_paths))
        if records and not kept:
            raise InputError(f"{where}: all {len(records)} records have blank texts; fill them in")
        num_blank = sum(new is not old for new, old in zip(found, records, strict=True))
        if num_blank:
            logger.warning(
                "%s: blank texts of %d of %d records are left out, and %d of these records, which have no other",
                *(where, num_blank, len(records), len(records) - len(kept)),
            )
        self.kept = kept
        return [record for record in found if record is not None]

    def arrange(self, records: list[Record]) -> list[Record]:
        """The file's records as one record a sample; subclasses expand or merge here."""
        return records

    def __len__(self) -> int:
        return len(self.annotation)

    def files_of(self, record: Record) -> list[str]:
        """The image or video files that a record's sample is made of, as `image` takes them."""
        file = record.get("image")
        return [file] if isinstance(file, str) else []

    def image(self, file: str) -> Any:
        """The processed image of a path as the annotation gives it: absolute, or below `vis_root`."""
        path = self.vis_root / file
        given = {key: getattr(self.vis_processor, key) for key in OPENING if hasattr(self.vis_processor, key)}
        image = open_image(path, **given)
        if self.split == "train" and not self.warned_of_constant and is_constant(image):
            self.warned_of_constant.fill(True)
            logger.warning(
                "%s has one colour only, %s, so nothing can be learned from it; others may be like it, and are not "
                "named. If it is a transparent drawing, set another `background` in the image processor",
                path,
                image.getpixel((0, 0)),
            )
        return self.vis_processor(image)

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch: tensors stacked, `long_keys` as LongTensor (B), everything else as lists."""
        return {key: self._collate(key, [sample[key] for sample in samples]) for key in samples[0]}

    def _collate(self, key: str, values: list[Any]) -> Any:
        if torch.is_tensor(values[0]):
            return torch.stack(values)
        if key in self.long_keys:
            return torch.tensor(values, dtype=torch.long)
        if key.startswith("image") and hasattr(values[0], "convert"):
            raise InputError(
                f"the {self.split} images of {self.annotation_paths[0]} are no tensors: name a vis_processor in the "
                f"dataset's YAML, e.g. vis_processor: {{{'train' if self.split == 'train' else 'eval'}: "
                "{name: blip_image_eval, image_size: 224}}"
            )
        return values


@dataclass(kw_only=True)
class BaseBuilder:
    """What a dataset's YAML may say.

    `build_info`: `{annotations: {<split>: {url, md5, storage}}, images: {storage}}`; `url` and `storage` may be lists
    of equal length. Relative storages are below the data root (environment variable LAVIS_LITE_DATA). `videos` is
    another name for `images`, as in LAVIS.
    """

    data_type: str = "images"
    """LAVIS's key, which nothing reads: the records say what there is to look at."""
    build_info: dict[str, Any] = field(default_factory=dict)
    vis_processor: dict[str, Any] = field(default_factory=dict)
    text_processor: dict[str, Any] = field(default_factory=dict)
    blank_texts: BlankTexts = "error"
    """`skip` leaves out empty and blank captions, questions and answers, and counts them in the log."""

    train_dataset: ClassVar[type[BaseDataset] | None] = None
    eval_dataset: ClassVar[type[BaseDataset] | None] = None

    def prepare(self, splits: Iterable[str] | None = None) -> None:
        """Fetch what these splits (default: all) lack; rank 0 first, so that the others find it there."""
        with dist.main_first():
            for split in self.splits() if splits is None else splits:
                self.annotation_paths(split)

    def splits(self) -> list[str]:
        """The names of the splits there are."""
        return list(self._section("annotations"))

    def build(self, splits: Iterable[str] | None = None) -> dict[str, BaseDataset]:
        """One dataset a split (all splits by default). Raises KeyError for a split that isn't configured."""
        there = self.splits()
        if not there:
            raise InputError(
                f"{type(self).__name__}: build_info.annotations names no split; give {{train: {{storage: FILE}}}}"
            )
        wanted = there if splits is None else list(splits)
        for split in wanted:
            if split not in there:
                raise UnknownNameError(f"{type(self).__name__} has no split {split!r}; there are {', '.join(there)}")
        self.prepare(wanted)
        built = {}
        for split in wanted:
            built[split] = self._build_split(split)
            logger.info("%s: %d samples from %s", split, len(built[split]), built[split].annotation_paths[0])
        return built

    def dataset_options(self, split: str) -> dict[str, Any]:
        """Further keyword arguments of the split's dataset; subclasses override."""
        return {}

    def annotation_paths(self, split: str) -> list[Path]:
        """The split's annotation files on disk, fetched if need be."""
        entry = self._section("annotations")[split]
        where = f"build_info.annotations.{split}"
        check_keys(entry, ("url", "md5", "storage"), where)
        urls, storages, sums = (as_list(entry[key]) if entry.get(key) else [] for key in ("url", "storage", "md5"))
        count = max(len(urls), len(storages))
        if not count:
            raise InputError(f"{type(self).__name__}: {where} needs a url or a storage")
        for key, values in (("url", urls), ("storage", storages), ("md5", sums)):
            if values and len(values) != count:
                raise InputError(f"{type(self).__name__}: {where}.{key} has {len(values)} entries, expected {count}")
        blank: list[Any] = [None] * count
        return [
            locate(*files, where=where) for files in zip(urls or blank, storages or blank, sums or blank, strict=True)
        ]

    def image_root(self) -> Path:
        """The folder that the annotations' paths of images or videos start from.

        Raises FileNotFoundError if it's missing, ValueError if there are two.
        """
        sections = {kind: self._section(kind) for kind in SEEN}
        for kind, section in sections.items():
            check_keys(section, ("storage",), f"build_info.{kind}")
        given = {kind: section["storage"] for kind, section in sections.items() if section.get("storage")}
        if len(given) > 1:
            raise InputError(
                f"{type(self).__name__}: build_info names two folders, images: {given['images']} and videos: "
                f"{given['videos']}: set build_info.images or build_info.videos to null"
            )
        if not given:
            return resolve_storage("")
        ((kind, storage),) = given.items()
        root = resolve_storage(storage)
        if not root.is_dir():
            raise MissingFileError(
                f"{type(self).__name__}: {kind[:-1]} folder not found: {root}. Put the {kind} there, name another "
                f"folder in build_info.{kind}.storage, or set the environment variable LAVIS_LITE_DATA to the data "
                "root."
            )
        return root

    def _build_split(self, split: str) -> BaseDataset:
        dataset_class = self.train_dataset if split == "train" else self.eval_dataset
        assert dataset_class is not None, f"{type(self).__name__} has no dataset class for {split}"
        dataset = dataset_class(
            self.annotation_paths(split),
            self.image_root(),
            split=split,
            vis_processor=make_processor(self.vis_processor, split),
            text_processor=make_processor(self.text_processor, split),
            blank_texts=self.blank_texts,
            **self.dataset_options(split),
        )
        if self.train_dataset is not self.eval_dataset:
            dataset.training = split == "train"
        return dataset

    def _section(self, key: str) -> dict[str, Any]:
        check_keys(self.build_info, ("annotations", *SEEN), "build_info")
        return self.build_info.get(key) or {}


def make_processor(blocks: dict[str, Any], split: str) -> Callable[[Any], Any]:
    """The processor of the split's block (`train` for the split named so, else `eval`); identity without a block."""
    check_keys(blocks, ("train", "eval"), "processor")
    block = blocks.get("train" if split == "train" else "eval")
    if not block:
        return identity
    if "name" not in block:
        raise InputError(f"a processor block needs a `name`; found {block!r}")
    arguments = {key: value for key, value in block.items() if key != "name"}
    return registry.get_processor_class(block["name"])(**arguments)


def check_keys(given: dict[str, Any], known: Sequence[str], where: str) -> None:
    """Raise ValueError for a key that isn't known, with the nearest one."""
    for key in given:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}. {did_you_mean(key, known)}")


def resolve_storage(storage: str) -> Path:
    """An absolute path as it is, a relative one below the data root."""
    return download.data_root() / Path(storage).expanduser()


def locate(url: str | None, storage: str | None, md5: str | None, *, where: str = "") -> Path:
    """The file on disk: the storage if it's there, else a local `url` as it is, else fetched to the storage."""
    target = resolve_storage(storage) if storage else None
    if target is not None and target.is_file():
        return target
    if target is not None and target.is_dir():
        raise InputError(f"{where}.storage: {target} is a folder; name the annotation file (.json, .jsonl, .csv, .tsv)")
    if url and "://" not in url:
        local = Path(url).expanduser()
        if local.is_file():
            return local
        raise MissingFileError(
            f"{where}: annotation file not found: {local.absolute()}" + (f", nor {target}" if target else "")
        )
    if not url:
        raise MissingFileError(
            f"{where}: annotation file not found: {target}, and no url to fetch it from. Put it there, give an "
            "absolute path as storage, or set the environment variable LAVIS_LITE_DATA to the data root."
        )
    fetched = download.fetch(url, md5=md5)
    return fetched if target is None else _copy_aside(fetched, target)


def _copy_aside(source: Path, target: Path) -> Path:
    """Copy so that `target` is never seen half written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        aside = Path(folder) / target.name
        shutil.copyfile(source, aside)
        aside.replace(target)
    return target


def load_dataset(name: str, type: str = "default", splits: Iterable[str] | None = None) -> dict[str, BaseDataset]:
    """The datasets of `configs/datasets/<name>/<type>.yaml`, by split; all splits unless some are named."""
    return registry.get_builder_class(name)(**dataset_section(name, type)).build(splits)
