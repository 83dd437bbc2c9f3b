"""Mistakes of users, through the real entry points: one clean line that names the file and the way out; or it works.

What readers and writers do with broken bytes is tested with them (test_bad_images, test_checkpoint, test_config); here
the point is what a user of train.py and evaluate.py sees, and that nothing is lost.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

import cli_helpers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lavis_lite.common import checkpoint

pytestmark = pytest.mark.usefixtures("shapes_data")

SHORT = {"run": {"max_iters": 2, "valid_splits": [], "test_splits": []}}


def complains(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> None:
    """The door ended with code 2 and one line `error: ...` that has all these words."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert err.rstrip().endswith(lines[0])  # nothing comes after it
    for word in words:
        assert word in lines[0]


def captions(folder: Path, records: list[dict[str, Any]], **splits: list[dict[str, Any]]) -> dict[str, Any]:
    """A change of the captioning recipe: the user's own records for training."""
    section = cli_helpers.user_set(folder / "annotations", {"train": records, **splits})
    return {"datasets": {"shapes_caption": None, "caption": section}}


def six(folder: Path) -> list[dict[str, Any]]:
    """Six good records."""
    return [
        {"image": path, "caption": f"a circle {i}"} for i, path in enumerate(cli_helpers.pictures(folder / "images", 6))
    ]


