"""`lavis-lite data check` on images and features inside tables, and on files of features."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shard_helpers
import yaml
from safetensors.torch import save

from lavis_lite.cli.data import command

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
torch = pytest.importorskip("torch")
pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path / "cache"))


def check(capsys: pytest.CaptureFixture[str], folder: Path, storage: Any, *more: str, **keys: Any) -> tuple[int, str]:
    """The exit code and what is printed about the split `train` of pairs."""
    info = {"annotations": {"train": {"storage": str(storage)}}, "images": {"storage": str(folder)}}
    content = {
        "model": {"arch": "blip_caption", "model_type": "tiny"},
        "datasets": {"own": {"layout": "pairs", "build_info": info, **keys}},
        "run": {"task": "captioning", "train_splits": ["train"], "valid_splits": [], "max_epoch": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit) as ended:
        command.main(["check", str(folder / "recipe.yaml"), *more])
    return int(ended.value.code or 0), capsys.readouterr().out


def table(folder: Path, images: list[Any], suffix: str) -> Path:
    rows = pa.table({"image": images, "caption": [f"picture {n}" for n in range(len(images))]})
    path = folder / f"train.{suffix}"
    if suffix == "parquet":
        pq.write_table(rows, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as stream:
            stream.write_table(rows)
    return path


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_broken_images_of_a_table_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, wrapped: bool
) -> None:
    images: list[Any] = [shard_helpers.png(n) for n in range(6)]
    images[1], images[4] = images[1][:60], b"no picture"
    if wrapped:
        images = [{"bytes": image, "path": f"{n}.png"} for n, image in enumerate(images)]
    path = table(tmp_path, images, suffix)
    code, out = check(capsys, tmp_path, path, "--decode", "all")
    assert code == 1
    assert "6 samples with images in the table" in out
    (problem,) = [line for line in out.splitlines() if "PROBLEM" in line]
    assert problem.startswith("  PROBLEM: 2 of 6 images cannot be decoded: ")
    for row in (1, 4):
        assert f"{path}: row {row}, column 'image'" in problem
    code, out = check(capsys, tmp_path, path, "--decode", "1")
    assert code == 0
    assert "1 images decoded" in out


def numpy_file(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def test_features_are_not_broken_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = [
        numpy_file(np.ones((3, 4), np.float32)),
        save({"tokens": torch.ones(2, 4)}),
        numpy_file(np.ones((2, 4), np.int32)),
    ]
    code, out = check(capsys, tmp_path, table(tmp_path, features[:2], "parquet"))
    assert code == 0, out
    assert "2 samples with features in the table" in out
    assert "2 features decoded" in out
    assert "image" not in out.replace("'image'", "")
    code, out = check(capsys, tmp_path, table(tmp_path, features, "arrow"))
    assert code == 1
    assert "PROBLEM: 1 of 3 features cannot be decoded: " in out
    assert "row 2, column 'image': features are of torch.int32" in out
    for number, content in enumerate(features):
        (tmp_path / f"{number}.{'safetensors' if number == 1 else 'npy'}").write_bytes(content)
    (tmp_path / "train.csv").write_text("image,caption\n0.npy,a thing\n1.safetensors,a thing\n2.npy,a thing\n")
    code, out = check(capsys, tmp_path, tmp_path / "train.csv")
    assert code == 1
    assert "3 features, all there" in out
    assert "PROBLEM: 1 of 3 features cannot be decoded: " in out


def test_both_images_of_a_pair_are_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"image0": [shard_helpers.png(n) for n in range(3)], "image1": [b"", shard_helpers.png(8), b"x"]}
    pq.write_table(pa.table(rows | {"sentence": ["a thing"] * 3, "label": ["True"] * 3}), tmp_path / "train.parquet")
    code, out = check(capsys, tmp_path, tmp_path / "train.parquet", layout="nlvr")
    assert code == 1
    assert "2 of 6 images cannot be decoded" in out
    assert "row 2, column 'image1'" in out
