"""A full disk while a Hugging Face folder is written: one line that names the folder, and nothing half-written.

The three libraries that write it have an error each; the words are those that a tmpfs without room gave.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tokenizers
import transformers
from safetensors import SafetensorError

from lavis_lite.common import integrity
from lavis_lite.convert.__main__ import main

WORDS = "No space left on device (os error 28)"


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*arguments: Any, **settings: Any) -> Any:
        raise error

    return fail


def half_written(*arguments: Any, **settings: Any) -> None:
    """What safetensors leaves of a file, and its error."""
    folder = Path(arguments[1] if len(arguments) > 1 else settings["filename"])
    folder.write_bytes(b"begun")
    raise SafetensorError(f"Error while serializing: I/O error: {WORDS}")


CASES = {
    "weights": (transformers.modeling_utils, "safe_save_file", half_written),
    "tokenizer": (tokenizers.Tokenizer, "save", failing(Exception(WORDS))),
    "other tensors": (safetensors.torch, "save_file", half_written),
    "checksums": (integrity, "write_sums", failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))),
    "quota": (integrity, "write_sums", failing(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)))),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("is_there", [False, True])
def test_a_full_disk_leaves_nothing(
    case: str, is_there: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "new" / "folders" / "hf"
    if is_there:
        target.mkdir(parents=True)
        (target / "old").touch()
    owner, name, fail = CASES[case]
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(SystemExit) as ended:
        main(["to-hf", "blip_retrieval", "tiny", str(target), "--overwrite"])
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"cannot write the folder {target}: the disk is full" in line
    assert f"MiB free in {tmp_path}" in line
    assert ("unchanged" in line) == is_there
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == (["new", "new/folders", "new/folders/hf", "new/folders/hf/old"] if is_there else [])


def test_another_error_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "write_sums", failing(ZeroDivisionError("own")))
    with pytest.raises(ZeroDivisionError, match="own"):
        main(["to-hf", "blip_caption", "tiny", str(tmp_path / "new" / "hf")])
    assert list(tmp_path.iterdir()) == []
