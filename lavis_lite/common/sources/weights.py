"""Weights wherever they lie: a .pth or .safetensors file, a URL, a Hugging Face folder or hub id, as a lazy mapping.

Surprising: nothing is read before it is asked for, and nothing is kept, so that loading a model takes the model's
memory and not its weights' a second time. Pages read through a memory map count as ours until the map is closed; it is
therefore renewed after every 64 MiB, and only one file is open at a time.
"""

import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path

from torch import Tensor

from lavis_lite.common import checkpoint
from lavis_lite.common.errors import InputError, MissingFileError
from lavis_lite.common.sources import download

WINDOW = 2**26
"""Bytes read through one memory map before it is renewed."""

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What a Hugging Face folder may hold its weights in, best first."""
EXTRA_FILE = "lavis_lite.safetensors"
"""Tensors that transformers' classes have no place for, under LAVIS's names, in a folder that we wrote."""

Reader = Callable[[], Tensor]


class LazyState(MutableMapping[str, Tensor]):
    """A state dict whose tensors are read when asked for and not kept. Renaming, dropping and deriving tensors
    (`readers`) reads nothing either.
    """

    def __init__(self, readers: Mapping[str, Reader]) -> None:
        self.readers = dict(readers)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "LazyState":
        """A mapping of tensors as such a state; its names, but not its tensors, are copied."""
        return cls(state.readers if isinstance(state, LazyState) else {name: _reader(state, name) for name in state})

    def renamed(self, rename: Callable[[str], str | None]) -> "LazyState":
        """The same tensors under other names, without those that get none."""
        return LazyState({new: read for name, read in self.readers.items() if (new := rename(name)) is not None})

    def adapted(self, adapt: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> "LazyState":
        """What a function makes of the tensors; those that it only renames are read again when asked for."""
        tensors = dict(self.items())
        names = {id(tensor): name for name, tensor in tensors.items()}
        result = LazyState.of({})
        for name, tensor in adapt(tensors).items():
            if id(tensor) in names:
                result.readers[name] = self.readers[names[id(tensor)]]
            else:
                result[name] = tensor
        return result

    def __getitem__(self, name: str) -> Tensor:
        return self.readers[name]()

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.readers[name] = lambda: tensor

    def __delitem__(self, name: str) -> None:
        del self.readers[name]

    def __contains__(self, name: object) -> bool:
        return name in self.readers

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


def open_state(source: str | Path) -> LazyState:
    """The weights at `source`: a file (.pth, .bin, .safetensors) or its URL, a Hugging Face folder or hub id.

    Raises:
        FileNotFoundError: there is nothing at `source`, or a folder lacks a weight file.
        ConnectionError: it cannot be downloaded.
        ValueError: a file is damaged or holds no weights.
    """
    if download.is_folder(source):
        return _folder_state(download.fetch_folder(source))
    return _files_state([download.fetch(source)], source=str(source))


def _reader(state: Mapping[str, Tensor], name: str) -> Reader:
    return lambda: state[name]


class _Files:
    """Tensors of some files, of which one is open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._tensors: dict[str, Tensor] = {}
        self._left = 0

    def open(self, path: Path, *, source: str, verify: bool = True) -> dict[str, Tensor]:
        """The file's tensors, memory-mapped; the file opened before is closed."""
        self._path, self._tensors = None, {}
        self._tensors = checkpoint.find_state_dict(checkpoint.load(path, verify=verify), source=source)
        self._path, self._left = path, WINDOW
        return self._tensors

    def read(self, path: Path, name: str, *, source: str) -> Tensor:
        """One tensor, a view of the memory map."""
        if path != self._path or (self._left <= 0 and checkpoint.is_mappable(path)):
            self.open(path, source=source, verify=False)  # `_files_state` opened it before
        tensor = self._tensors[name]
        self._left -= tensor.nbytes
        return tensor

    def close(self) -> None:
        self._path, self._tensors = None, {}


def _files_state(paths: list[Path], *, source: str) -> LazyState:
    files = _Files()
    readers: dict[str, Reader] = {}
    for path in paths:
        for name in files.open(path, source=source):
            readers[name] = lambda path=path, name=name: files.read(path, name, source=source)
    files.close()
    return LazyState(readers)


def _folder_state(folder: Path) -> LazyState:
    """All shards of a Hugging Face folder's weights, and what we stored beside them."""
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise MissingFileError(f"{folder} holds no {' or '.join(WEIGHT_FILES)}; it holds {there}")
    paths = shards(found) if found.suffix == ".json" else [found]
    if (folder / EXTRA_FILE).is_file():
        paths.append(folder / EXTRA_FILE)
    return _files_state(paths, source=str(folder))


def shards(index: Path) -> list[Path]:
    """The files that an index names, in their order. ValueError for a damaged index or one that names a file of
    another folder, FileNotFoundError for a shard that is not there.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{index} is not an index of weight files ({type(error).__name__}: {error})") from error
    outside = [name for name in names if not isinstance(name, str) or name != Path(name).name or name == ".."]
    if outside:
        raise InputError(f"{index} names {outside[0]!r}, which is not a plain file name: its files lie beside it")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise MissingFileError(
            f"{index.parent} lacks {len(missing)} of the {len(names)} weight files that {index.name} names: "
            f"{', '.join(missing[:3])}. Download them again"
        )
    return [index.parent / name for name in names]
