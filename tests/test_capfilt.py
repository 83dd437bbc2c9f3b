"""The task `capfilt` through evaluate.py: what is written, resumed, refused, and read again as a dataset."""

import errno
import html
import json
import os
import re
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import cli_helpers
import pyarrow as pa
import pytest
import shard_helpers
import torch
import warm
import yaml

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.datasets.image import open_image
from lavis_lite.datasets.pairs import PairsBuilder
from lavis_lite.datasets.readers.capfilt import finished_manifest, read_shard, read_texts
from lavis_lite.datasets.readers.files import SplitFiles
from lavis_lite.models import load_model
from lavis_lite.tasks.capfilt.shards import write_parquet
from lavis_lite.tasks.capfilt.task import CapFiltTask

SIZES = {key: value for key, value in cli_helpers.SIZES.items() if key != "model_type"}
CAPTIONER = {"arch": "blip_caption", "model_type": "tiny", **SIZES}
FILTER = {"arch": "blip_image_text_matching", "embed_dim": 16}


@pytest.fixture
def recipe(tmp_path: Path, shapes_data: Path) -> Path:
    """24 web pairs in three shards of 7, 7, 7 and one of 3 samples; two captions are written per image."""
    change = {
        "model": FILTER,
        "datasets": {"shapes_pairs": cli_helpers.SHAPES},
        "run": {
            **{"task": "capfilt", "captioner": CAPTIONER, "num_captions": 2, "max_len": 12, "threshold": 0.66},
            **{"valid_splits": [], "test_splits": ["train"], "shard_size": 7},
        },
    }
    path = cli_helpers.project(tmp_path, "pretrain", change)
    path.write_text(path.read_text().replace("  queue_size: 48\n", ""))
    return path


def folder_of(recipe: Path, job: str = "evaluation") -> Path:
    return recipe.parent / "output" / job / "result/train_texts"


def texts(folder: Path) -> list[dict[str, Any]]:
    return [r for name in finished_manifest(folder / "manifest.json")["shards"] for r in read_shard(folder / name)]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("0*"))}


def last_error(capsys: pytest.CaptureFixture[str]) -> str:
    return next(line for line in reversed(capsys.readouterr().err.splitlines()) if "error:" in line)


def test_every_image_has_its_own_text_and_the_written_ones_with_the_filters_scores(recipe: Path) -> None:
    assert cli_helpers.evaluate(recipe) == 0
    found = texts(folder_of(recipe))
    root = Path(finished_manifest(folder_of(recipe) / "manifest.json")["image_root"])
    pairs = json.loads((root.parent / "annotations/pairs_train.json").read_text())
    web = [text for text in found if text["source"] == "web"]
    assert [(t["sample"], t["image"], t["caption"]) for t in web] == [
        (number, pair["image"], pair["caption"]) for number, pair in enumerate(pairs)
    ]
    synthetic = [text for text in found if text["source"] == "synthetic"]
    assert len(web) + len(synthetic) == len(found)
    assert {text["sample"] for text in synthetic} == set(range(24))
    assert len({(t["sample"], t["caption"]) for t in synthetic}) == len(synthetic)  # repeated ones count once
    assert all(text["kept"] == (text["itm"] > 0.66) for text in found)
    assert len({text["kept"] for text in found}) == 2, "the threshold should part these texts"

    metrics = cli_helpers.metrics(recipe.parent / "output/evaluation", "train")
    kept = [text["kept"] for text in web]
    assert metrics["kept_web"] == pytest.approx(100 * sum(kept) / len(kept))
    assert metrics["num_texts"] == len(found)
    assert metrics["num_kept"] == sum(text["kept"] for text in found)


def test_scores_are_the_filters_own(recipe: Path, tmp_path: Path) -> None:
    """The filter's weights in a file, read by load_model."""
    weights = tmp_path / "filter.pth"
    model = cli_helpers.build("blip_image_text_matching", embed_dim=16)
    torch.save({"model": model.state_dict()}, weights)
    assert cli_helpers.evaluate(recipe, f"model.checkpoint={weights}") == 0
    found = texts(folder_of(recipe))[:9]
    root = Path(finished_manifest(folder_of(recipe) / "manifest.json")["image_root"])
    dataset = PairsBuilder(
        build_info={
            "annotations": {"test": {"storage": str(root.parent / "annotations/pairs_train.json")}},
            "images": {"storage": str(root)},
        },
        vis_processor={"eval": {"name": "blip_image_eval", "image_size": 48}},
    ).build(["test"])["test"]
    for text in found:
        pair = {"image": dataset[text["sample"]]["image"][None], "text_input": [text["caption"]]}
        with torch.no_grad():
            logits = model.eval()(pair)[0]
        assert text["itm"] == pytest.approx(logits.softmax(0)[1].item(), abs=2e-5)


