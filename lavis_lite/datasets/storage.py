"""The files of a dataset as `build_info` names them: annotations, the folder of images or videos, and their sources.

Importing this loads no torch: `lavis-lite data` reads packaged YAMLs with it.
"""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lavis_lite.common.errors import InputError, MissingFileError, MissingPackageError
from lavis_lite.common.registry import did_you_mean
from lavis_lite.common.sources import download
from lavis_lite.datasets import hub
from lavis_lite.datasets.stream_shards import is_address
from lavis_lite.datasets.stream_tables import is_rows, part_names

VISUAL_FOLDERS = ("images", "videos")
"""The keys of `build_info` that name the folder of images or videos."""
SPLIT_KEYS = ("url", "md5", "storage", "num_samples", "images")
INFO_KEYS = ("annotations", *VISUAL_FOLDERS, "homepage", "licence", "instance_id_key")
STATUS_HINT = "`lavis-lite data status RECIPE` lists every file that a recipe needs, and whether it is there"


@dataclass(frozen=True, kw_only=True)
class AnnotationFile:
    """One source of a split's records: a file, a folder or a data set of the hub (`hf://`); its address, its path below
    the data root, or both.
    """

    url: str | None
    storage: str | None
    md5: str | None
    where: str
    """`build_info.annotations.<split>`, for messages."""

    def path(self) -> Path:
        """Return where the file is expected: its storage, else its local `url`, else its name in the cache."""
        if self.hub_split:
            return self.hub_split.cache_folder()
        if self.storage:
            return resolve_storage(self.storage)
        assert self.url is not None, f"{self.where}: neither url nor storage"
        return download.cached_path(self.url) if self.is_remote else Path(self.url).expanduser()

    @property
    def is_remote(self) -> bool:
        return self.url is not None and "://" in self.url

    @property
    def hub_split(self) -> hub.HubSplit | None:
        """The data set of the hub that the storage names; None for a path."""
        split = self.where.rpartition(".")[2]
        storage = self.storage or ""
        return hub.parse(storage, split, where=f"{self.where}.storage") if hub.is_hub(storage) else None

    def found(self) -> Path | None:
        """Return the file or folder if it is on this machine; a copy in the cache of downloads counts."""
        if self.hub_split:
            return self.path() if self.hub_split.is_cached() else None
        paths = [self.path()]
        if self.url:
            paths.append(download.cached_path(self.url) if self.is_remote else Path(self.url).expanduser())
        return next((path for path in paths if path.is_file() or path.is_dir()), None)

    def fetch(self) -> list[Path]:
        """Return the file or folder on disk, fetched if need be (see `locate`); of the hub's data set its files."""
        if self.hub_split:
            return self.hub_split.files()
        return [locate(self.url, self.storage, self.md5, where=self.where)]


@dataclass(frozen=True, kw_only=True)
class ImageArchive:
    """A zip or tar file that the owner publishes; it is unpacked into the folder of images or videos."""

    keys: ClassVar = ("url", "strip", "size", "sha256", "md5")

    name: str
    """The folder that unpacking makes, below the folder of images; with `strip` any name."""
    url: str
    strip: int = 0
    """Leading parts that are removed from the members' paths; the files are then in the folder of images itself."""
    size: int | None = None
    """Bytes of the archive."""
    sha256: str | None = None
    md5: str | None = None

    def folder(self, root: Path) -> Path:
        """Return the folder that has files once the archive is unpacked below `root`."""
        return root if self.strip else root / self.name

    def marker(self, root: Path) -> Path:
        """Return the file that marks the archive as unpacked by `lavis-lite data download`."""
        return root / f".unpacked-{download.cached_path(self.url).name}"

    def is_there(self, root: Path, others: Sequence[ImageArchive]) -> bool:
        """Return whether the archive is unpacked below `root`; `others` are all archives of the folder.

        Files in a folder that several archives share do not say which of them was unpacked.
        """
        is_shared = sum(other.folder(root) == self.folder(root) for other in others) > 1
        return self.marker(root).is_file() or (not is_shared and has_files(self.folder(root)))


@dataclass(frozen=True, kw_only=True)
class ImageList:
    """Images with an address of their own: records of a JSON file, or of the annotations, that name address and file.

    `address` and `file` are patterns with fields of a record: `{coco_url}`, `val/{file_name}`.
    """

    keys: ClassVar = ("url", "records", "address", "file")

    name: str
    address: str
    file: str
    url: str | None = None
    """A JSON file with the records; None for the split's annotation files."""
    records: str | None = None
    """The key of the list of records in that file."""


