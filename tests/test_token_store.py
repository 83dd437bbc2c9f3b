"""The files of stored tokens: what several processes write, what a killed one leaves, damaged files, a full disk."""

import errno
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lavis_lite.common import token_store
from lavis_lite.common.errors import WriteError
from lavis_lite.common.token_store import ENTRY, INDEX, ROWS, TokenStore, image_digests

ROW = 24


def digest(number: int) -> bytes:
    """The digest of an image of its own."""
    return image_digests(torch.full((1, 3, 2, 2), float(number)))[0]


def row(number: int) -> np.ndarray:
    """The row of that image."""
    return np.random.default_rng(number).integers(0, 256, ROW, dtype=np.uint8)


def opened(folder: Path) -> TokenStore:
    return TokenStore(folder, row_bytes=ROW)


def add(store: TokenStore, *numbers: int) -> None:
    store.add([digest(number) for number in numbers], np.stack([row(number) for number in numbers]))


def found(store: TokenStore, *numbers: int) -> list[int]:
    """The numbers whose rows are there, each of which must be right."""
    rows = np.zeros((len(numbers), ROW), np.uint8)
    there = store.read([digest(number) for number in numbers], rows)
    for number, is_there, one in zip(numbers, there, rows, strict=True):
        assert not is_there or one.tolist() == row(number).tolist()
    return [number for number, is_there in zip(numbers, there, strict=True) if is_there]


def only(folder: Path, suffix: str) -> Path:
    (path,) = folder.glob(f"*{suffix}")
    return path


def test_digests_are_of_values_and_their_order() -> None:
    images = torch.arange(24.0).view(2, 3, 2, 2)
    first, second = image_digests(images)
    assert len({first, second}) == 2
    assert image_digests(images.flip(0)) == [second, first]
    assert image_digests(images[:1].transpose(2, 3).transpose(2, 3)) == [first]
    assert image_digests(images[:1].transpose(2, 3)) != [first]


def test_rows_are_found_by_every_process_that_has_the_folder_open(tmp_path: Path) -> None:
    one, other = opened(tmp_path / "new"), opened(tmp_path / "new")
    assert found(one, 1) == []
    add(one, 1, 2)
    add(other, 3)
    add(one, 4)
    for store in (one, other, opened(tmp_path / "new")):
        assert found(store, 4, 9, 3, 2, 1) == [4, 3, 2, 1]
        assert store.has_all([digest(1), digest(3)])
        assert not store.has_all([digest(1), digest(9)])
        assert len(store) == 4


def test_digests_with_the_same_first_half_are_told_apart(tmp_path: Path) -> None:
    store, pair = opened(tmp_path), [bytes(16), bytes(8) + bytes(range(8))]
    store.add(pair, np.stack([row(1), row(2)]))
    rows = np.zeros((2, ROW), np.uint8)
    assert store.read(pair[::-1], rows) == [True, True]
    assert rows.tolist() == [row(2).tolist(), row(1).tolist()]


def test_a_full_pair_of_files_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "MAX_FILE", 2 * ROW)
    store = opened(tmp_path)
    for number in range(5):
        add(store, number)
    assert sorted(path.stat().st_size // ROW for path in tmp_path.glob(f"*{ROWS}")) == [1, 2, 2]
    assert found(opened(tmp_path), *range(5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("cut", [1, ROW - 1, ROW, 2 * ROW + 5])
def test_rows_that_were_cut_off_are_missing(cut: int, tmp_path: Path) -> None:
    add(store := opened(tmp_path), 0, 1, 2)
    path = only(tmp_path, ROWS)
    os.truncate(path, path.stat().st_size - cut)
    left = [number for number in range(3) if (number + 1) * ROW <= 3 * ROW - cut]
    for one in (store, opened(tmp_path)):  # also for the process that wrote them
        assert found(one, 0, 1, 2) == left


def test_an_entry_that_was_cut_off_is_missing_and_its_row_is_not_read(tmp_path: Path) -> None:
    add(opened(tmp_path), 0, 1)
    os.truncate(only(tmp_path, INDEX), 2 * ENTRY.itemsize - 3)
    assert found(opened(tmp_path), 0, 1) == [0]


@pytest.mark.parametrize("suffix", [ROWS, INDEX])
def test_what_was_damaged_is_missing_until_it_is_added_again(suffix: str, tmp_path: Path) -> None:
    add(opened(tmp_path), 0, 1)
    path = only(tmp_path, suffix)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    store = opened(tmp_path)
    assert found(store, 0, 1) == [0]
    add(store, 1)
    for one in (store, opened(tmp_path)):
        assert found(one, 0, 1) == [0, 1]


def test_a_process_that_is_killed_between_row_and_entry_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, write = opened(tmp_path), token_store.write_at
    add(store, 0)

    def killed(descriptor: int, content: bytes, offset: int) -> None:
        write(descriptor, content, offset)
        raise KeyboardInterrupt

    monkeypatch.setattr(token_store, "write_at", killed)
    with pytest.raises(KeyboardInterrupt):
        add(store, 1, 2)
    monkeypatch.undo()
    assert only(tmp_path, ROWS).stat().st_size == 3 * ROW
    assert found(opened(tmp_path), 0, 1, 2) == [0]
    add(store, 3)  # in the place of the row without entry
    assert found(opened(tmp_path), 0, 1, 3) == [0, 3]


def test_a_full_disk_names_the_folder_and_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(store := opened(tmp_path), 0)

    def full(descriptor: int, content: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WriteError, match=rf"model\.cache_features: .*{tmp_path}.*disk is full.*24 bytes"):
        add(store, 1)
    assert found(store, 0, 1) == [0]
    assert found(opened(tmp_path), 0, 1) == [0]


def add_many(folder: Path, first: int) -> None:
    """What one of several processes adds, half of it the same as another."""
    store = opened(folder)
    for number in range(first, first + 40, 2):
        add(store, number, number + 1)


def test_processes_that_write_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=add_many, args=(tmp_path, first)) for first in (0, 20, 40)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert found(opened(tmp_path), *range(90)) == list(range(80))