# Keys and names


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("run.max_epochs=3", ["--options: run.max_epochs", "unknown key", "'max_epoch'"]),
        ("run.task=captionning", ["captionning", "'captioning'"]),
        ("run.runner=runner_bas", ["runner_bas", "'runner_base'"]),
        ("run.lr_sched=linear_warmup_cosine", ["linear_warmup_cosine_lr"]),
        ("run.batch_size_train=many", ["run.batch_size_train", "many"]),
        ("run.num_beans=3", ["run.num_beans", "'num_beams'"]),
        ("run.test_splits=[tset]", ["tset", "test"]),
        ("run.metrics=[blue]", ["blue", "bleu"]),
        ("run.precision=fp16", ["run.precision: fp16", "bf16"]),
        ("run.device=gpu", ["run.device", "gpu", "cuda"]),
        ("model.arch=blip_captoin", ["model.arch", "'blip_caption'"]),
        ("model.model_type=tinny", ["tinny", "'tiny'"]),
        ("model.vit_typ=base", ["model.vit_typ", "'vit_type'"]),
        ("model.vit_type=huge", ["huge", "base"]),
        ("model.vit.widht=32", ["widht", "width"]),
        ("model.med.hidden_sise=32", ["hidden_sise", "hidden_size"]),
        ("model.med.num_heads=5", ["num_heads 5", "hidden_size 32"]),
        ("model.tokenizer=/nowhere/bert", ["/nowhere/bert"]),
        ("datasets.shapes_captions.num_train=5", ["shapes_captions", "'shapes_caption'"]),
        ("datasets.shapes_caption.type=defualt", ["defualt", "'default'"]),
        ("datasets.shapes_caption.num_trian=5", ["num_trian", "'num_train'"]),
        ("datasets.shapes_caption.num_train=0", ["num_train", "from 1 to 10,000,000, got 0"]),
        ("datasets.shapes_caption.vis_processor.train.name=blip_image_evil", ["blip_image_evil", "'blip_image_eval'"]),
        ("datasets.shapes_caption.vis_processor.train.image_sise=48", ["image_sise", "'image_size'"]),
        (
            "datasets.shapes_caption.vis_processor.train.image_size=64",
            ["datasets.shapes_caption.vis_processor.train.image_size: 64 is not model.image_size, which is 48"],
        ),
        ("run.max_epoch", ["run.max_epoch", "="]),
        ("data.x=1", ["data", "unknown section"]),
    ],
)
def test_mistaken_settings(option: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complains(capsys, cli_helpers.train(cli_helpers.project(tmp_path, "caption", SHORT), option), *words)
    assert not list(tmp_path.rglob("checkpoint*"))


def test_missing_project(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complains(capsys, cli_helpers.train(tmp_path / "gone.yaml"), "gone.yaml")


def test_wrong_task_for_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Validating pretraining losses on a captioning split; a VQA model on captions; retrieval on captions."""
    run = {"run": {"max_iters": 1, "test_splits": []}}
    path = cli_helpers.project(tmp_path, "pretrain", run, {"datasets": {"shapes_caption": cli_helpers.SHAPES}})
    complains(capsys, cli_helpers.train(path), "text_input")
    crossed = {"datasets": {"shapes_vqa": None, "shapes_caption": cli_helpers.SHAPES}}
    complains(
        capsys,
        cli_helpers.train(cli_helpers.project(tmp_path, "vqa_rank", SHORT, crossed)),
        "BlipVQA needs 'answer'",
    )
    crossed = {"datasets": {"shapes_retrieval": None, "shapes_caption": cli_helpers.SHAPES}}
    path = cli_helpers.project(tmp_path, "retrieval", run, crossed)
    complains(capsys, cli_helpers.train(path), "gallery")


# Files


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_and_truncated_training_image(workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = six(tmp_path)
    path = cli_helpers.project(
        tmp_path, "caption", SHORT, captions(tmp_path, records), {"run": {"num_workers": workers}}
    )
    broken = Path(records[3]["image"])
    broken.write_bytes(broken.read_bytes()[:40])
    option = "run.batch_size_train=6"
    complains(capsys, cli_helpers.train(path, option), "truncated", str(broken), "run.max_unreadable_share")
    broken.unlink()
    complains(capsys, cli_helpers.train(path, option), "not found", str(broken), "run.max_unreadable_share")


def test_missing_image_in_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = six(tmp_path)
    path = cli_helpers.project(tmp_path, "caption", captions(tmp_path, records, test=records))
    Path(records[5]["image"]).unlink()
    complains(
        capsys,
        cli_helpers.evaluate(path, "run.max_unreadable_share=0.5", "run.valid_splits=[]"),
        records[5]["image"],
        "never skips",
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_within_the_share_are_counted(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = six(tmp_path)
    Path(records[2]["image"]).unlink()
    run = {"max_iters": 6, "max_epoch": 9, "valid_splits": [], "test_splits": [], "num_workers": workers}
    path = cli_helpers.project(
        tmp_path, "caption", captions(tmp_path, records), {"run": {**run, "batch_size_train": 2}}
    )
    assert cli_helpers.train(path, "run.max_unreadable_share=0.4", job="skipping") == 0
    rows = cli_helpers.steps(tmp_path / "output" / "skipping")
    assert rows[-1]["unreadable"] == 2  # twelve samples are two epochs of six
    assert records[2]["image"] in capsys.readouterr().err
    complains(
        capsys,
        cli_helpers.train(path, "run.max_unreadable_share=0.05", job="strict"),
        records[2]["image"],
        "run.max_unreadable_share=0.05",
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"image": "a.png", "caption": "x"}, {"ima', ["broken or truncated JSON at line 1"]),
        ("", ["is empty"]),
        ('{"image": 3', ["broken or truncated JSON"]),
        ('[{"image": "a.png"}]', ["record 0 has no field 'caption'"]),
        ('"text"', ["expected a list"]),
        ("[1, 2]", ["record 0 is a int"]),
        ("[]", ["holds no records"]),
        ('[{"image": "a.png", "caption": null}]', ["record 0: field 'caption' is null"]),
        ('[{"image": "a.png", "caption": "..!"}]', ["record 0: field 'caption' is \"..!\", blank once cleaned"]),
    ],
)
def test_broken_annotations(content: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cli_helpers.project(tmp_path, "caption", SHORT, captions(tmp_path, six(tmp_path)))
    annotations = tmp_path / "annotations" / "train.json"
    annotations.write_text(content)
    cleaning = "datasets.caption.text_processor.train.name=blip_caption"
    complains(capsys, cli_helpers.train(path, cleaning), *words, str(annotations))


def test_labels_that_the_model_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named before the first step, which would end in an index error."""
    images = cli_helpers.pictures(tmp_path / "images", 4)
    records = [{"image": image, "sentence": "a circle", "label": label} for label, image in enumerate(images)]
    own = cli_helpers.user_set(tmp_path / "own", {"train": records, "val": records[:2]})
    path = cli_helpers.project(tmp_path, "classification", SHORT)
    text = yaml.safe_load(path.read_text(encoding="utf-8")) | {"datasets": {"classification": own}}
    path.write_text(yaml.safe_dump(text), encoding="utf-8")
    words = ("train.json: sample 3: label 3", "model.num_classes=3")
    complains(capsys, cli_helpers.train(path), *words)
    assert cli_helpers.train(path, "model.num_classes=4") == 0


def test_missing_annotations_and_image_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cli_helpers.project(tmp_path, "caption", SHORT, captions(tmp_path, six(tmp_path)))
    folder = f"datasets.caption.build_info.images.storage={tmp_path / 'nowhere'}"
    complains(capsys, cli_helpers.train(path, folder), str(tmp_path / "nowhere"), "build_info.images.storage")
    (tmp_path / "annotations" / "train.json").unlink()
    complains(capsys, cli_helpers.train(path), str(tmp_path / "annotations" / "train.json"), "not found")


class Malice:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch /tmp/lavis_lite_was_here",)


@pytest.mark.parametrize("key", ["checkpoint", "pretrained", "finetuned"])
def test_bad_checkpoints(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cli_helpers.project(tmp_path, "caption", SHORT)
    good = tmp_path / "good.pth"
    torch.save({"model": cli_helpers.build("caption").state_dict()}, good)
    torch.save({"model": cli_helpers.build("nlvr").state_dict()}, tmp_path / "nlvr.pth")
    torch.save({"model": Malice()}, tmp_path / "code.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    (tmp_path / "cut.pth").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "page.pth").write_text("<html>404</html>")
    for name, words in {
        "gone": ["gone.pth"],
        "cut": ["truncated", "download or copy it again"],
        "page": ["not a checkpoint"],
        "nlvr": ["lacks", "trainable keys", "text_decoder"],
        "code": ["pickled code", "system"],
        "empty": ["holds no weights", "epoch"],
    }.items():
        file = tmp_path / f"{name}.pth"
        complains(capsys, cli_helpers.train(path, f"model.{key}={file}"), str(file), *words)
    assert not Path("/tmp/lavis_lite_was_here").exists()
    assert cli_helpers.train(path, f"model.{key}={good}") == 0


def test_resuming_bad_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cli_helpers.project(tmp_path, "caption", SHORT)
    gone = tmp_path / "gone.pth"
    complains(capsys, cli_helpers.train(path, flags=["--resume", str(gone)]), "no checkpoint to resume", str(gone))
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04" + bytes(100))
    complains(capsys, cli_helpers.train(path, flags=["--resume", str(tmp_path / "cut.pth")]), "cut.pth", "truncated")


@pytest.mark.parametrize("room", [0, 20_000])
def test_disk_full_while_saving(
    room: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second checkpoint does not fit: the message says what to do, the first one is whole, and resuming goes on."""
    path = cli_helpers.project(
        tmp_path, "caption", {"run": {"checkpoint_every": 2, "valid_splits": [], "test_splits": []}}
    )
    written = {"files": 0, "bytes": 0}
    write = checkpoint._ErrorRecorder.write

    def limited(self: Any, data: Any) -> int:
        if ".pth." in self.file.name and self.file.name.endswith(".tmp") and written["files"] >= 1:
            written["bytes"] += len(data)
            if written["bytes"] > room:
                self.error = OSError(errno.ENOSPC, "No space left on device")
                raise self.error
        return write(self, data)

    def counted(obj: Any, target: Any) -> Path:
        done = save(obj, target)
        written["files"] += 1
        return done

    save = checkpoint.save
    with monkeypatch.context() as full:
        full.setattr(checkpoint._ErrorRecorder, "write", limited)
        full.setattr(checkpoint, "save", counted)
        code = cli_helpers.train(path)
    last = tmp_path / "output" / "job" / "checkpoint_last.pth"
    complains(capsys, code, str(last), "the disk is full", "nothing was replaced", "--resume auto")
    assert checkpoint.load(last)["step"] == 2
    assert not list(last.parent.glob(".*.tmp"))
    assert cli_helpers.train(path, flags=["--resume", "auto"], job=None) == 0
    assert checkpoint.load(last)["step"] == 6


def test_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    path = cli_helpers.project(tmp_path, "caption", SHORT)
    complains(capsys, cli_helpers.train(path, f"run.output_dir={tmp_path / 'file'}"), str(tmp_path / "file"))


# Odd but fine


@pytest.mark.slow
def test_odd_images_and_texts_train_and_evaluate(tmp_path: Path) -> None:
    """One pixel, CMYK, palette, 16 bits, animated, alpha, one pixel high; short, long, non-ASCII texts; such names."""
    folder = tmp_path / "bilder für ß 図"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    rgb = Image.fromarray(noise)
    rgb.resize((1, 1)).save(folder / "one.png")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.quantize(16).save(folder / "palette.png", transparency=3)
    Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257).save(folder / "deep.png")
    rgb.save(folder / "animated.gif", save_all=True, append_images=[rgb.rotate(90), rgb.rotate(180)])
    rgb.convert("LA").save(folder / "grau_ü.png")
    rgb.resize((300, 1)).save(folder / "line.webp")
    texts = [
        "?",
        "Ein rötlicher Kreis – größer als 3 µm",
        "赤い丸と青い四角",
        "🟥🔵",
        "-",
        "a red circle " * 50,
        "\u202eabc\x00\n",
    ]
    names = sorted(os.listdir(folder))
    records = [
        {"image": str(folder / name), "caption": text, "image_id": f"id-{name}"}
        for name, text in zip(names, texts, strict=True)
    ]
    change = captions(tmp_path, records, val=records, test=records)
    path = cli_helpers.project(tmp_path, "caption", change, {"run": {"batch_size_train": 7, "max_iters": 3}})
    assert cli_helpers.train(path) == 0
    results = json.loads((tmp_path / "output" / "job" / "result" / "test_captions.json").read_text(encoding="utf-8"))
    assert [entry["image_id"] for entry in results] == [f"id-{name}" for name in names]
    retrieval = {"datasets": {"shapes_retrieval": None, "retrieval": change["datasets"]["caption"]}}
    path = cli_helpers.project(tmp_path, "retrieval", retrieval, {"run": {"batch_size_train": 6, "max_iters": 3}})
    assert cli_helpers.train(path, job="retrieval") == 0


def test_odd_questions(tmp_path: Path) -> None:
    images = cli_helpers.pictures(tmp_path / "images", 4)
    texts = [
        ("?", ["yes"] * 10),
        ("¿De qué color es?", ["azul", "blau", "青"]),
        ("what?", ["-", "no"]),
        ("?" * 300, ["1"]),
    ]
    records = [
        {"image": image, "question": question, "answer": answers, "question_id": i}
        for i, (image, (question, answers)) in enumerate(zip(images, texts, strict=True))
    ]
    section = cli_helpers.user_set(tmp_path / "annotations", {"train": records, "test": records})
    answer_list = tmp_path / "answers.json"
    answer_list.write_text(json.dumps(["yes", "no", "青"], ensure_ascii=False), encoding="utf-8")
    section["build_info"]["annotations"]["test"]["storage"] = [
        str(tmp_path / "annotations/test.json"),
        str(answer_list),
    ]
    change = {"datasets": {"shapes_vqa": None, "vqa": section}, "run": {"max_iters": 2, "valid_splits": []}}
    for name in ("vqa_rank", "vqa_generate"):
        assert cli_helpers.train(cli_helpers.project(tmp_path, name, change), job=name) == 0
        answers = json.loads((tmp_path / "output" / name / "result" / "test_vqa.json").read_text(encoding="utf-8"))
        assert [entry["question_id"] for entry in answers] == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("name", cli_helpers.RECIPES)
def test_batch_of_one(name: str, tmp_path: Path) -> None:
    """Training and evaluation with single samples, on an evaluation split of one."""
    path = cli_helpers.project(tmp_path, name, {"run": {"batch_size_train": 1, "batch_size_eval": 1, "max_iters": 3}})
    assert cli_helpers.train(path) == 0
    rows = cli_helpers.steps(tmp_path / "output" / "job")
    assert len(rows) == 3
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_training_set_smaller_than_a_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cli_helpers.project(tmp_path, "caption", SHORT, captions(tmp_path, six(tmp_path)))
    complains(capsys, cli_helpers.train(path, "run.batch_size_train=7"), "6 training samples", "run.batch_size_train")
