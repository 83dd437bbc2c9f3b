"""Pipelines over many images and the commands on top of them, with tiny models of random weights."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cli_helpers
import numpy as np
import pytest
import torch
from PIL import Image
from ports import free_port
from typer.testing import CliRunner

import lavis_lite
from lavis_lite.cli.app import app
from lavis_lite.common.errors import InputError, MissingFileError, UnknownNameError, UnreadableSample
from lavis_lite.inference.batches import BatchSizer, read_ahead
from lavis_lite.inference.inputs import Item, find_items, load_image
from lavis_lite.inference.loading import Loaded, load
from lavis_lite.inference.pipelines import AskPipeline, CaptionPipeline, EmbedPipeline, MatchPipeline
from lavis_lite.inference.results import Results, key_of
from lavis_lite.inference.search import ImageIndex

COLORS = {"a_red.png": "red", "b_green.png": "green", "c_blue.jpg": "blue", "sub/d_white.webp": "white"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    for name, color in COLORS.items():
        Image.new("RGB", (40, 30), color).save(folder / name)
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.md").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def tiny() -> Callable[[str], Loaded]:
    made: dict[str, Loaded] = {}

    def of(name: str) -> Loaded:
        if name not in made:
            torch.manual_seed(0)
            made[name] = load(name, device="cpu")
        return made[name]

    return of


def names_of(items: list[Item]) -> list[str]:
    return [item.name for item in items]


def test_a_folder_is_its_images_sorted_with_subfolders(photos: Path) -> None:
    assert names_of(find_items([photos])) == [str(photos / name) for name in COLORS]


def test_sources_are_joined_without_repetitions(photos: Path) -> None:
    found = find_items([photos / "b_green.png", f"{photos}/*.png"])
    assert names_of(found) == [str(photos / "b_green.png"), str(photos / "a_red.png")]


def test_lists_and_tables_name_paths_relative_to_themselves(photos: Path) -> None:
    (photos / "list.txt").write_text("c_blue.jpg\n\nsub/d_white.webp\n")
    (photos / "table.csv").write_text("file,question\na_red.png,what color?\nc_blue.jpg,how big?\n")
    assert [item.image for item in find_items([photos / "list.txt"])] == [
        photos / "c_blue.jpg",
        photos / "sub/d_white.webp",
    ]
    items = find_items([photos / "table.csv"], column="file")
    assert [(item.name, item.fields["question"]) for item in items] == [
        ("a_red.png", "what color?"),
        ("c_blue.jpg", "how big?"),
    ]
    with pytest.raises(InputError, match=r"table\.csv: line 2 .*'image'"):
        find_items([photos / "table.csv"])
    for name in ("list.txt", "table.csv"):
        (photos / name).unlink()


def test_sources_without_images_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="nothing_here"):
        find_items([photos / "nothing_here"])
    with pytest.raises(InputError, match=str(tmp_path)):
        find_items([tmp_path])


def test_images_in_memory_give_what_their_files_give(photos: Path, tiny: Callable[[str], Loaded]) -> None:
    process = tiny("blip_caption/tiny").process_image
    image = Image.open(photos / "a_red.png")
    array = np.asarray(image)
    forms: list[Any] = [photos / "a_red.png", str(photos / "a_red.png"), image, array]
    forms += [torch.from_numpy(array.copy()).permute(2, 0, 1), process(image)]
    tensors = [load_image(Item(name="it", image=form), process) for form in forms]
    assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)
    with pytest.raises(TypeError, match="float64"):
        load_image(Item(name="it", image=array / 255), process)


def test_read_ahead_keeps_the_order_and_raises_in_turn() -> None:
    def read(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number * number

    assert list(read_ahead(range(3), read, num_threads=2, ahead=2)) == [(0, 0), (1, 1), (2, 4)]
    found = read_ahead(range(5), read, num_threads=3, ahead=4)
    assert [next(found)[1] for _ in range(3)] == [0, 1, 4]
    with pytest.raises(ValueError, match="three"):
        next(found)


def test_a_batch_that_does_not_fit_is_divided() -> None:
    sizes = []

    def double(batch: Any) -> list[int]:
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [2 * number for number in batch]

    sizer: BatchSizer[int, int] = BatchSizer(double, size=8, device=torch.device("cpu"))
    assert list(sizer(range(11))) == [2 * number for number in range(11)]
    assert sizes[:4] == [8, 4, 2, 2]
    assert max(sizes[4:]) == 2

    def broken(batch: Any) -> list[int]:
        raise RuntimeError("another error")

    with pytest.raises(RuntimeError, match="another error"):
        list(BatchSizer(broken, size=2, device=torch.device("cpu"))(range(2)))


def test_captions_are_those_of_the_model(photos: Path, tiny: Callable[[str], Loaded]) -> None:
    loaded = tiny("blip_caption/tiny")
    pipe = CaptionPipeline(loaded, batch_size=3)
    results = list(pipe(photos, num_beams=2, num_captions=2, scores=True))
    image = torch.stack([loaded.process_image(Image.open(photos / name).convert("RGB")) for name in COLORS])
    expected = loaded.model.generate({"image": image}, num_beams=2, num_captions=2, return_scores=True)
    assert [result["image"] for result in results] == [str(photos / name) for name in COLORS]
    assert [text for result in results for text in result["captions"]] == [text for text, _ in expected]
    assert [score for result in results for score in result["scores"]] == pytest.approx(
        [score for _, score in expected], abs=1e-3
    )
    one = pipe(str(photos / "a_red.png"), num_beams=2, prompt="a ")
    assert one["caption"] == loaded.model.generate({"image": image[:1], "prompt": "a "}, num_beams=2)[0]


def test_a_broken_file_is_an_error_or_a_result(photos: Path, tiny: Callable[[str], Loaded], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("not a picture")
    pipe = CaptionPipeline(tiny("blip_caption/tiny"), batch_size=2)
    paths = [photos / "a_red.png", tmp_path / "broken.png", photos / "b_green.png"]
    with pytest.raises(UnreadableSample, match=r"broken\.png"):
        list(pipe(paths))
    results = list(pipe(paths, skip_unreadable=True))
    assert ["error" in result for result in results] == [False, True, False]


def test_answers_to_one_or_each_question_and_from_a_list(photos: Path, tiny: Callable[[str], Loaded]) -> None:
    loaded = tiny("blip_vqa/tiny")
    pipe = AskPipeline(loaded, batch_size=4)
    results = list(pipe(photos, question=["What color?", "How big?", "what color?", "is it?"]))
    assert [result["question"] for result in results] == ["What color?", "How big?", "what color?", "is it?"]
    image = torch.stack([loaded.process_image(Image.open(photos / name).convert("RGB")) for name in COLORS])
    questions = ["what color?", "how big?", "what color?", "is it?"]  # as the processor makes them
    expected = loaded.model.predict_answers({"image": image, "text_input": questions}, inference_method="generate")
    assert [result["answer"] for result in results] == expected
    ranked = list(pipe(photos, question="what color?", answers=["red", "green"]))
    assert {result["answer"] for result in ranked} <= {"red", "green"}
    with pytest.raises(InputError, match="3 texts for 4 images"):
        pipe(photos, question=["a", "b", "c"])


@pytest.mark.parametrize("name", ["blip_image_text_matching/tiny", "blip2/tiny"])
def test_match_scores_every_text_for_every_image(name: str, photos: Path, tiny: Callable[[str], Loaded]) -> None:
    loaded = tiny(name)
    texts = ["a red circle", "a blue square", "two dogs"]
    results = list(MatchPipeline(loaded, batch_size=2)(photos, texts=texts))
    image = torch.stack([loaded.process_image(Image.open(photos / file).convert("RGB")) for file in COLORS])
    for column, text in enumerate(texts):
        expected = loaded.model.match_scores({"image": image, "text_input": [text] * 4})
        for key, values in expected.items():
            found = [result["scores"][column][key] for result in results]
            assert found == pytest.approx(values.tolist(), abs=1e-5)
    assert [one["text"] for one in results[0]["scores"]] == texts


def test_features_are_the_projected_ones_of_unit_length(photos: Path, tiny: Callable[[str], Loaded]) -> None:
    loaded = tiny("blip_feature_extractor/tiny")
    results = list(EmbedPipeline(loaded)(photos))
    image = torch.stack([loaded.process_image(Image.open(photos / file).convert("RGB")) for file in COLORS])
    expected = loaded.model.extract_features({"image": image}, mode="image").image_embeds_proj[:, 0]
    assert np.allclose(np.stack([result["features"] for result in results]), expected.numpy(), atol=1e-6)
    assert np.allclose(np.linalg.norm(results[0]["features"]), 1)
    queries = next(EmbedPipeline(tiny("blip2/tiny"))([photos / "a_red.png", photos / "b_green.png"]))
    assert queries["features"].ndim == 2


def test_a_model_that_cannot_do_the_task_is_refused(tiny: Callable[[str], Loaded]) -> None:
    with pytest.raises(InputError, match=r"BlipCaption.*blip_vqa"):
        AskPipeline(tiny("blip_caption/tiny"))
    with pytest.raises(InputError, match=r"'captoin'.*'caption'"):
        lavis_lite.pipeline("captoin")
    with pytest.raises(KeyError, match=r"blip_caption/tinny.*'tiny'"):
        load("blip_caption/tinny")


def test_an_index_finds_an_image_by_itself_and_follows_the_folder(
    photos: Path, tiny: Callable[[str], Loaded], tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a_red.png", "b_green.png", "c_blue.jpg"):
        (folder / name).write_bytes((photos / name).read_bytes())
    pipe = EmbedPipeline(tiny("blip_retrieval/tiny"))
    index = ImageIndex(folder, pipe, storage=tmp_path / "index")
    index.update()
    best = index.by_image(photos / "c_blue.jpg", k=2)
    assert best[0].image == str(folder / "c_blue.jpg")
    assert best[0].score == pytest.approx(1, abs=1e-5)
    hits = index.by_text("a red circle", k=3)
    text = pipe.texts(["a red circle"])[0]
    assert [hit.score for hit in hits] == pytest.approx(sorted(index.features @ text, reverse=True), abs=1e-6)
    reranked = index.by_text("a red circle", k=3, rerank=2)
    assert {hit.image for hit in reranked[:2]} == {hit.image for hit in hits[:2]}
    assert reranked[2] == hits[2]

    (folder / "a_red.png").unlink()
    Image.new("RGB", (30, 30), "white").save(folder / "new.png")
    read: list[str] = []
    again = ImageIndex(folder, pipe, storage=tmp_path / "index")
    again.update(lambda results, total: (read.append(result["image"]) or result for result in results))
    assert read == [str(folder / "new.png")]
    assert [entry[0] for entry in again.files] == [
        str(folder / name) for name in ("b_green.png", "c_blue.jpg", "new.png")
    ]
    other = EmbedPipeline(tiny("blip_image_text_matching/tiny"))
    assert len(ImageIndex(folder, other, storage=tmp_path / "index").files) == 0


# Output


def test_results_survive_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    rows = [{"image": f"{number}.png", "caption": f"text {number}"} for number in range(4)]
    with Results(out, {"model": "m"}) as results:
        results.add(rows[1])
        results.add(rows[0])
    with Path(f"{out}.partial").open("a") as file:
        file.write('{"image": "2.png", "capt')
    with pytest.raises(FileExistsError, match="--resume"):
        Results(out, {"model": "m"})
    with pytest.raises(InputError, match="model 'm', now 'other'"):
        Results(out, {"model": "other"}, resume=True)
    again = Results(out, {"model": "m"}, resume=True)
    assert sorted(again.rows) == sorted(map(key_of, rows[:2]))
    with again as results:
        results.add(rows[3])
        results.add(rows[2])
        assert results.finish([key_of(row) for row in rows]) == rows
    results.remove_partial()
    assert list(tmp_path.iterdir()) == []


def run(*arguments: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_caption_writes_a_table_and_refuses_to_replace_it(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.csv"
    command = ("caption", photos, "--model", "blip_caption/tiny", "--device", "cpu", "--out", out)
    run(*command, "--trigger", "sks", "--max-words", 2)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [str(photos / name) for name in COLORS]
    assert all(row["caption"].startswith("sks, ") and len(row["caption"].split()) == 3 for row in rows)
    assert "--overwrite" in run(*command, code=2).stderr
    run(*command, "--overwrite", "--num-captions", 2, "--scores")
    assert len(json.loads(next(csv.DictReader(out.open(newline="")))["captions"])) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["captions.csv"]


def test_sidecars_are_beside_their_images(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a_red.png", "b_green.png"):
        (folder / name).write_bytes((photos / name).read_bytes())
    (folder / "broken.png").write_text("not a picture")
    command = ("caption", folder, "--model", "blip_caption/tiny", "--device", "cpu", "--sidecars")
    result = run(*command)
    assert "broken.png" in result.stderr
    assert "1 image could not be read" in result.stderr
    assert sorted(path.name for path in folder.glob("*.txt")) == ["a_red.txt", "b_green.txt"]
    (folder / "a_red.txt").write_text("mine")
    run(*command, code=2)
    run(*command, "--resume", code=1)  # the broken file is all that is left
    assert (folder / "a_red.txt").read_text() == "mine"


def test_ask_takes_the_questions_of_a_table(photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    lines = [{"photo": str(photos / "a_red.png"), "q": text} for text in ("what color?", "how big?")]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "answers.jsonl"
    model = ("--model", "blip_vqa/tiny", "--device", "cpu")
    run("ask", table, *model, "--image-column", "photo", "--question-column", "q", "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["question"] for row in rows] == ["what color?", "how big?"]
    assert all(row["answer"] for row in rows)
    run("ask", table, *model, code=2)
    assert (
        "'question'"
        in run("ask", table, *model, "--image-column", "photo", "--question-column", "question", code=2).stderr
    )


def test_match_and_embed_from_the_command_line(photos: Path, tmp_path: Path) -> None:
    model = ("--model", "blip_image_text_matching/tiny", "--device", "cpu")
    printed = run("match", photos / "a_red.png", *model, "-t", "a red circle").stdout
    name, scores = printed.strip().split("\t")
    assert name == str(photos / "a_red.png")
    assert json.loads(scores)[0]["text"] == "a red circle"
    out = tmp_path / "features.npy"
    run("embed", photos, *model, "--out", out)
    assert np.load(out).shape[0] == 4 == len((tmp_path / "features.ids.txt").read_text().splitlines())
    found = run("search", photos, "a red circle", *model, "-k", 2, "--index", tmp_path / "index").stdout
    assert len(found.splitlines()) == 2


def test_features_of_texts_compare_with_those_of_images(photos: Path, tmp_path: Path) -> None:
    loaded = load("blip_feature_extractor/tiny", device="cpu")
    torch.save({"model": loaded.model.state_dict()}, tmp_path / "weights.pth")
    model = ("--model", "blip_feature_extractor/tiny", "--checkpoint", tmp_path / "weights.pth", "--device", "cpu")
    lines, out = tmp_path / "lines.txt", tmp_path / "texts.npy"
    lines.write_text("a red circle\n\na blue cross\n")
    run("embed", lines, *model, "--texts", "--out", out)
    samples = {"text_input": ["a red circle", "a blue cross"]}
    expected = loaded.model.extract_features(samples, mode="text").text_embeds_proj[:, 0]
    assert torch.allclose(torch.from_numpy(np.load(out)), expected, atol=1e-6)
    assert out.with_suffix(".ids.txt").read_text() == "a red circle\na blue cross\n"
    assert "--overwrite" in run("embed", lines, *model, "--texts", "--out", out, code=2).stderr
    lines.write_text("\n")
    assert "no text" in run("embed", lines, *model, "--texts", "--out", tmp_path / "x.npy", code=2).stderr


@pytest.mark.parametrize(("stopped_by", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_features_that_were_computed_before_a_stop_are_kept(
    stopped_by: str, code: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights come from a file, so that both runs have the same."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process ignores it
    loaded = load("blip_feature_extractor/tiny", device="cpu")
    torch.save({"model": loaded.model.state_dict()}, tmp_path / "weights.pth")
    model = ("--model", "blip_feature_extractor/tiny", "--checkpoint", tmp_path / "weights.pth", "--device", "cpu")
    command = ("embed", photos, *model, "--batch-size", 1, "--out")
    run(*command, tmp_path / "whole.npy")
    stream = EmbedPipeline.stream

    def two(self: Any, items: Any, **settings: Any) -> Any:
        for number, row in enumerate(stream(self, items, **settings)):
            if number == 2:
                os.kill(os.getpid(), getattr(signal, stopped_by))
            yield row

    out = tmp_path / "features.npy"
    monkeypatch.setattr(EmbedPipeline, "stream", two)
    stopped = run(*command, out, code=code)
    signal.signal(signal.SIGINT, before)
    assert f"stopped by {stopped_by}" in stopped.stderr
    assert "2 results are kept" in stopped.stderr
    assert not out.exists()
    seen: list[Any] = []

    def rest(self: Any, items: Any, **settings: Any) -> Any:
        seen.append(items)
        return stream(self, items, **settings)

    monkeypatch.setattr(EmbedPipeline, "stream", rest)
    assert "--resume" in run(*command, out, code=2).stderr
    run(*command, out, "--resume")
    assert [len(items) for items in seen] == [2]
    assert np.array_equal(np.load(out), np.load(tmp_path / "whole.npy"))
    assert not list(tmp_path.glob("features.npy.partial*"))
    assert "finished already" in run(*command, out, "--resume").stderr


def test_a_model_that_cannot_do_it_is_refused_before_it_is_loaded(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lavis_lite.inference.loading.load", lambda *_, **__: pytest.fail("loaded"))
    assert "BlipVQA" in run("caption", photos, "--model", "blip_vqa/vqav2", code=2).stderr
    assert "BlipCaption" in run("embed", photos, "--model", "blip_caption/base_coco", code=2).stderr
    assert "BlipCaption" in run("search", photos, "red", "--model", "blip_caption/base_coco", code=2).stderr
    with pytest.raises(InputError, match="BlipCaption"):
        lavis_lite.pipeline("ask", model="blip_caption/base_coco")


def test_a_failed_start_leaves_no_unfinished_output(photos: Path, tmp_path: Path) -> None:
    for model in (("blip_caption/tiny", "--checkpoint", "gone.pth"), ("blip_vqa/tiny",)):
        run("caption", photos, "--device", "cpu", "--out", tmp_path / "captions.csv", "--model", *model, code=2)
    assert not list(tmp_path.glob("captions*"))


def test_blank_questions_and_unknown_recipes_are_refused(photos: Path) -> None:
    assert "blank" in run("ask", photos, "--model", "blip_vqa/tiny", "--question", " ", code=2).stderr
    assert "blip/eval/nlvr" in run("recipes", "blip/eval/nlvrr", code=2).stderr


def test_the_doctor_names_every_extra_that_users_install() -> None:
    content = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    extras = content["project"]["optional-dependencies"].keys() - {"test", "docs"}
    printed = run("doctor").stdout
    assert [extra for extra in sorted(extras) if f"(extra `{extra}`)" not in printed] == []


def test_a_mistyped_architecture_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"blip_captoin/tiny.*Did you mean blip_caption/tiny"):
        load("blip_captoin/tiny")
    with pytest.raises(UnknownNameError, match=r"model blip_captoin: no architecture.*Did you mean 'blip_caption'"):
        load("blip_captoin")


def test_chat_answers_lines_until_the_end(photos: Path) -> None:
    result = CliRunner().invoke(
        app,
        [
            "chat",
            str(photos / "a_red.png"),
            "--model",
            "blip2_t5_instruct/tiny",
            "--device",
            "cpu",
            "--max-length",
            "5",
        ],
        input="what color is it?\nand now?\n/image nowhere.png\n/quit\n",
    )
    assert result.exit_code == 0, result.output
    assert "nowhere.png" in result.stderr
    assert result.stdout.count("> ") == 4


def test_lists_of_models_and_recipes(tmp_path: Path) -> None:
    assert "blip_caption/base_coco" in run("models").stdout.split()
    assert run("models", "blip_vqa").stdout.split() == [
        f"blip_vqa/{kind}" for kind in lavis_lite.model_zoo.types("blip_vqa")
    ]
    assert "'blip_vqa'" in run("models", "blip_vqq", code=2).stderr
    assert "blip/eval/caption_coco" in run("recipes", "blip", "caption").stdout.split()
    copy = tmp_path / "mine.yaml"
    run("recipes", "blip2/eval/ret_coco", "--copy", copy)
    from lavis_lite.common.config.config import Config

    assert Config.from_file(copy).model == Config.from_file("blip2/eval/ret_coco").model
    run("recipes", "blip2/eval/ret_coco", "--copy", copy, code=2)


def test_doctor_reports_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    report = run("doctor").stdout
    assert ["torch", version("torch")] in [line.split() for line in report.splitlines()]
    assert "not asked" in report
    assert "java" in report


def test_help_of_the_commands_loads_no_torch() -> None:
    driver = "import sys; sys.modules['torch'] = None; from lavis_lite.cli.app import app; app()"
    for name in ("caption", "ask", "match", "embed", "search", "chat", "demo", "models", "recipes", "doctor"):
        done = subprocess.run(
            [sys.executable, "-c", driver, name, "--help"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "Usage" in done.stdout


# What only several processes, a kill, a server or another format show


def command_line(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "lavis_lite", *map(str, arguments)]


@pytest.mark.slow
def test_two_processes_share_the_images_and_write_one_file(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("not a picture")
    model = ("--model", "blip_caption/tiny", "--device", "cpu", "--option", "prompt=''")
    alone, shared = tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    # random weights: `load` seeds nothing, so both read one checkpoint
    torch.manual_seed(0)
    weights = tmp_path / "weights.pth"
    torch.save({"model": load("blip_caption/tiny", device="cpu").model.state_dict()}, weights)
    command = ("caption", photos, tmp_path / "broken.png", *model, "--checkpoint", weights, "--batch-size", "1")
    run(*command, "--out", alone)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master-port={free_port()}"]
    done = subprocess.run(
        [*torchrun, "-m", "lavis_lite", *map(str, command), "--out", str(shared)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert shared.read_text() == alone.read_text()
    assert done.stderr.count("skipped:") == 1
    assert sorted(tmp_path.glob("shared*")) == [shared]


@pytest.mark.slow
def test_a_killed_command_resumes_with_what_is_missing(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(40):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(folder / f"{number:02}.png")
    out = tmp_path / "captions.csv"
    model = ("--model", "blip_caption/tiny", "--device", "cpu", "--batch-size", "1", "--num-beams", "3")
    arguments = ("caption", folder, *model, "--out", out)
    partial = Path(f"{out}.partial")
    process = subprocess.Popen(command_line(*arguments), env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 200
        while not (partial.is_file() and partial.read_text().count("\n") > 3) and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    kept = partial.read_text().splitlines()
    assert 3 < len(kept) < 41, "killed too early or too late"
    assert "--resume" in run(*arguments, code=2).stderr
    run(*arguments, "--resume")
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["image"]).name for row in rows] == [f"{number:02}.png" for number in range(40)]
    before = [json.loads(line) for line in kept[1:] if line.endswith("}")]
    assert [row["caption"] for row in rows][: len(before)] == [row["caption"] for row in before]
    assert not partial.exists()


def test_images_by_url(
    photos: Path, tiny: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LAVIS_LITE_CACHE", str(tmp_path))
    handler = partial(SimpleHTTPRequestHandler, directory=str(photos))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/a_red.png"
        pipe = CaptionPipeline(tiny("blip_caption/tiny"))
        assert pipe(address)["caption"] == pipe(photos / "a_red.png")["caption"]
        assert "error" in next(iter(pipe([f"{address}.missing", address], skip_unreadable=True)))
        server.shutdown()


def test_parquet_and_json_have_the_rows_of_jsonl(photos: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    model = ("--model", "blip_image_text_matching/tiny", "--device", "cpu", "--checkpoint", tmp_path / "weights.pth")
    torch.save({"model": load("blip_image_text_matching/tiny", device="cpu").model.state_dict()}, model[-1])
    for ending in ("jsonl", "json", "parquet", "tsv"):
        run("match", photos, *model, "-t", "a red circle", "--out", tmp_path / f"scores.{ending}")
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == len(COLORS)
    assert json.loads((tmp_path / "scores.json").read_text()) == rows
    assert parquet.read_table(tmp_path / "scores.parquet").to_pylist() == rows
    with (tmp_path / "scores.tsv").open(newline="") as file:
        assert [json.loads(row["scores"]) for row in csv.DictReader(file, delimiter="\t")] == [
            r["scores"] for r in rows
        ]
    run("embed", photos, *model, "--out", tmp_path / "features.parquet")
    table = parquet.read_table(tmp_path / "features.parquet").to_pylist()
    assert [row["image"] for row in table] == [row["image"] for row in rows]
    assert np.linalg.norm(table[0]["features"]) == pytest.approx(1, abs=1e-5)


def test_batches_grow_on_a_gpu_while_half_of_the_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([(90, 100), (60, 100), (40, 100)])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: next(free))
    sizes: list[int] = []

    def note(batch: Any) -> list[int]:
        sizes.append(len(batch))
        return list(batch)

    assert list(BatchSizer(note, size=None, device=torch.device("cuda"))(range(160))) == list(range(160))
    assert sizes == [8, 16, 32, 32, 32, 32, 8]


def test_options_without_effect_are_refused(photos: Path) -> None:
    model = ("--model", "blip_caption/tiny", "--device", "cpu")
    for flag in ("--resume", "--overwrite"):
        assert "--out" in run("caption", photos, *model, flag, code=2).stderr
    for command in (("caption", photos, "--out", "captions.csv"), ("embed", photos)):
        assert "one of them" in run(*command, *model, "--resume", "--overwrite", code=2).stderr
    rerank = ("--image", photos / "a_red.png", "--rerank", 3)
    assert "--rerank" in run("search", photos, *rerank, code=2).stderr
    assert "VALUE" in run("caption", photos, *model, "--option", "prompt", code=2).stderr


def test_a_checkpoint_of_train_brings_its_model(tmp_path: Path, shapes_data: Path) -> None:
    assert cli_helpers.train(cli_helpers.project(tmp_path, "caption"), "run.max_iters=1") == 0
    checkpoint = tmp_path / "output" / "job" / "checkpoint_last.pth"
    picture = next(shapes_data.rglob("*.jpg"))
    loaded = load(str(checkpoint), device="cpu")
    assert type(loaded.model).__name__ == "BlipCaption"
    caption = CaptionPipeline(loaded)(picture)["caption"]
    assert run("caption", picture, "--model", checkpoint, "--device", "cpu").stdout.strip().split("\t")[1] == caption


def test_a_copied_recipe_keeps_its_text_and_finds_its_bases(tmp_path: Path) -> None:
    from lavis_lite.common.config.config import Config

    for name in ("blip/quickstart/caption", "blip2/eval/ret_coco", "instructblip/train/lora"):
        copy = tmp_path / f"{name.replace('/', '_')}.yaml"
        run("recipes", name, "--copy", copy)
        assert Config.from_file(copy).to_dict() == Config.from_file(name).to_dict()
    assert "max_iters: 250" in (tmp_path / "blip_quickstart_caption.yaml").read_text()


def test_states_are_of_the_class_token_or_the_mean_without_one(photos: Path) -> None:
    image = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    plain = load("blip_feature_extractor/tiny", device="cpu")
    states = plain.model.extract_features({"image": image}, mode="image").image_embeds
    assert torch.equal(EmbedPipeline(plain).image_features(image, "states"), states[:, 0])
    other = load("blip_feature_extractor/tiny", device="cpu", vit_type="resnet18")
    states = other.model.extract_features({"image": image}, mode="image").image_embeds
    assert torch.allclose(EmbedPipeline(other).image_features(image, "states"), states.mean(dim=1))
