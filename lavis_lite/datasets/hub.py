"""Data sets of the Hugging Face hub, `hf://owner/name[/config][:split]`, read by the library `datasets`.

What is cached is used as it is. Else the hub is asked, unless HF_HUB_OFFLINE or LAVIS_LITE_OFFLINE is set. Importing
this does not load `datasets`.
"""

from __future__ import annotations

import contextlib
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from huggingface_hub import constants

from lavis_lite.common.errors import InputError, MissingFileError, MissingPackageError, UnreachableError
from lavis_lite.common.sources import download

if TYPE_CHECKING:
    from datasets import Dataset

SCHEME = "hf://"
_FORM = re.compile(r"hf://(?P<repo>[\w.-]+(/[\w.-]+)?)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")
PROBE_SECONDS = 10
"""Time for the hub's first answer; `datasets` alone would repeat its requests for half a minute."""


@dataclass(frozen=True, kw_only=True)
class HubSplit:
    """One split of a data set of the hub."""

    repo: str
    config: str | None
    split: str
    where: str
    """The key that names it, for messages."""

    def files(self) -> list[Path]:
        """Return the Arrow files of the split in the cache, downloaded and prepared if need be.

        Raises:
            MissingFileError: it is not in the cache, and the hub may not be asked.
            UnreachableError: it is not in the cache, and the hub does not answer or refuses.
            InputError: the data set has no such split or configuration.
        """
        with contextlib.suppress(MissingFileError):
            return self._loaded(is_offline=True)
        if constants.HF_HUB_OFFLINE or download.is_offline():
            raise MissingFileError(f"{self.where}: {self} is not in {self.cache_folder()}, and {self._how_to_fetch()}")
        self._probe()
        return self._loaded(is_offline=False)

    def is_cached(self) -> bool:
        """Return whether the split is on this machine."""
        try:
            return bool(self._loaded(is_offline=True))
        except (MissingFileError, MissingPackageError, InputError):
            return False

    def cache_folder(self) -> Path:
        """Return the folder below which `datasets` keeps what it prepared."""
        return Path(datasets_library().config.HF_DATASETS_CACHE)

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}{f'/{self.config}' if self.config else ''}:{self.split}"

    def _loaded(self, *, is_offline: bool) -> list[Path]:
        library = datasets_library()
        try:
            with offline_library() if is_offline else contextlib.nullcontext():
                found: Dataset = library.load_dataset(self.repo, self.config, split=self.split)
        except (OSError, ValueError, library.exceptions.DatasetsError) as error:
            reason = str(error).strip().partition("\n")[0]
            if f'split "{self.split}"' in str(error):
                raise InputError(f"{self.where}: {self}: {reason}") from error
            if is_offline:
                raise MissingFileError(f"{self.where}: {self}: {reason}") from error
            raise UnreachableError(f"{self.where}: {self} cannot be loaded: {reason}") from error
        return [Path(file["filename"]) for file in found.cache_files]

    def _probe(self) -> None:
        """Raise UnreachableError, at once, if the hub does not answer."""
        try:
            urllib.request.urlopen(constants.ENDPOINT, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            return  # it answers
        except OSError as error:
            problem = f"is not in {self.cache_folder()}, and {constants.ENDPOINT} cannot be reached ({error})"
            raise UnreachableError(f"{self.where}: {self} {problem}: {self._how_to_fetch()}") from error

    def _how_to_fetch(self) -> str:
        config = f", {self.config!r}" if self.config else ""
        call = f"datasets.load_dataset({self.repo!r}{config}, split={self.split!r})"
        switch = "unset HF_HUB_OFFLINE and LAVIS_LITE_OFFLINE, or run" if constants.HF_HUB_OFFLINE else "run"
        return (
            f"nothing may be downloaded now: {switch} `{call}` on a machine with a network and copy its cache "
            "(HF_DATASETS_CACHE) here"
        )


def is_hub(storage: str) -> bool:
    """Return whether a storage is an address of the hub."""
    return storage.startswith(SCHEME)


def parse(storage: str, split: str, *, where: str) -> HubSplit:
    """Return what `hf://owner/name[/config][:split]` names; without a split that of our name."""
    match = _FORM.fullmatch(storage)
    if match is None:
        raise InputError(f"{where}: expected hf://owner/name, hf://owner/name:split or with /config, got {storage!r}")
    return HubSplit(repo=match["repo"], config=match["config"], split=match["split"] or split, where=where)


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
def offline_library() -> Iterator[None]:
    """Let `datasets` use its cache only inside."""
    library = datasets_library()
    before = constants.HF_HUB_OFFLINE, library.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = library.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, library.config.HF_HUB_OFFLINE = before
