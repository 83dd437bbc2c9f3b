"""Damaged weight files: each is refused as damaged, or holds what was written; none is loaded with other values."""

import random
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lavis_lite.common import checkpoint, integrity
from lavis_lite.common.errors import DamagedFileError, InputError

CASES = 500  # per kind of file


@pytest.fixture(scope="module")
def training_state() -> dict[str, Any]:
    """A checkpoint as a run writes it, of a tiny model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": 3,
        "config": {"model": {"arch": "x"}},
    }


def write(folder: Path, name: str, state: dict[str, Any]) -> Path:
    """The state as a .pth file, or its weights as a .safetensors file with a checksum beside it."""
    path = folder / name
    if path.suffix == ".pth":
        return checkpoint.save(state, path)
    save_file(state["model"], path)
    integrity.write_sums(folder)
    return path


def is_same(first: Any, second: Any) -> bool:
    """Equal in types, keys, values, and bit for bit in tensors."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(is_same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(is_same, first, second))
    return first == second


def damaged(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """What can happen to a file: bits flip, its end is lost, a block is zeros, something is appended."""
    kind, changed = rng.choice(["flip", "flips", "cut", "zeros", "append"]), bytearray(data)
    if kind in ("flip", "flips"):
        for _ in range(1 if kind == "flip" else 20):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[rng.randrange(len(data)) :]
    elif kind == "zeros":
        start, size = rng.randrange(len(data)), rng.choice([1, 16, 512, 4096])
        changed[start : start + size] = bytes(len(changed[start : start + size]))
    else:
        changed += rng.randbytes(rng.choice([1, 100, 70_000]))
    return kind, bytes(changed)


@pytest.mark.parametrize("name", ["c.pth", "c.safetensors"])
def test_a_damaged_file_is_refused_or_holds_the_same(name: str, training_state: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, name, training_state)
    data, expected, rng = path.read_bytes(), checkpoint.load(path), random.Random(0)
    refused: list[str] = []
    for case in range(CASES):
        kind, changed = damaged(data, rng)
        path.write_bytes(changed)
        try:
            found = checkpoint.load(path)
        except InputError as error:
            refused.append(str(error))
        else:
            assert is_same(found, expected), (case, kind)
            assert kind != "cut" or changed == data, case
    assert len(refused) > CASES / 2
    assert [text for text in refused if "damaged" not in text and "truncated" not in text] == []


def entry_at(path: Path, offset: int) -> str:
    """The entry of a zip file whose content is at `offset`, from the archive's own directory."""
    with zipfile.ZipFile(path) as archive:
        return max((e for e in archive.infolist() if e.header_offset <= offset), key=lambda e: e.header_offset).filename


@pytest.mark.parametrize("needle", [b"exp_avg", b"_rebuild_tensor_v2", b"\x88\x77\x66\x55\x44\x33\x22\x11", b"config"])
def test_one_flipped_bit_is_damage_and_names_its_entry(needle: bytes, training_state: Any, tmp_path: Path) -> None:
    """In a name of the pickle it was taken for code, or ended as a KeyError; in a tensor it was not noticed."""
    state = {**training_state, "tensor": torch.tensor([0x1122334455667788])}
    path = write(tmp_path, "c.pth", state)
    data = bytearray(path.read_bytes())
    offset = data.index(needle)
    entry = entry_at(path, offset)
    data[offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match=rf"c\.pth .*{entry}"):
        checkpoint.load(path)


def test_a_zeroed_head_is_damage(training_state: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, "c.pth", training_state)
    data = path.read_bytes()
    path.write_bytes(bytes(512) + data[512:])
    with pytest.raises(DamagedFileError, match=r"c\.pth"):
        checkpoint.load(path)


def test_files_without_checksums_are_loaded_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    weights = {"a": torch.arange(3.0)}
    torch.save(weights, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, tmp_path / "zeros.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    for name in ("legacy.pth", "zeros.pth"):
        assert torch.equal(checkpoint.load(tmp_path / name)["a"], weights["a"])
        assert f"{name} holds no checksums" in caplog.text


@pytest.mark.slow
def test_a_written_folder_has_checksums(tmp_path: Path) -> None:
    from lavis_lite.common.sources.weights import open_state
    from lavis_lite.convert.folders import write_folder
    from lavis_lite.models import load_model

    folder = write_folder(load_model("blip_caption", "tiny"), tmp_path / "hf", arch="blip_caption")
    assert subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True).returncode == 0
    assert len(open_state(folder)) > 0
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 4
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(DamagedFileError, match=r"model\.safetensors .*SHA256SUMS"):
        open_state(folder)