def test_a_run_continues_with_the_shards_that_are_missing(recipe: Path) -> None:
    assert cli_helpers.evaluate(recipe) == 0
    folder = folder_of(recipe)
    whole = shards(folder)
    assert [*whole] == [f"{number:06d}.jsonl" for number in range(4)]
    (folder / "000001.jsonl").unlink()
    (folder / "000003.jsonl").unlink()
    (folder / ".000001.jsonl.1-a.tmp").write_text("half of a sh")
    written = (folder / "000000.jsonl").stat().st_mtime_ns
    assert cli_helpers.evaluate(recipe) == 0
    assert shards(folder) == whole
    assert (folder / "000000.jsonl").stat().st_mtime_ns == written  # not made again
    assert not list(folder.glob(".*"))


def test_a_run_continues_with_the_batch_that_is_missing(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended in the fourth batch of two, the last of the first shard, and in the second batch of the third shard."""
    change = "run.batch_size_eval=2"
    assert cli_helpers.evaluate(recipe, change) == 0
    folder = folder_of(recipe)
    whole = shards(folder)
    (folder / "000000.jsonl").unlink()
    (folder / "000002.jsonl").unlink()
    done: list[int] = []
    texts_of = CapFiltTask.texts
    stops = {4: KeyboardInterrupt, 7: KeyboardInterrupt}

    def texts(self: CapFiltTask, model: Any, samples: Any, annotation: Any) -> Any:
        done.append(samples["positions"][0])
        if error := stops.pop(len(done), None):
            raise error
        return texts_of(self, model, samples, annotation)

    monkeypatch.setattr(CapFiltTask, "texts", texts)
    for cut in (b'{"first": 99', b"\0\0\0\n"):
        assert cli_helpers.evaluate(recipe, change) != 0
        with next(folder.glob(".*.part")).open("ab") as file:
            file.write(cut)
    assert cli_helpers.evaluate(recipe, change) == 0
    assert done == [0, 2, 4, 6, 6, 14, 16, 16, 18, 20]
    assert shards(folder) == whole
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_processes_and_kills_change_nothing(recipe: Path, shapes_data: Path) -> None:
    """Killed once the first shard is there, continued by two processes."""
    assert cli_helpers.evaluate(recipe) == 0
    whole = shards(folder_of(recipe))
    arguments = ("--cfg-path", str(recipe), "--job-id", "killed")
    killed = warm.start("evaluate.py", *arguments)
    for _ in range(1200):
        if list(folder_of(recipe, "killed").glob("0*.jsonl")) or killed.poll() is not None:
            break
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert 1 <= len(shards(folder_of(recipe, "killed"))) <= 4
    done = warm.start("evaluate.py", *arguments, world=2)
    output, _ = done.communicate(timeout=300)
    assert done.returncode == 0, output
    assert shards(folder_of(recipe, "killed")) == whole


def test_other_settings_or_weights_do_not_continue_the_same_texts(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli_helpers.evaluate(recipe) == 0
    assert cli_helpers.evaluate(recipe, "run.threshold=0.7") == 2
    error = last_error(capsys)
    assert all(word in error for word in ("manifest.json", "threshold=0.66", "0.7", "run.job_id")), error
    assert cli_helpers.evaluate(recipe, "run.seed=7") == 2
    assert "seed=42" in last_error(capsys)


class FullDisk:
    """Stands for a file on a full disk."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def test_a_full_disk_keeps_the_finished_shards(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real_open = Path.open

    def full_at_the_third(self: Path, *args: Any, **settings: Any) -> Any:
        file = real_open(self, *args, **settings)
        return FullDisk(file) if self.name.startswith(".000002.jsonl") else file

    monkeypatch.setattr(Path, "open", full_at_the_third)
    assert cli_helpers.evaluate(recipe) == 2
    error = last_error(capsys)
    assert all(word in error for word in ("000002.jsonl", "disk is full", "same command again")), error
    monkeypatch.undo()
    folder = folder_of(recipe)
    assert [*shards(folder)] == ["000000.jsonl", "000001.jsonl"]
    with pytest.raises(InputError, match=r"manifest\.json.*again"):
        finished_manifest(folder / "manifest.json")


@pytest.mark.parametrize("output_format", ["parquet", "webdataset"])
def test_other_formats_have_the_same_texts(recipe: Path, output_format: str) -> None:
    assert cli_helpers.evaluate(recipe) == 0
    assert cli_helpers.evaluate(recipe, f"run.output_format={output_format}", job="other") == 0
    folder = folder_of(recipe, "other")
    found = texts(folder)
    assert found == texts(folder_of(recipe))
    if output_format == "webdataset":
        kept = [text for text in found if text["kept"]]
        members: dict[str, bytes] = {}
        for path in sorted(folder.glob("*.tar")):
            with tarfile.open(path) as tar:
                members |= {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
        keys = sorted({name.rpartition(".")[0] for name in members})
        assert len(keys) == len(kept)
        root = Path(finished_manifest(folder / "manifest.json")["image_root"])
        for key, text in zip(keys, kept, strict=True):
            assert members[f"{key}.txt"].decode() == text["caption"]
            assert json.loads(members[f"{key}.json"]) == {"image_id": str(root / text["image"]), **text}
            assert members[f"{key}.jpg"] == (root / text["image"]).read_bytes()


@pytest.mark.slow
def test_shards_and_tables_of_images_become_shards(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    """Six pairs as files, in two shards and inside a parquet table; texts and scores are the same."""
    pq = pytest.importorskip("pyarrow.parquet")
    pictures = [Path(path) for path in cli_helpers.pictures(tmp_path / "p", 6)]
    rows = [{"image": path.read_bytes(), "caption": f"circle {n}"} for n, path in enumerate(pictures)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "inside.parquet")
    for first in (0, 3):
        samples = [
            {"__key__": f"{n:03d}", "png": rows[n]["image"], "txt": rows[n]["caption"]} for n in range(first, first + 3)
        ]
        shard_helpers.write_shard(tmp_path / f"in-{first}.tar", samples)
    records = [{"image": str(path), "caption": row["caption"]} for path, row in zip(pictures, rows, strict=True)]
    (tmp_path / "files.json").write_text(json.dumps(records))
    cfg = yaml.safe_load(recipe.read_text())
    found = {}
    for name, storage in {"files": "files.json", "shards": "in-*.tar", "table": "inside.parquet"}.items():
        own = cli_helpers.user_set(tmp_path / name, {"train": records})
        own["build_info"]["annotations"]["train"] = {"storage": str(tmp_path / storage)}
        recipe.write_text(yaml.safe_dump({**cfg, "datasets": {"pairs": own}}))
        assert cli_helpers.evaluate(recipe, "run.output_format=webdataset", "run.threshold=0.0", job=name) == 0
        folder = folder_of(recipe, name)
        found[name] = [{key: v for key, v in text.items() if key != "image"} for text in jsonl(folder)]
        kept = [text for text in found[name] if text["kept"]]
        info = {"annotations": {"train": {"storage": str(folder / "*.tar")}}}
        every = PairsBuilder(build_info=info).build()["train"]
        assert [record["caption"] for record in every.annotation] == [text["caption"] for text in kept]
        drawn = PairsBuilder(build_info=info, captions_per_sample="draw").build()["train"]
        assert len(drawn) == len({text["sample"] for text in kept}) < len(kept)
        assert len(registry.get_builder_class("caption")(build_info=info).build()["train"]) == len(kept)
        sample = every.annotation[0]["sample"]
        opened = open_image(every.annotation[0]["image"])
        assert opened.tobytes() == open_image(pictures[sample]).tobytes()
    assert found["files"] == found["shards"] == found["table"]
    with pytest.raises(InputError, match=r"manifest\.json.*tables.*\.tar"):
        list(read_texts(SplitFiles(paths=[folder / "manifest.json"], split="train")))
    assert cli_helpers.evaluate(recipe, job="refused") == 2
    assert "run.output_format: jsonl" in last_error(capsys)


def jsonl(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("0*.jsonl")) for line in path.read_text().splitlines()]


def test_a_shard_without_kept_texts_has_no_tar(recipe: Path) -> None:
    assert cli_helpers.evaluate(recipe, "run.output_format=webdataset", "run.threshold=1.0") == 0
    folder = folder_of(recipe)
    assert len(texts(folder)) > 24
    assert not list(folder.glob("*.tar"))


def test_other_annotations_do_not_continue_the_same_texts(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    cfg = yaml.safe_load(recipe.read_text())
    cfg["datasets"] = {"pairs": own_pairs(tmp_path, 9)}
    recipe.write_text(yaml.safe_dump(cfg))
    assert cli_helpers.evaluate(recipe) == 0
    (folder_of(recipe) / "000001.jsonl").unlink()
    file = Path(cfg["datasets"]["pairs"]["build_info"]["annotations"]["train"]["storage"])
    file.write_text(file.read_text().replace("a red circle", "a red square"))
    assert cli_helpers.evaluate(recipe) == 2
    assert "annotations=" in last_error(capsys)


def test_tables_of_texts_have_the_same_columns_in_every_shard(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    shared = {"image": "a.png", "sample": 0, "caption": "a", "source": "web", "itm": 0.5, "kept": True}
    ids = [[], [{}], [{}, {"image_id": 3}], [{"image_id": "x"}, {"image_id": 4}]]
    for number, shard in enumerate(ids):
        with (tmp_path / f"{number}.parquet").open("wb") as file:
            write_parquet(file, [{**shared, **one} for one in shard])
    assert len({str(pq.read_schema(path)) for path in tmp_path.glob("*.parquet")}) == 1
    info = {"annotations": {"train": {"storage": str(tmp_path / "*.parquet")}}}
    found = PairsBuilder(build_info=info).build()["train"].annotation
    assert [record["image_id"] for record in found] == [None, None, "3", "x", "4"]


def own_pairs(folder: Path, count: int) -> dict[str, Any]:
    records = [{"image": p, "caption": "a red circle"} for p in cli_helpers.pictures(folder / "p", count)]
    return cli_helpers.user_set(folder / "web", {"train": records})


def test_unreadable_images_are_left_out_within_the_share(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = yaml.safe_load(recipe.read_text())
    cfg["datasets"] = {"pairs": own_pairs(tmp_path, 9)}
    recipe.write_text(yaml.safe_dump(cfg))
    (tmp_path / "p/picture8.png").write_bytes(b"not a picture")
    assert cli_helpers.evaluate(recipe) == 2
    error = last_error(capsys)
    assert "picture8.png" in error
    assert "run.max_unreadable_share" in error
    assert cli_helpers.evaluate(recipe, "run.max_unreadable_share=0.2", job="skips") == 0
    assert {text["sample"] for text in texts(folder_of(recipe, "skips"))} == set(range(8))


def test_the_page_shows_shares_scores_and_examples(recipe: Path) -> None:
    assert cli_helpers.evaluate(recipe) == 0
    folder = folder_of(recipe)
    page = (folder / "report.html").read_text()
    found = texts(folder)
    for source in ("web", "synthetic"):
        own = [text["kept"] for text in found if text["source"] == source]
        assert f"{100 * sum(own) / len(own):.1f} %" in page
    assert len(re.findall(r"<svg", page)) == 4
    counts = [sum(map(int, re.findall(r"<title>(\d+)</title></rect>", svg))) for svg in page.split("<svg")[1:]]
    assert sorted(counts) == sorted([24, 24, len(found) - 24, len(found) - 24])
    assert 'src="data:image/jpeg;base64,' in page
    assert all(word not in page for word in ("<script", "http:", "https:"))
    shown = [html.unescape(text) for text in re.findall(r'alt="([^"]*)"', page)]
    assert set(shown) <= {text["caption"] for text in found}
    assert len(shown) >= 8


# What is kept


def judged(**settings: Any) -> list[bool]:
    scores = {"web": 0.4, "synthetic": 0.9}
    sources = ["web", "synthetic", "synthetic", "synthetic"]
    values = [scores["web"], 0.9, 0.6, 0.7]
    return CapFiltTask(**settings).decide(
        [{"source": source, "itm": value, "itc": -value} for source, value in zip(sources, values, strict=True)]
    )


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [False, True, True, True]),
        ({"threshold": 0.65}, [False, True, False, True]),
        ({"threshold": None}, [True, True, True, True]),
        ({"keep_best": 2}, [False, True, False, True]),
        ({"threshold": None, "keep_best": 1, "filter_by": "itc"}, [True, False, False, False]),
        ({"filtered_sources": ["synthetic"], "threshold": 0.8}, [True, True, False, False]),
        ({"filtered_sources": ["web"]}, [False, True, True, True]),
    ],
)
def test_texts_are_kept_by_threshold_and_rank(settings: dict[str, Any], kept: list[bool]) -> None:
    assert judged(**settings) == kept


# What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["run.captioner={arch: blip_retrieval, model_type: tiny}"], ("run.captioner.arch", "blip_retrieval")),
        (["run.captioner.model_type=null"], ("run.captioner", "model_type")),
        (["run.captioner.checkpoint=/nowhere/a.pth"], ("run.captioner.checkpoint", "/nowhere/a.pth")),
        (["run.filter_by=clip"], ("run.filter_by", "run.ranker")),
        (["run.ranker={model: /nowhere/clip}"], ("run.ranker.model", "/nowhere/clip")),
        (["run.ranker={library: open_clip, model: ViT-L-14}"], ("run.ranker.weights", "openai")),
        (
            ["run.ranker={library: open_clip, model: ViT-L-14, weights: /nowhere/a.pt}"],
            ("run.ranker.weights", "/nowhere/a.pt"),
        ),
        (["run.ranker={library: open_clip, model: ViT-Q-14}"], ("run.ranker.model", "ViT-Q-14")),
        (["run.shard_size=0"], ("run.shard_size", "0")),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    options: list[str], words: tuple[str, ...], recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli_helpers.evaluate(recipe, *options) == 2
    error = last_error(capsys)
    assert all(word in error for word in words), error
    assert not folder_of(recipe).exists()


@pytest.mark.parametrize("arch", ["blip_caption", "blip_vqa"])
def test_a_model_that_scores_nothing_needs_a_ranker(
    arch: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = yaml.safe_load(recipe.read_text())
    cfg["model"] = {**CAPTIONER, "arch": arch}
    cfg["run"]["captioner"] = None
    recipe.write_text(yaml.safe_dump(cfg))
    assert cli_helpers.evaluate(recipe) == 2
    error = last_error(capsys)
    assert all(word in error for word in (arch, "match_scores", "run.ranker")), error


def test_features_of_another_encoder_are_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = yaml.safe_load(recipe.read_text())
    cfg["model"] = {"arch": "blip2", "model_type": "tiny_features"}
    for section in cfg["datasets"].values():
        section["vis_processor"] = {split: {"name": "features"} for split in ("train", "eval")}
    recipe.write_text(yaml.safe_dump(cfg))
    assert cli_helpers.evaluate(recipe) == 2
    assert "model.vit_model: features" in last_error(capsys)


# Read again


def pairs(folder: Path, **settings: Any) -> Any:
    info = {"annotations": {"train": {"url": str(folder / "manifest.json")}}}
    return PairsBuilder(reader="capfilt", build_info=info, **settings).build(["train"])["train"]


def test_the_texts_are_a_dataset(recipe: Path) -> None:
    assert cli_helpers.evaluate(recipe) == 0
    folder = folder_of(recipe)
    found = texts(folder)
    dataset = pairs(folder)
    assert [record["caption"] for record in dataset.annotation] == [text["caption"] for text in found]
    assert dataset[0]["image"].size == (48, 48)
    kept = pairs(folder, where={"kept": True, "source": ["web", "human"]})
    expected = [text["caption"] for text in found if text["kept"] and text["source"] == "web"]
    assert [record["caption"] for record in kept.annotation] == expected
    for where, words in (({"kind": 1}, "where.kind"), ({"source": "human"}, "where.source.*human")):
        with pytest.raises(InputError, match=words):
            pairs(folder, where=where)


def test_the_training_split_is_not_cropped_at_random(recipe: Path) -> None:
    """The processors of the split `train` would crop and mirror; the texts are those with the `eval` ones for both."""
    cfg = yaml.safe_load(recipe.read_text())
    plain = {"name": "blip_image_eval", "image_size": 48}
    for job, train in (("random", {"name": "blip_image_train", "image_size": 48}), ("plain", plain)):
        cfg["datasets"]["shapes_pairs"]["vis_processor"] = {"train": train, "eval": plain}
        recipe.write_text(yaml.safe_dump(cfg))
        assert cli_helpers.evaluate(recipe, job=job, flags=["--limit", "7"]) == 0
    assert shards(folder_of(recipe, "random")) == shards(folder_of(recipe, "plain"))


def test_it_does_not_train(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_helpers.train(recipe) == 2
    error = last_error(capsys)
    assert all(word in error for word in ("capfilt", "evaluate.py", "run.evaluate")), error


def test_a_damaged_shard_is_named_with_its_line(recipe: Path) -> None:
    assert cli_helpers.evaluate(recipe) == 0
    path = folder_of(recipe) / "000002.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=rf"000002\.jsonl: line {len(path.read_text().splitlines())}.*again"):
        pairs(folder_of(recipe))


def test_another_json_file_is_not_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"shards": []}')
    with pytest.raises(InputError, match=r"manifest\.json.*not a manifest"):
        pairs(tmp_path)


# CLIP


def tiny_transformers_clip(folder: Path) -> Any:
    from transformers import CLIPConfig, CLIPModel

    tokenizer = load_model("blip_image_text_matching", "tiny").tokenizer
    tokenizer.save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    end = {
        "eos_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
    }
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(tokenizer), "max_position_embeddings": 24, **end},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    return model, tokenizer


@pytest.mark.slow
def test_a_clip_of_transformers_ranks_a_captioners_texts(recipe: Path, tmp_path: Path) -> None:
    """BLIP-2's way: several captions, ranked with the web's text, the best two kept."""
    model, tokenizer = tiny_transformers_clip(tmp_path / "clip")
    cfg = yaml.safe_load(recipe.read_text())
    cfg["model"] = CAPTIONER
    ranker = {"library": "transformers", "model": str(tmp_path / "clip")}
    cfg["run"] |= {
        "captioner": None,
        "ranker": ranker,
        "filter_by": "clip",
        "threshold": None,
        "keep_best": 2,
        "num_captions": 4,
    }
    recipe.write_text(yaml.safe_dump(cfg))
    assert cli_helpers.evaluate(recipe) == 0
    found = texts(folder_of(recipe))
    assert not any("itm" in text for text in found)
    by_sample: dict[int, list[dict[str, Any]]] = {}
    for text in found:
        by_sample.setdefault(text["sample"], []).append(text)
    for own in by_sample.values():
        best = sorted(own, key=lambda text: -text["clip"])[:2]
        assert [text for text in own if text["kept"]] == [text for text in own if text in best]
    dataset = pairs(folder_of(recipe), vis_processor={"train": {"name": "blip_image_eval", "image_size": 48}})
    image = torch.nn.functional.interpolate(dataset[0]["image"][None], (32, 32), mode="bicubic", antialias=True)
    first = by_sample[0]
    tokens = tokenizer([text["caption"] for text in first], padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=image)
    expected = (out.logits_per_image[0] / model.logit_scale.exp()).tolist()
    assert [text["clip"] for text in first] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_clip_of_open_clip_scores_beside_the_filter(recipe: Path, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
    }
    (tmp_path / "tiny_test_clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny_test_clip.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny_test_clip").eval()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    ranker = {"library": "open_clip", "model": "tiny_test_clip", "weights": str(tmp_path / "clip.pt")}
    assert cli_helpers.evaluate(recipe, f"run.ranker={json.dumps(ranker)}") == 0
    found = texts(folder_of(recipe))
    assert {"itm", "itc", "clip"} <= found[0].keys()
    dataset = pairs(folder_of(recipe), vis_processor={"train": {"name": "blip_image_eval", "image_size": 48}})
    image = torch.nn.functional.interpolate(dataset[0]["image"][None], (32, 32), mode="bicubic", antialias=True)
    first = [text for text in found if text["sample"] == 0]
    with torch.no_grad():
        image_feat = model.encode_image(image, normalize=True)
        text_feat = model.encode_text(
            open_clip.get_tokenizer("tiny_test_clip")([t["caption"] for t in first]), normalize=True
        )
    assert [text["clip"] for text in first] == pytest.approx((image_feat @ text_feat.T)[0].tolist(), abs=1e-5)