@dataclass(frozen=True, kw_only=True)
class VisualFolder:
    """The folder of a dataset's images or videos, and what can be downloaded into it."""

    kind: str
    """`images` or `videos`"""
    storage: str
    archives: tuple[ImageArchive, ...] = ()
    listed: tuple[ImageList, ...] = ()
    needed: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names of the archives and lists that a split needs; without this, every split needs all."""

    def path(self) -> Path:
        return resolve_storage(self.storage)

    @property
    def is_published(self) -> bool:
        return bool(self.archives or self.listed)

    def archives_of(self, split: str) -> list[ImageArchive]:
        """Return the archives with images of a split."""
        return [one for one in self.archives if self._needs(split, one.name)]

    def listed_of(self, split: str) -> list[ImageList]:
        """Return the lists with images of a split."""
        return [one for one in self.listed if self._needs(split, one.name)]

    def _needs(self, split: str, name: str) -> bool:
        return not self.needed or name in self.needed.get(split, ())


def annotation_files(build_info: Mapping[str, Any], split: str, *, owner: str) -> list[AnnotationFile]:
    """Return the annotation files of a split; of a pattern in `storage`, such as `part-*.parquet`, those that match it.
    `owner` is the dataset's name for messages.

    Raises InputError for unknown keys, and for lists of different lengths.
    """
    entry, where = section_of(build_info, "annotations")[split], f"build_info.annotations.{split}"
    check_keys(entry, SPLIT_KEYS, where)
    given = {key: _as_list(entry[key]) if entry.get(key) else [] for key in ("url", "storage", "md5")}
    for key in ("url", "storage"):
        given[key] = [name for pattern in given[key] for name in _in_braces(pattern)]
    if not given["url"]:
        given["storage"] = [path for storage in given["storage"] for path in _matches(storage)]
    count = max(len(given["url"]), len(given["storage"]))
    if not count:
        raise InputError(f"{owner}: {where} needs a url or a storage")
    for key, values in given.items():
        if values and len(values) != count:
            raise InputError(f"{owner}: {where}.{key} has {len(values)} entries, expected {count}")
    filled = [values or [None] * count for values in given.values()]
    return [
        AnnotationFile(url=url, storage=storage, md5=md5, where=where)
        for url, storage, md5 in zip(*filled, strict=True)
    ]


def _in_braces(pattern: str) -> list[str]:
    """Return the names that a pattern with `{0000..1279}` or `{a,b}` stands for, as a shell expands it."""
    if "{" not in pattern or resolve_storage(pattern).exists():
        return [pattern]
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise MissingPackageError(f"{pattern}: names in braces need `pip install lavis-lite[shards]`") from error
    return list(braceexpand(pattern))


def stream_names(build_info: Mapping[str, Any], split: str, *, owner: str) -> list[str]:
    """Return the names of the shards of a split that is read as a stream: addresses, paths on this machine, and parts
    of rows (stream_tables.py).

    Raises MissingFileError for a path that is not there, InputError if the split has no shards.
    """
    names = []
    if not section_of(build_info, "annotations").get(split):
        raise InputError(f"{owner}: stream: build_info.annotations.{split} names no shards; leave out the key `stream`")
    for file in annotation_files(build_info, split, owner=owner):
        name = file.storage or file.url or ""
        if not is_address(name):
            name = str(resolve_storage(name))
            if not Path(name).exists():
                raise MissingFileError(f"{file.where}: shard not found: {name}. {STATUS_HINT}")
        names += part_names(name, split, where=file.where) if is_rows(name) else [name]
    if not names:
        raise InputError(f"{owner}: build_info.annotations.{split}: {name} has no rows, nor has any file before it")
    return names


def is_streamed(file: AnnotationFile) -> bool:
    """Return whether a source of a stream is an address, which needs no copy on this machine."""
    return hub.is_hub(file.storage or "") or is_address(file.storage or file.url or "")


def _matches(storage: str) -> list[str]:
    """Return the paths that match a pattern, sorted; a storage that is not a pattern, exists as it is, or matches
    nothing, itself.
    """
    path = resolve_storage(storage)
    if is_address(storage) or not glob.has_magic(storage) or path.exists():
        return [storage]
    return sorted(glob.glob(str(path), recursive=True)) or [storage]


def named_splits(build_info: Mapping[str, Any]) -> list[str]:
    """Return the splits with files of their own."""
    return [name for name, entry in section_of(build_info, "annotations").items() if entry is not None]


def num_samples(build_info: Mapping[str, Any], split: str) -> int | None:
    """Return the published number of samples of a split, if the YAML has it. InputError if it is not a whole number."""
    value = (section_of(build_info, "annotations").get(split) or {}).get("num_samples")
    if value is not None and (type(value) is not int or value < 1):
        raise InputError(f"build_info.annotations.{split}.num_samples: must be a whole number above 0, got {value!r}")
    return value


def visual_folder(build_info: Mapping[str, Any], *, owner: str) -> VisualFolder | None:
    """Return the folder of images or videos; None if the YAML names none. InputError if it names two."""
    sections = {kind: section_of(build_info, kind) for kind in VISUAL_FOLDERS}
    for kind, section in sections.items():
        check_keys(section, ("storage", "archives", "listed", "needed"), f"build_info.{kind}")
    given = {kind: section for kind, section in sections.items() if section.get("storage")}
    if len(given) > 1:
        images, videos = (given[kind]["storage"] for kind in VISUAL_FOLDERS)
        raise InputError(
            f"{owner}: build_info names two folders, images: {images} and videos: {videos}: set build_info.images or "
            "build_info.videos to null"
        )
    if not given:
        return None
    ((kind, section),) = given.items()
    archives = _sources(ImageArchive, section.get("archives"), f"build_info.{kind}.archives")
    listed = _sources(ImageList, section.get("listed"), f"build_info.{kind}.listed")
    needed = {split: _as_list(names) for split, names in (section.get("needed") or {}).items()}
    known = [one.name for one in (*archives, *listed)]
    for split, name in ((split, name) for split, names in needed.items() for name in names):
        if name not in known:
            raise InputError(f"build_info.{kind}.needed.{split}: no {name!r}. {did_you_mean(name, known)}")
    return VisualFolder(kind=kind, storage=section["storage"], archives=archives, listed=listed, needed=needed)


def split_folder(build_info: Mapping[str, Any], split: str) -> VisualFolder | None:
    """Return the folder of images or videos that a split has for itself (`annotations.<split>.images`), if any."""
    own = (section_of(build_info, "annotations").get(split) or {}).get("images")
    return VisualFolder(kind="images", storage=own) if own else None


def _sources(kind: type[Any], entries: Any, where: str) -> tuple[Any, ...]:
    """Return the archives or lists of a mapping from names to their keys."""
    if not isinstance(entries or {}, Mapping):
        raise InputError(f"{where}: expected a mapping from names to {', '.join(kind.keys)}, got {entries!r}")
    made = []
    for name, entry in (entries or {}).items():
        if entry is None:  # a base's, removed
            continue
        check_keys(entry, kind.keys, f"{where}.{name}")
        try:
            made.append(kind(name=name, **entry))
        except TypeError as error:
            raise InputError(f"{where}.{name}: {error}; its keys are {', '.join(kind.keys)}") from None
    return tuple(made)


def missing_folder(folder: VisualFolder, *, owner: str, is_packaged: bool) -> MissingFileError:
    """Return the error about a folder of images or videos that is not there."""
    fetch = f"`lavis-lite data download {owner} --images` fetches them. " if is_packaged and folder.is_published else ""
    return MissingFileError(
        f"{owner}: {folder.kind[:-1]} folder not found: {folder.path()}. {fetch}Put the {folder.kind} there, name "
        f"another folder in build_info.{folder.kind}.storage, or set the environment variable LAVIS_LITE_DATA to the "
        f"data root. {STATUS_HINT}."
    )


def section_of(build_info: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a section of `build_info`, empty if it is not there. InputError for unknown keys of `build_info`."""
    check_keys(build_info, INFO_KEYS, "build_info")
    return build_info.get(key) or {}


