"""Data sets of the Hugging Face hub, `hf://owner/name[@revision][/config][:split]`, read by the library `datasets`.

What is cached is used as it is. Else the hub is asked, unless HF_HUB_OFFLINE or LAVIS_LITE_OFFLINE is set. Importing
this does not load `datasets`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from huggingface_hub import constants

from lavis_lite.common.errors import InputError, MissingFileError, MissingPackageError, UnreachableError
from lavis_lite.common.sources import download, reach

if TYPE_CHECKING:
    from datasets import Dataset

SCHEME = "hf://"
_FORM = re.compile(
    r"hf://(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w.%-]+))?(/(?P<config>[\w.-]+))?"
    r"(:(?P<split>[\w.-]+(\[[\d%-]*:[\d%-]*\])?))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class HubSplit:
    """One split of a data set of the hub."""

    repo: str
    config: str | None
    split: str
    """Its name, and maybe a slice: `train[:10%]`."""
    revision: str | None = None
    """A branch, tag or commit; None: the newest, or what is cached."""
    where: str
    """The key that names it, for messages."""

    def files(self) -> list[Path]:
        """Return the Arrow files of the split in the cache, downloaded and prepared if need be.

        Raises:
            MissingFileError: it is not in the cache, and the hub may not be asked.
            UnreachableError: it is not in the cache, and the hub does not answer or refuses.
            InputError: the data set has no such split or configuration.
        """
        try:
            return self._files(self._loaded(is_offline=True))
        except MissingFileError as error:
            if problem := reach.hub_problem():
                kind = UnreachableError if reach.may_ask() else MissingFileError
                text = f"{error}; it is not in {self.cache_folder()}, and {problem}: {self._how_to_fetch()}"
                raise kind(text) from error
        return self._files(self._loaded(is_offline=False))

    def is_cached(self) -> bool:
        """Return whether the split is on this machine."""
        try:
            return bool(self._loaded(is_offline=True))
        except (MissingFileError, MissingPackageError, InputError):
            return False

    def cache_folder(self) -> Path:
        """Return the folder below which `datasets` keeps what it prepared."""
        try:
            return Path(datasets_library().config.HF_DATASETS_CACHE)
        except MissingPackageError:  # where it will be
            return Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets"))

    def __str__(self) -> str:
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"{SCHEME}{self.repo}{revision}{f'/{self.config}' if self.config else ''}:{self.split}"

    def _loaded(self, *, is_offline: bool) -> Dataset:
        library = datasets_library()
        try:
            with bars_on_a_terminal(), offline_library() if is_offline else contextlib.nullcontext():
                found: Dataset = library.load_dataset(self.repo, self.config, split=self.split, revision=self.revision)
        except (OSError, ValueError, library.exceptions.DatasetsError) as error:
            reason = str(error).strip().partition("\n")[0]
            if f'split "{self.split}"' in str(error):
                raise InputError(f"{self.where}: {self}: {reason}") from error
            if is_offline:
                raise MissingFileError(f"{self.where}: {self}: {reason}") from error
            raise UnreachableError(f"{self.where}: {self} cannot be loaded: {reason}") from error
        file = Path(found.cache_files[0]["filename"])
        if is_offline and self.revision and self._commit() not in file.parts:  # the cache is not asked for one
            problem = f"the cache has another revision than {self.revision}, or does not say which"
            raise MissingFileError(f"{self.where}: {self}: {problem}")
        return found

    def _files(self, found: Dataset) -> list[Path]:
        files = [Path(file["filename"]) for file in found.cache_files]
        return [self._sliced(found, files)] if "[" in self.split else files

    def _commit(self) -> str | None:
        """Return the commit that the revision stands for, as the cache of the hub noted it; None if it did not."""
        if self.revision and _COMMIT.fullmatch(self.revision):
            return self.revision
        owner = f"datasets--{self.repo.replace('/', '--')}"
        note = Path(constants.HF_HUB_CACHE, owner, "refs", str(self.revision))
        return note.read_text(encoding="utf-8").strip() if note.is_file() else None

    def _sliced(self, found: Dataset, files: Sequence[Path]) -> Path:
        """Return a folder with the rows of a slice, which are copied once, below our cache."""
        parts = [str(self), *(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)]
        name = hashlib.blake2b("|".join(parts).encode(), digest_size=8).hexdigest()
        folder = download.cache_dir() / "tables" / f"slice-{name}"
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".slice-") as aside:
                with bars_on_a_terminal():
                    found.save_to_disk(Path(aside, "rows"))
                with contextlib.suppress(OSError):  # another process was faster
                    Path(aside, "rows").rename(folder)
        return folder

    def _how_to_fetch(self) -> str:
        config = f", {self.config!r}" if self.config else ""
        revision = f", revision={self.revision!r}" if self.revision else ""
        call = f"datasets.load_dataset({self.repo!r}{config}, split={self.split!r}{revision})"
        switch = "unset HF_HUB_OFFLINE and LAVIS_LITE_OFFLINE, or run" if constants.HF_HUB_OFFLINE else "run"
        return (
            f"nothing may be downloaded now: {switch} `{call}` on a machine with a network and copy its cache "
            "(HF_DATASETS_CACHE) here"
        )


def is_hub(storage: str) -> bool:
    """Return whether a storage is an address of the hub."""
    return storage.startswith(SCHEME)


def parse(storage: str, split: str, *, where: str) -> HubSplit:
    """Return what `hf://owner/name[@revision][/config][:split]` names; without a split that of our name."""
    match = _FORM.fullmatch(storage)
    if match is None:
        form = "hf://owner/name, maybe followed by @revision, /config and :split or :split[:10%]"
        raise InputError(f"{where}: expected {form}, got {storage!r}")
    revision = match["revision"] and unquote(match["revision"])
    return HubSplit(
        repo=match["repo"], config=match["config"], split=match["split"] or split, revision=revision, where=where
    )


def datasets_library() -> ModuleType:
    """Return the package `datasets`. MissingPackageError if it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError(
            "reading parquet, Arrow and the hub's data sets needs `datasets`: `pip install lavis-lite[data]`"
        ) from error
    return datasets


@contextlib.contextmanager
def bars_on_a_terminal() -> Iterator[None]:
    """Let `datasets` show progress bars inside only where stderr is a terminal: a log file would hold every step."""
    library = datasets_library()
    is_shown = not library.are_progress_bars_disabled()
    if is_shown and not sys.stderr.isatty():
        library.disable_progress_bars()
    try:
        yield
    finally:
        if is_shown:
            library.enable_progress_bars()


@contextlib.contextmanager
def offline_library() -> Iterator[None]:
    """Let `datasets` use its cache only inside."""
    library = datasets_library()
    before = constants.HF_HUB_OFFLINE, library.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = library.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, library.config.HF_HUB_OFFLINE = before
