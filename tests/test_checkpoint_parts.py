"""Checkpoints in parts, in one process; tests/test_sharding.py has those of two."""

import errno
import traceback
from pathlib import Path

import cli_helpers
import pytest
import torch
from torch.distributed import checkpoint as dcp

from lavis_lite.common import checkpoint, checkpoint_parts, dist
from lavis_lite.common.errors import DamagedFileError, WriteError

WEIGHT = torch.arange(6.0).reshape(2, 3)
SAVED = {
    "model": {"a": WEIGHT, "tied": WEIGHT, "turned": WEIGHT.t(), "low": WEIGHT.bfloat16(), "none": torch.empty(0, 3)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": WEIGHT + 1}}, "param_groups": [{"params": [0]}]},
    "ranks": [{"rng": torch.arange(3)}],
    "step": 3,
}


def test_a_checkpoint_comes_back_from_its_parts(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    checkpoint.save(checkpoint_parts.write(SAVED, tmp_path / "own.parts", None), path)
    saved = checkpoint.load(path)
    assert saved["model"]["a"].is_meta
    assert saved["ranks"][0]["rng"].tolist() == [0, 1, 2]
    back = checkpoint_parts.read(saved, path)
    cli_helpers.assert_same_state(back, SAVED)
    assert {key: value.dtype for key, value in back["model"].items()}["low"] == torch.bfloat16
    assert back["model"]["tied"] is back["model"]["a"]
    weights = checkpoint_parts.read(saved, path, sections=("model",))
    cli_helpers.assert_same_state(weights["model"], SAVED["model"])
    assert weights["optimizer"]["state"][0]["exp_avg"].is_meta
    assert checkpoint_parts.read(back, path) is back


def test_parts_that_cannot_be_written_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"rank 0 cannot write its part of .*own.parts"):
        checkpoint_parts.write(SAVED, tmp_path / "file" / "own.parts", None)
    monkeypatch.setattr(dist, "gather_objects", lambda items, group: [*items, {"elsewhere.safetensors": ""}])
    with pytest.raises(WriteError, match=r"elsewhere.safetensors .* run.output_dir"):
        checkpoint_parts.write(SAVED, tmp_path / "own.parts", None)


@pytest.mark.parametrize(
    ("cause", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "No space left"), WriteError, "the disk is full"),
        (ValueError("I/O error: No space left on device (os error 28)"), WriteError, "the disk is full"),
        (ValueError("a shape of 3"), RuntimeError, "a shape of 3"),
    ],
)
def test_a_full_disk_is_named_whichever_library_finds_it(
    cause: Exception, kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*arguments: object, **settings: object) -> None:
        raise dcp.CheckpointException("save", {0: (cause, traceback.StackSummary.from_list([]))})

    monkeypatch.setattr(dcp, "save", save)
    with pytest.raises(kind, match=f"rank 0 cannot write its part of .*{message}"):
        checkpoint_parts.write(SAVED, tmp_path / "own.parts", None)


@pytest.mark.parametrize("folder", ["../other.parts", "..", None])
def test_an_entry_that_names_no_folder_beside_the_file_is_refused(folder: str | None) -> None:
    with pytest.raises(DamagedFileError, match="a folder beside it"):
        checkpoint_parts.is_sharded({"parts": {"folder": folder, "files": {}, "tied": {}}})