def check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise InputError for an unknown key, with the nearest one."""
    for key in given:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}. {did_you_mean(key, known)}")


def resolve_storage(storage: str) -> Path:
    """Return an absolute path as it is, a relative one below the data root."""
    return download.data_root() / Path(storage).expanduser()


def has_files(folder: Path) -> bool:
    """Return whether a folder is there and has an entry that is not hidden."""
    return folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())


def locate(url: str | None, storage: str | None, md5: str | None, *, where: str = "") -> Path:
    """Return the file or folder on disk: the storage if it exists, else a local `url` as it is, else fetched to the
    storage.
    """
    if storage and is_address(storage):
        raise InputError(
            f"{where}.storage: {storage} is an address, which only a stream reads (the key `stream`, for the split "
            "train): download the file, or give its address as `url`"
        )
    target = resolve_storage(storage) if storage else None
    if target is not None and (target.is_file() or target.is_dir()):
        return target
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
            "absolute path as storage, or set the environment variable LAVIS_LITE_DATA to the data root. "
            f"{STATUS_HINT}."
        )
    fetched = download.fetch(url, md5=md5)
    return fetched if target is None else _copy_aside(fetched, target)


def _copy_aside(source: Path, target: Path) -> Path:
    """Copy so that `target` is never half written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        aside = Path(folder) / target.name
        shutil.copyfile(source, aside)
        aside.replace(target)
    return target


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
