"""Atomic writing, safe reading, reported loading, and activation checkpointing with the same gradients."""

import copy
import errno
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lavis_lite.common import checkpoint
from lavis_lite.nn.activation_checkpointing import checkpoint_blocks


class Evil:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("echo run by a checkpoint",)


def weights() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_round_trip(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "sub" / "c.pth"
    path.parent.mkdir()
    torch.save({"model": weights(), "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    loaded = checkpoint.load(path)
    assert loaded["epoch"] == 3
    torch.testing.assert_close(checkpoint.find_state_dict(loaded), weights(), rtol=0, atol=0)


def test_save_makes_folders_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = checkpoint.save(weights(), tmp_path / "new" / "c.pth")
    assert [entry.name for entry in path.parent.iterdir()] == ["c.pth"]
    torch.testing.assert_close(torch.load(path, weights_only=True), weights(), rtol=0, atol=0)


def test_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(weights(), tmp_path / "c.safetensors")
    torch.testing.assert_close(checkpoint.find_state_dict(checkpoint.load(tmp_path / "c.safetensors")), weights())
    cut = (tmp_path / "c.safetensors").read_bytes()[:-3]
    (tmp_path / "cut.safetensors").write_bytes(cut)
    with pytest.raises(ValueError, match=r"cut\.safetensors.*bytes"):
        checkpoint.load(tmp_path / "cut.safetensors")


class FullDisk:
    """Stands for a file on a full disk: some bytes fit, then ENOSPC."""

    def __init__(self, file: Any, *, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


@pytest.mark.parametrize("room", [0, 100, 5000])
def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    path = checkpoint.save({"model": weights()}, tmp_path / "checkpoint_last.pth")
    before = path.read_bytes()
    real_open = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *args, **kwargs: FullDisk(real_open(self, *args, **kwargs), room=room)
    )
    with pytest.raises(OSError, match="checkpoint_last") as caught:
        checkpoint.save({"model": {"a": torch.zeros(2**18)}}, path)
    assert caught.value.errno == errno.ENOSPC
    for part in (str(path), "MiB free", "run.output_dir"):
        assert part in str(caught.value)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_folder_in_the_way_is_to_be_moved(tmp_path: Path) -> None:
    (tmp_path / "result.json").mkdir()
    with pytest.raises(OSError, match=r"cannot write .*result\.json: .*Move this folder elsewhere$"):
        checkpoint.write_text(tmp_path / "result.json", "new")


def test_failed_rename_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint.write_text(tmp_path / "config.yaml", "old")

    def fail(*args: object) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=r"config\.yaml.*I/O error"):
        checkpoint.write_text(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_other_errors_while_writing_pass(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        checkpoint.save({"f": lambda: None}, tmp_path / "c.pth")
    assert list(tmp_path.iterdir()) == []


def test_missing_file_names_neighbours(tmp_path: Path) -> None:
    checkpoint.save(weights(), tmp_path / "checkpoint_best.pth")
    with pytest.raises(FileNotFoundError, match=r"checkpoint_bset\.pth.*checkpoint_best\.pth"):
        checkpoint.load(tmp_path / "checkpoint_bset.pth")
    with pytest.raises(FileNotFoundError, match=r"no/c\.pth"):
        checkpoint.load(tmp_path / "no" / "c.pth")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.95])
def test_truncated_file(tmp_path: Path, zipped: bool, keep: float) -> None:
    torch.save(weights(), tmp_path / "full.pth", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "full.pth").read_bytes()
    size = keep if keep in (0, 3) else int(len(data) * keep)
    (tmp_path / "cut.pth").write_bytes(data[:size])
    with pytest.raises(ValueError, match=rf"cut\.pth \({size:,} bytes\)"):
        checkpoint.load(tmp_path / "cut.pth")


def test_web_page_is_refused_as_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "c.pth").write_text("<html>404 Not Found</html>")
    with pytest.raises(ValueError, match=r"c\.pth") as error:
        checkpoint.load(tmp_path / "c.pth")
    assert "weights_only" not in str(error.value)  # torch's advice is to run what the file says


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle2", "pickle5"])
def test_code_is_refused_and_named(tmp_path: Path, how: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.pth"
    if how.startswith("pickle"):
        path.write_bytes(pickle.dumps({"model": Evil()}, protocol=int(how[-1])))
    else:
        torch.save({"model": Evil()}, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ValueError, match=r"evil\.pth.*system") as caught:
        checkpoint.load(path)
    assert "weights_only=False" in str(caught.value)
    assert "run by a checkpoint" not in capfd.readouterr().out


def test_find_state_dict() -> None:
    for obj in (weights(), {"model": weights(), "epoch": 1}, {"state_dict": weights()}):
        assert checkpoint.find_state_dict(obj).keys() == {"a", "b"}
    assert checkpoint.find_state_dict({"module.a": torch.zeros(1)}).keys() == {"a"}
    with pytest.raises(ValueError, match="optimizer"):
        checkpoint.find_state_dict({"optimizer": {}, "epoch": 1})


class Tied(nn.Module):
    """A trainable layer, a head tied to it, a frozen layer, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 2, bias=False)
        self.head = nn.Linear(3, 2, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(2))


def test_load_into_reports_and_copies(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = Tied()
    value = torch.full((2, 3), 7.0)
    report = checkpoint.load_into(model, {"head.weight": value, "other": torch.zeros(1)}, source="x.pth")
    assert report == (["queue", "frozen.weight", "frozen.bias"], ["other"])
    assert torch.equal(model.embed.weight, value)
    for part in ("x.pth", "frozen.bias", "queue", "other"):
        assert part in caplog.text


def test_load_into_refuses_missing_trainable_keys() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    before = copy.deepcopy(model.state_dict())
    state = {"a.weight": torch.zeros(2, 2), "a.bias": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"x\.pth.* 2 .*b\.weight, b\.bias"):
        checkpoint.load_into(model, state, source="x.pth")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    report = checkpoint.load_into(model, state, source="x.pth", allow_missing=lambda key: key.startswith("b."))
    assert report.missing == ["b.weight", "b.bias"]
    with pytest.raises(ValueError, match=r"x\.pth.* 1 .*b\.bias"):
        checkpoint.load_into(model, state, source="x.pth", allow_missing=lambda key: key.endswith("weight"))


def test_load_into_refuses_shapes_and_architectures() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"weight \(3, 2\).*\(2, 2\)"):
        checkpoint.load_into(model, {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, source="x.pth")
    with pytest.raises(ValueError, match=r"x\.pth .*conv1.*weight"):
        checkpoint.load_into(model, {"conv1": torch.zeros(3)}, source="x.pth")


class Block(nn.Module):
    """A block with dropout, a keyword argument and a tuple as output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> tuple[torch.Tensor, torch.dtype]:
        hidden = self.linear(x)
        return x + self.dropout(torch.tanh(hidden)) * scale, hidden.dtype


@pytest.mark.parametrize("enabled", [False, True], ids=["fp32", "bf16"])
def test_checkpointed_blocks_have_the_same_gradients(enabled: bool) -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(3))
    twins = copy.deepcopy(blocks)
    checkpoint_blocks(twins[1:])
    assert list(twins.state_dict()) == list(blocks.state_dict())
    inputs = torch.randn(5, 4)
    grads, outputs = [], []
    for stack in (blocks, twins):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled):
            hidden = inputs
            for block in stack:
                hidden, dtype = block(hidden, scale=0.5)
        assert dtype == (torch.bfloat16 if enabled else torch.float32)
        hidden.square().sum().backward()
        outputs.append(hidden.detach())
        grads.append([parameter.grad for parameter in stack.parameters()])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_checkpointed_blocks_recompute() -> None:
    calls = []
    block = Block()
    block.linear.register_forward_hook(lambda *args: calls.append(1))
    checkpoint_blocks([block])
    block(torch.randn(2, 4))[0].sum().backward()
    assert len(calls) == 2
