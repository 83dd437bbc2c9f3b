"""Weights of any source as a lazy mapping: `open_state` is the only function of the package that opens them.

Note: tensors are read on access and not kept, so that loading a model takes the model's memory only. Pages that are
read through a memory map count as the process's until the map is closed. The map is therefore renewed after every
64 MiB, and only one file is open at a time. Of a sharded checkpoint all weights are read at once. Language models are
read by transformers (`hub.from_hub`).
"""

from collections import UserDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lavis_lite.common import checkpoint, checkpoint_parts
from lavis_lite.common.sources import download, folders, hub

TIMM = "timm:"
"""Prefix of the name of a timm model, whose published weights are then the source."""
WINDOW = 2**26
"""Bytes read through one memory map before it is renewed."""

Reader = Callable[[], Tensor]


def open_state(source: str | Path) -> "LazyState":
    """Return the weights at `source`: a file (.pth, .bin, .safetensors) or its URL, a Hugging Face folder or hub id, or
    a timm model (`timm:vit_base_patch16_224`).

    Raises:
        FileNotFoundError: the source or one of its files is missing, or it is not on this machine and
            LAVIS_LITE_OFFLINE is set.
        ConnectionError: it cannot be downloaded.
        ValueError: a file is damaged or holds no weights, or timm has no such model.
    """
    name = str(source)
    if name.startswith(TIMM):
        return LazyState.of(hub.timm_model(name.removeprefix(TIMM)).state_dict())
    is_folder = download.is_folder(source)
    paths = folders.weight_files(download.fetch_folder(source)) if is_folder else [download.fetch(source)]
    files = _OneOpenFile(name)
    readers = {key: partial(files.read, path, key) for path in paths for key in files.open(path)}
    files.close()
    if files.is_sharded:
        saved = checkpoint_parts.read(checkpoint.load(paths[0], verify=False), paths[0], sections=("model",))
        return LazyState.of(checkpoint.find_state_dict(saved, source=name))
    return LazyState(readers)


class LazyState(UserDict[str, Any]):
    """A state dict that calls the reader of a tensor on each access. Renaming, dropping and deriving tensors
    (`readers`) reads nothing.
    """

    def __init__(self, readers: Mapping[str, Reader]) -> None:
        self.data = self.readers = dict(readers)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "LazyState":
        """Wrap a mapping of tensors; its names, but not its tensors, are copied."""
        if isinstance(state, LazyState):
            return cls(state.readers)
        return cls({name: partial(state.__getitem__, name) for name in state})

    def renamed(self, rename: Callable[[str], str | None]) -> "LazyState":
        """Return the same tensors under other names, without those that `rename` maps to None."""
        return LazyState({new: read for name, read in self.readers.items() if (new := rename(name)) is not None})

    def adapted(self, adapt: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> "LazyState":
        """Return the result of a function of all tensors; those that it only renames stay lazy."""
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


class _OneOpenFile:
    """Reads tensors of several files, of which one is open at a time."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.is_sharded = False
        """Whether the file opened last is that of a sharded checkpoint, whose tensors have no values."""
        self._path: Path | None = None
        self._tensors: Mapping[str, Tensor] = {}
        self._left = 0

    def open(self, path: Path, *, verify: bool = True) -> Mapping[str, Tensor]:
        """Close the file opened before, and return this file's tensors, memory-mapped."""
        self.close()
        saved = checkpoint.load(path, verify=verify)
        self.is_sharded = checkpoint_parts.is_sharded(saved)
        self._tensors = checkpoint.find_state_dict(saved, source=self.source)
        self._path, self._left = path, WINDOW
        return self._tensors

    def read(self, path: Path, name: str) -> Tensor:
        """Return one tensor, a view of the memory map."""
        if path != self._path or (self._left <= 0 and checkpoint.is_mappable(path)):
            self.open(path, verify=False)  # `open_state` verified it
        tensor = self._tensors[name]
        self._left -= tensor.nbytes
        return tensor

    def close(self) -> None:
        self._path, self._tensors = None, {}
