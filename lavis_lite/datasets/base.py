"""The dataset and the builder that all others derive from.

A builder is the dataset's YAML as a dataclass: `prepare()` fetches the annotations, `build()` makes the
datasets. The split named `train` gets the `train` processors and the training class, every other split the `eval` ones.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from lavis_lite.common import dist
from lavis_lite.common.bounds import one_of
from lavis_lite.common.config.schema import schema_of
from lavis_lite.common.config.sections import PROCESSOR_KEYS
from lavis_lite.common.config.zoo import dataset_zoo
from lavis_lite.common.errors import InputError, UnknownNameError, UnreadableSample
from lavis_lite.common.feature_io import is_feature_file
from lavis_lite.common.image_io import is_constant
from lavis_lite.common.records import Kind, Record, RecordCheck, StoredImage
from lavis_lite.datasets.annotations import check_unique, place_of
from lavis_lite.datasets.build_info import BuildInfo
from lavis_lite.datasets.features import ReadsFeatures, is_features, padded_features
from lavis_lite.datasets.image import ONE_COLOUR, open_image, opening_settings
from lavis_lite.datasets.parts import CUT_BY, WHOLE, Part, cut_splits, part_of, warn_of_overlap
from lavis_lite.datasets.processing import ProcessesImages, byte_statistics, identity, make_processor
from lavis_lite.datasets.readers import Reader, find_reader
from lavis_lite.datasets.readers.files import PLACE, SplitFiles, identified
from lavis_lite.datasets.shard_tables import shard_table
from lavis_lite.datasets.shards import IncompleteSamples, is_shard
from lavis_lite.datasets.storage import (
    annotation_files,
    missing_folder,
    named_splits,
    resolve_storage,
    split_folder,
    stream_names,
    visual_folder,
)
from lavis_lite.datasets.stream_blocks import BlockMaker
from lavis_lite.datasets.streams import StreamDataset, StreamSettings, stream_settings
from lavis_lite.datasets.table_samples import Selection
from lavis_lite.datasets.tables import Table, TableRecords, is_saved, is_table, open_tables

logger = logging.getLogger(__name__)

BlankTexts = Literal["error", "skip"]


class BaseDataset(ProcessesImages, Dataset):
    """Records of one split, their images below `vis_root`, and the processors that make samples of them.

    `annotation` has one record per sample. The sample's `instance_id` is its index as a string. `required` names the
    fields that every record must have, `fields` the kinds of those that are read. `reader` makes records of the files
    (`readers/`), and `columns` maps fields of ours to those of the files.
    """

    required: tuple[str, ...] = ()
    fields: Mapping[str, Kind] = MappingProxyType({})
    long_keys: tuple[str, ...] = ("label",)
    reader: ClassVar[str] = "records"
    reads_tables: bool = False
    """Whether tables are read row by row, by `arrange_table`; else their records are loaded into memory."""
    item_field: ClassVar[str] = ""
    """The field of which each item of a list makes a sample, in tables."""
    training: bool = True
    """Whether samples hold what is learned; else they are made for evaluation."""

    def __init__(
        self,
        annotation_paths: Sequence[str | Path],
        vis_root: str | Path,
        *,
        split: str,
        vis_processor: Callable[[Any], Any] = identity,
        text_processor: Callable[[str], str] = identity,
        blank_texts: BlankTexts = "error",
        reader: Reader | None = None,
        columns: Mapping[str, str] | None = None,
        part: Part | None = None,
    ) -> None:
        self.annotation_paths = [Path(path) for path in annotation_paths]
        self.vis_root, self.split = Path(vis_root), split
        self.vis_processor, self.text_processor = vis_processor, text_processor
        self.warned_of_constant = np.frombuffer(mmap.mmap(-1, 1), dtype=np.bool_)  # of all loader workers together
        self.blank_texts = one_of("blank_texts", blank_texts, get_args(BlankTexts))
        check = RecordCheck(clean=text_processor, allow_blank=blank_texts == "skip")
        self.record_check = replace(check, required=self.required, fields=self.fields)
        self.part = part
        self.places: list[tuple[str | Path, int]] = []
        self.num_blank = 0
        """Records of which blank texts were left out."""
        self.note = ""
        """The same in words, which the builder logs; the blocks of a stream do not."""
        files = SplitFiles(
            paths=self.annotation_paths, split=split, root=self.vis_root, columns=columns or {}, check=check
        )
        self.annotation: Sequence[Record]
        if self.reads_tables and reader is None and files.are_tables():
            self.table = files.table()
            self.annotation = self.arrange_table(self.load_table(self.table))
        else:
            self.annotation = self.arrange(self.load(files, reader or find_reader(self.reader)))
            for index, record in enumerate(self.annotation):
                record.setdefault("instance_id", str(index))
        self.places = []  # every loader process would have them

    def load(self, files: SplitFiles, reader: Reader) -> list[Record]:
        """Return the reader's records, checked, without blank texts; `places` notes where each is from."""
        records = list(reader(files))
        self.places = [record.pop(PLACE, (str(files), number)) for number, record in enumerate(records)]
        if not records:
            raise InputError(f"{files}: the reader found no records of the split {files.split!r}")
        self.record_check(records, self.place)
        records = self.without_blank(records)
        check_unique(records, "instance_id", self.place)
        if self.part is not None:
            kept = [number for number, record in enumerate(records) if self.part.has(record)]
            records, self.places = [records[n] for n in kept], [self.places[n] for n in kept]
            if not records:
                raise InputError(
                    f"{files}: split_off leaves no image to the split {self.split!r}: raise its share (--val-share)"
                )
        for record in records:
            record.pop(CUT_BY, None)
        return records

    @property
    def source(self) -> Path:
        """The first of the annotation files."""
        return self.annotation_paths[0]

    def load_table(self, table: Table) -> TableRecords:
        """Return the samples of a table, checked, without blank texts, which are read at access."""
        selection = Selection(table, self.record_check, item_field=self.item_field, part=self.part)
        samples = selection.samples()
        self.num_blank, self.note = selection.num_blank, selection.note
        return samples

    def arrange_table(self, samples: TableRecords) -> TableRecords:
        """Return the samples of a table; subclasses note here what they need of all."""
        return samples

    def place(self, number: int) -> str:
        """Return where the record is that `arrange` gets as its `number`th: file and line, or file and number."""
        return place_of(*self.places[number]) if self.places else f"{self.annotation_paths[0]}: sample {number}"

    def without_blank(self, records: list[Record]) -> list[Record]:
        """With `blank_texts: skip`, leave out blank texts, and the records that then lack a required field."""
        if self.blank_texts == "error" or not self.fields:
            return records
        found = [self.record_check.without_blank(record) for record in records]
        kept = [number for number, record in enumerate(found) if record is not None]
        where = ", ".join(map(str, self.annotation_paths))
        if not kept:
            raise InputError(f"{where}: all {len(records)} records have blank texts; fill them in")
        self.num_blank = sum(new is not old for new, old in zip(found, records, strict=True))
        if self.num_blank:
            self.note = (
                f"{where}: blank texts of {self.num_blank} of {len(records)} records are left out, and "
                f"{len(records) - len(kept)} of these records, which have no other"
            )
        self.places = [self.places[number] for number in kept]
        return [record for record in found if record is not None]

    def arrange(self, records: list[Record]) -> list[Record]:
        """Return one record per sample; subclasses expand or merge records here."""
        return records

    def keep_first(self, number: int) -> None:
        """Leave out all samples but the first `number`."""
        self.annotation = self.annotation[:number]

    def __len__(self) -> int:
        return len(self.annotation)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.annotation[index]
        return {"image": self.visual(record), **self.entries(record, index), "instance_id": str(index)}

    def entries(self, record: Record, index: int) -> dict[str, Any]:
        """Return the entries of a record's sample besides `image` and `instance_id`."""
        raise NotImplementedError(f"{type(self).__name__} defines neither entries nor __getitem__")

    def files_of(self, record: Record) -> list[str]:
        """Return the image or video files of a record's sample, as `image` takes them."""
        file = record.get("image")
        return [file] if isinstance(file, str) else []

    def visual(self, record: Record) -> Any:
        """Return what a record's sample has as `image`."""
        stored = record.get("image")
        return self.image(stored) if isinstance(stored, StoredImage) else self.image(*self.files_of(record))

    def image(self, file: str | StoredImage) -> Any:
        """Return the processed image of a table, or the image or features (N,W) of a path as the annotation gives it:
        absolute, or below `vis_root`.
        """
        return self.process_once(file, lambda: self._read_image(file))

    def _read_image(self, file: str | StoredImage) -> Any:
        path = file if isinstance(file, StoredImage) else self.vis_root / file
        if isinstance(own := self.vis_processor, ReadsFeatures):
            return own.read_features(path)
        if is_feature_file(str(path)):
            raise UnreadableSample(f"{path} holds features: name the processor {{name: features}} in vis_processor")
        image = open_image(path, **opening_settings(own))
        if self.split == "train" and not self.warned_of_constant and is_constant(image):
            self.warned_of_constant.fill(True)
            logger.warning(f"{path} {ONE_COLOUR.format(image.getpixel((0, 0)))}")
        return self.vis_processor(image)

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch: tensors stacked, `long_keys` as LongTensor (B), everything else as lists.

        Features (N,W) as `image` are padded to the longest; `image_mask` (B,N) is 1 where a token counts. Images that
        are bytes come with `image_mean` and `image_std` (B,3), by which they are normalised later.
        """
        values = {key: [sample[key] for sample in samples] for key in samples[0]}
        batch = padded_features(values.pop("image")) if is_features(samples[0].get("image")) else {}
        batch |= byte_statistics(samples, self.vis_processor)
        return batch | {key: self._collate(key, own) for key, own in values.items()}

    def _collate(self, key: str, values: list[Any]) -> Any:
        if torch.is_tensor(values[0]):
            return torch.stack(values)
        if key in self.long_keys:
            return torch.tensor(values, dtype=torch.long)
        if key.startswith("image") and isinstance(values[0], Image.Image):
            raise InputError(
                f"the {self.split} images of {self.annotation_paths[0]} are not tensors: name a vis_processor, e.g. "
                f"{{{'train' if self.split == 'train' else 'eval'}: {{name: blip_image_eval, image_size: 224}}}}"
            )
        return values


@dataclass(kw_only=True)
class BaseBuilder:
    """The keys of a dataset's YAML, and the datasets that are built from them.

    `build_info`: `{annotations: {<split>: {url, md5, storage, num_samples, images}}, images: {storage, archives,
    listed, needed}, homepage, licence, instance_id_key}`, read by `datasets/storage.py`. `url` and `storage` may be
    lists of equal length. Relative storages are below the data root (environment variable LAVIS_LITE_DATA). `videos` is
    another name for `images`, as in LAVIS. `instance_id_key` is the field that identifies a record, in place of
    `instance_id`.
    """

    data_type: str | list[str] = "images"
    """LAVIS's key, which nothing reads: the records say whether they have images or videos."""
    layout: str = ""
    """The builder that lays out the samples of a dataset that is a YAML alone; it is chosen before this is read."""
    reader: str = ""
    """The function from annotation files to records, in place of the layout's; see `find_reader`."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name of a field to the file's: `{caption: text}`."""
    build_info: BuildInfo = field(default_factory=BuildInfo)
    split_off: dict[str, float] = field(default_factory=dict)
    """Splits that are cut from `train`, and their shares of its images: `{val: 0.05}`."""
    vis_processor: dict[str, Any] = field(default_factory=dict)
    text_processor: dict[str, Any] = field(default_factory=dict)
    blank_texts: BlankTexts = "error"
    """`skip` leaves out empty and blank captions, questions and answers, and counts them in the log."""
    incomplete_samples: IncompleteSamples = "error"
    """`skip` leaves out what is incomplete in shards: samples without image or text, and the rest of a cut shard."""
    stream: StreamSettings | None = None
    """Read the shards of the split `train` in their order, without an index; see `StreamSettings`."""

    train_dataset: ClassVar[type[BaseDataset]]
    eval_dataset: ClassVar[type[BaseDataset]]

    def prepare(self, splits: Iterable[str] | None = None) -> None:
        """Fetch the missing files of these splits (default: all); rank 0 first, so that the others find them."""
        with dist.main_first():
            for split in self.splits() if splits is None else splits:
                paths = [] if self.is_stream(split) else self.annotation_paths(split)
                if paths and all(map(is_table, paths)):
                    open_tables(paths, split=split)  # which converts parquet

    def splits(self) -> list[str]:
        """Return the names of all splits, also of those that are cut from another."""
        named = named_splits(self.build_info)
        return [*named, *cut_splits(self.split_off, named, has_stream=self.stream is not None)]

    def build(self, splits: Iterable[str] | None = None) -> dict[str, BaseDataset | StreamDataset]:
        """Return one dataset per split (all splits by default). Raises KeyError for a split that is not configured."""
        there, name = self.splits(), type(self).__name__
        if not there:
            raise InputError(f"{name}: build_info.annotations names no split; give {{train: {{storage: FILE}}}}")
        wanted = there if splits is None else list(splits)
        cut_splits(self.split_off, named_splits(self.build_info), has_stream=False)  # `splits` may be a subclass's
        if unknown := [split for split in wanted if split not in there]:
            raise UnknownNameError(f"{name} has no split {unknown[0]!r}; there are {', '.join(there)}")
        self.prepare(wanted)
        built: dict[str, BaseDataset | StreamDataset] = {}
        for split in wanted:
            built[split] = self._build_split(split)
            logger.info("%s: %d samples from %s", split, len(built[split]), built[split].source)
            if isinstance(dataset := built[split], BaseDataset) and dataset.note:
                logger.warning(dataset.note)
        warn_of_overlap({split: one for split, one in built.items() if isinstance(one, BaseDataset)})
        return built

    def is_stream(self, split: str) -> bool:
        """Return whether the split is read as a stream."""
        return self.stream is not None and split == "train"

    def dataset_options(self, split: str) -> dict[str, Any]:
        """Return keyword arguments of the split's dataset besides the fields of the same names; subclasses override
        this.
        """
        return {}

    def annotation_paths(self, split: str) -> list[Path]:
        """Return the split's annotation files and folders on disk, fetched if need be; of shards the table of their
        samples.
        """
        files = annotation_files(self.build_info, self.source_of(split), owner=type(self).__name__)
        paths = [path for file in files for path in file.fetch()]
        return [shard_table(paths, self.incomplete_samples)] if paths and all(map(is_shard, paths)) else paths

    def source_of(self, split: str) -> str:
        """Return the split that has the files: itself, or the one that it is cut from."""
        return WHOLE if split in self.split_off else split

    def image_root(self) -> Path:
        """Return the folder that the annotations' paths of images or videos start from.

        Raises FileNotFoundError if it is missing, InputError if there are two.
        """
        owner = type(self).__name__
        folder = visual_folder(self.build_info, owner=owner)
        if folder is None:
            return resolve_storage("")
        if not folder.path().is_dir():
            raise missing_folder(folder, owner=owner, is_packaged=owner in dataset_zoo)
        return folder.path()

    def split_root(self, split: str) -> Path:
        """Return the folder of a split's images: its own, the folder of images that is its storage, or `image_root`."""
        folder = split_folder(self.build_info, self.source_of(split))
        if folder is not None and not folder.path().is_dir():
            raise missing_folder(folder, owner=type(self).__name__, is_packaged=False)
        paths = self.annotation_paths(split)
        if folder is None and len(paths) == 1 and paths[0].is_dir() and not is_saved(paths[0]):
            return paths[0]
        return self.image_root() if folder is None else folder.path()

    def dataset_class(self, split: str) -> type[BaseDataset]:
        """Return the class of the split's dataset."""
        return self.train_dataset if split == "train" else self.eval_dataset

    def make_reader(self) -> Reader | None:
        """Return the reader of the annotation files; None for that of the dataset class."""
        return find_reader(self.reader) if self.reader else None

    def _build_split(self, split: str) -> BaseDataset | StreamDataset:
        if self.stream and self.split_off:
            raise InputError("split_off: cuts no stream, whose samples have no order; name the shards of each split")
        dataset_class, reader = self.dataset_class(split), self.make_reader()
        if key := self.build_info.get("instance_id_key"):
            reader = identified(reader or find_reader(dataset_class.reader), key)
        options: dict[str, Any] = {"split": split}
        options |= {name: make_processor(vars(self)[name], split) for name in PROCESSOR_KEYS}
        options |= self.dataset_options(split)
        if part := part_of(split, self.split_off):
            options["part"] = part
        own = {name: value for name, value in vars(self).items() if name in schema_of(dataset_class)[0]}
        options = own | options

        def make(paths: Sequence[str | Path], root: Path, reader: Reader | None) -> BaseDataset:
            dataset = dataset_class(paths, root, **options | {"reader": reader})
            if self.dataset_class("train") is not self.dataset_class("val"):
                dataset.training = split == "train"
            return dataset

        if not self.is_stream(split):
            return make(self.annotation_paths(split), self.split_root(split), reader)
        assert self.stream is not None, split
        shards = stream_names(self.build_info, split, owner=type(self).__name__)
        blocks = BlockMaker(make, self.image_root(), reader=reader or find_reader(dataset_class.reader))
        return StreamDataset(shards, stream_settings(self.stream), make_block=blocks)
