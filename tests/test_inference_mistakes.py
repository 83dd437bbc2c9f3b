"""What goes wrong with the commands over images: what is said, and what is kept."""

import csv
import errno
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lavis_lite.cli.app import app
from lavis_lite.inference.inputs import find_items
from lavis_lite.inference.loading import load
from lavis_lite.inference.pipelines import CaptionPipeline
from lavis_lite.inference.results import Results

CAPTION = ("--model", "blip_caption/tiny", "--device", "cpu", "--num-beams", "1", "--max-length", "11")
BROKEN = range(3, 30, 3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty images, nine of them broken."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(30):
        path = folder / f"{number:02}.png"
        if number in BROKEN:
            path.write_text("not a picture")
        else:
            Image.new("RGB", (20, 16), (8 * number, 0, 0)).save(path)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "caption.pth"
    torch.save({"model": load("blip_caption/tiny", device="cpu").model.state_dict()}, path)
    return path


def run(*arguments: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_broken_images_are_listed_and_a_finished_output_is_left_alone(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.csv"
    result = run("caption", photos, *CAPTION, "--out", out)
    skipped = out.with_name(f"skipped_{out.name}.txt")
    assert skipped.read_text().splitlines() == [str(photos / f"{number:02}.png") for number in BROKEN]
    assert str(skipped) in result.stderr
    assert result.stderr.count("skipped: ") == 6  # five images, and the number of the others
    with out.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 21
    before = out.stat().st_mtime_ns
    assert "--overwrite" in run("caption", photos, *CAPTION, "--out", out, code=2).stderr
    assert "--overwrite" in run("caption", photos, *CAPTION, "--out", out, "--resume").stderr
    assert out.stat().st_mtime_ns == before
    run("caption", photos / "00.png", *CAPTION, "--out", out, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["captions.csv"]


class FullDisk(io.RawIOBase):
    """A file to which some bytes can be written."""

    def __init__(self, file: Any, left: int) -> None:
        self.wrapped, self.left = file, left

    def write(self, data: Any) -> int:
        if not self.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.wrapped.write(data[: self.left])
        self.left -= written
        return int(written)


def test_a_full_disk_keeps_what_was_computed(
    photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("caption", photos, *CAPTION, "--checkpoint", weights, "--out")
    run(*command, tmp_path / "whole.jsonl")
    out, enter = tmp_path / "out.jsonl", Results.__enter__

    def enter_full(results: Results) -> Results:
        enter(results)
        results.file._file = FullDisk(results.file._file, 900)  # type: ignore[assignment]
        return results

    with monkeypatch.context() as patch:
        patch.setattr(Results, "__enter__", enter_full)
        stderr = run(*command, out, code=2).stderr
    partial = Path(f"{out}.partial")
    assert f"{partial}: No space left on device" in stderr
    assert "--resume" in stderr
    kept = [line for line in partial.read_text().splitlines() if line.endswith("}")]
    assert len(kept) > 2
    run(*command, out, "--resume")
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not partial.exists()


def test_ctrl_c_keeps_what_was_computed(
    photos: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("caption", photos, *CAPTION, "--checkpoint", weights, "--out")
    run(*command, tmp_path / "whole.jsonl")
    out, stream = tmp_path / "out.jsonl", CaptionPipeline.stream

    def interrupted(*arguments: Any, **settings: Any) -> Iterator[dict[str, Any]]:
        for number, result in enumerate(stream(*arguments, **settings)):
            if number == 10:
                raise KeyboardInterrupt
            yield result

    with monkeypatch.context() as patch:
        patch.setattr(CaptionPipeline, "stream", interrupted)
        stderr = run(*command, out, code=130).stderr
    assert f"10 results are kept in {out}.partial" in stderr
    assert "--resume" in run(*command, out, code=2).stderr
    run(*command, out, "--resume")
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_long_texts_are_refused_or_their_cut_is_said(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "red circle " * 9_090
    assert "max_length" in run("caption", photos / "00.png", *CAPTION, "--prompt", text, code=2).stderr
    ask = ("ask", photos, "--model", "blip_vqa/tiny", "--device", "cpu", "--max-length", "3")
    run(*ask, "--question", text)
    assert caplog.text.count("18,180 words, of which the first 50 are read") == 1


def test_outputs_are_checked_before_anything_is_computed(photos: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere" / "out.npy"
    embed = ("embed", photos, "--model", "blip_feature_extractor/missing", "--out")
    assert str(nowhere.parent) in run(*embed, nowhere, code=2).stderr
    (tmp_path / "mine.png").write_text("mine")
    explain = ("explain", photos / "00.png", "--model", "blip_caption/missing", "--out")
    assert "--overwrite" in run(*explain, tmp_path / "mine.png", code=2).stderr
    assert str(nowhere.parent) in run(*explain, nowhere.with_suffix(".png"), code=2).stderr


@pytest.mark.parametrize("command", [("explain",), ("chat",)])
def test_several_and_broken_images_are_refused_before_the_model_is_loaded(
    command: tuple[str, ...], photos: Path, tmp_path: Path
) -> None:
    model = ("--model", "blip_caption/missing")
    out = ("--out", tmp_path / "out.png") if command == ("explain",) else ()
    assert "30 images" in run(*command, photos, *model, *out, code=2).stderr
    assert "03.png" in run(*command, photos / "03.png", *model, *out, code=2).stderr


def test_a_search_names_what_is_missing_before_the_model_is_loaded(photos: Path, tmp_path: Path) -> None:
    model = ("--model", "blip_retrieval/missing")
    assert str(tmp_path) in run("search", tmp_path, "a dog", *model, code=2).stderr
    assert "03.png" in run("search", photos, "--image", photos / "03.png", *model, code=2).stderr


def test_parquet_tables_have_paths_or_images(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    import pyarrow

    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))
    names = [str(photos / "00.png"), str(photos / "03.png")]
    parquet.write_table(pyarrow.table({"file": names, "q": ["what?", "how?"]}), tmp_path / "paths.parquet")
    contents = [Path(name).read_bytes() for name in names]
    parquet.write_table(pyarrow.table({"image": contents, "q": ["what?", "how?"]}), tmp_path / "images.parquet")
    assert [item.name for item in find_items([tmp_path / "paths.parquet"], column="file")] == names
    out = tmp_path / "answers.jsonl"
    model = ("--model", "blip_vqa/tiny", "--device", "cpu", "--max-length", "3")
    run("ask", tmp_path / "images.parquet", *model, "--question-column", "q", "--out", out)
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["image"] == f"{tmp_path / 'images.parquet'}: row 0"
    assert row["question"] == "what?"
    assert "row 1" in out.with_name(f"skipped_{out.name}.txt").read_text()
