"""What is checked before weights are loaded: files, samples, sizes, task and model, and what evaluation will need."""

import json
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cli_helpers
import pytest
import torch
from full_size import TINY_HF
from PIL import Image
from test_bad_input import captions, complains, six
from test_runner import ToyTask, checkpoint, last, make

from lavis_lite.cli import preflight
from lavis_lite.common.config.agreement import model_setting
from lavis_lite.common.config.run import RunConfig
from lavis_lite.common.errors import SettingError
from lavis_lite.common.optim import build_schedule
from lavis_lite.common.registry import registry
from lavis_lite.common.sources import download
from lavis_lite.models.base import BaseModel
from lavis_lite.tasks.base import BaseTask
from lavis_lite.tasks.captioning import CaptionTask
from lavis_lite.tasks.instruct import InstructTask
from lavis_lite.tasks.vqa import VQATask

pytestmark = pytest.mark.usefixtures("shapes_data")

DRY = ["--dry-run"]
EVALUATED = {"run": {"max_iters": 1, "valid_splits": [], "test_splits": ["test"]}}


# Files


@pytest.mark.parametrize("flags", [DRY, []])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_image_is_found_before_anything_is_built(
    flags: list[str], split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that no sample of the few that are read has."""
    monkeypatch.setitem(preflight.NUM_READ, "image", 1)
    monkeypatch.setattr(BaseTask, "build_model", lambda *_: pytest.fail("weights were loaded"))
    records = six(tmp_path)
    gone = [{"image": str(tmp_path / f"gone{i}.png"), "caption": "a red circle"} for i in range(2)]
    lists = {name: [*records, *gone] if name == split else records for name in ("train", "test")}
    path = cli_helpers.project(tmp_path, "caption", captions(tmp_path, lists["train"], test=lists["test"]), EVALUATED)
    rule = "Evaluation never skips samples" if split == "test" else "set run.max_unreadable_share"
    where = f"{gone[0]['image']} (caption/{split}, and 1 more of 8 files)"
    complains(
        capsys, cli_helpers.train(path, flags=flags), "image file not found: ", where, "build_info.images.storage", rule
    )


def test_training_may_lack_the_share_that_is_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    records = six(tmp_path)
    Path(records[4]["image"]).unlink()
    path = cli_helpers.project(
        tmp_path, "caption", captions(tmp_path, records), {"run": {"max_iters": 1, "test_splits": []}}
    )
    options = ["run.valid_splits=[]", "run.batch_size_train=2"]
    assert cli_helpers.train(path, *options, "run.max_unreadable_share=0.2", flags=DRY) == 0
    assert "1 samples will be skipped, as run.max_unreadable_share=0.2 allows" in caplog.text
    capsys.readouterr()
    code = cli_helpers.train(path, *options, "run.max_unreadable_share=0.1", flags=DRY)
    complains(capsys, code, "picture4.png", "1 samples, more than run.max_unreadable_share=0.1 allows")


def test_a_dataset_that_looks_elsewhere_is_not_held_up(tmp_path: Path) -> None:
    """The user's own class may make other paths of its records, without saying so in `files_of`."""
    from lavis_lite.datasets.pairs import PairsDataset

    class Elsewhere(PairsDataset):
        def __getitem__(self, index: int) -> dict[str, Any]:
            """As a pair, from a folder below."""
            return {"image": self.image(f"images/{self.annotation[index]['image']}")}

    six(tmp_path)
    path = tmp_path / "own.json"
    path.write_text(json.dumps([{"image": f"picture{i}.png", "caption": "a"} for i in range(6)]))
    assert preflight.check_files(Elsewhere([path], tmp_path, split="val"), "own/val", share=None) == set()
    with pytest.raises(FileNotFoundError, match=r"picture0\.png \(own/val, and 5 more of 6 files\)"):
        preflight.check_files(PairsDataset([path], tmp_path, split="val"), "own/val", share=None)


def test_folders_pipes_and_empty_files_are_not_images(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "whole").write_text("x")
    names = ["folder", "empty", "whole", "gone", "whole/below", "n" * 300, "nul\0"]
    found = preflight.wrong_files([f"{tmp_path}/{name}" for name in names])
    reasons = {Path(path).name: reason for path, reason in found.items()}
    assert {key: reasons[key] for key in ("folder", "empty", "gone", "below")} == {
        "folder": "is not a file",
        "empty": "is empty",
        "gone": "not found",
        "below": "not found",
    }
    assert reasons["n" * 300].startswith("not readable (")
    assert reasons["nul\0"].startswith("not readable (")
    assert "whole" not in reasons


def test_many_files_are_found_in_any_number_of_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "CHUNK", 3)
    paths = [tmp_path / str(number) for number in range(20)]
    for path in paths[::2]:
        path.write_text("x")
    assert list(preflight.wrong_files(map(str, paths))) == sorted(str(path) for path in paths[1::2])


@pytest.mark.parametrize("name", cli_helpers.RECIPES)
def test_every_dataset_knows_the_files_that_it_opens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `files_of` says is what reading a sample opens."""
    from lavis_lite.datasets import base

    opened: list[str] = []
    whole = base.open_image
    monkeypatch.setattr(base, "open_image", lambda path, **own: (opened.append(str(path)), whole(path, **own))[1])
    from lavis_lite.common.config.config import Config

    cfg = Config.from_file(cli_helpers.project(tmp_path, name))
    for splits in registry.get_task_class(cfg.run.task)(**cfg.task).build_datasets(cfg).values():
        for dataset in splits.values():
            opened.clear()
            dataset[len(dataset) - 1]
            assert sorted(opened) == sorted(str(dataset.vis_root / f) for f in dataset.files_of(dataset.annotation[-1]))


def test_some_of_each_split_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of few samples each one; a file that is there may still be cut short."""
    paths = cli_helpers.pictures(tmp_path / "images", 24)
    records = [{"image": path, "caption": f"a red circle {i}"} for i, path in enumerate(paths)]
    broken = Path(paths[20])
    broken.write_bytes(broken.read_bytes()[:40])
    path = cli_helpers.project(
        tmp_path, "caption", captions(tmp_path, six(tmp_path / "other"), test=records), EVALUATED
    )
    complains(capsys, cli_helpers.train(path, flags=DRY), "image file broken", str(broken), "Evaluation never skips")
    assert cli_helpers.train(path, "run.test_splits=[]", flags=DRY) == 0


@pytest.mark.parametrize(("length", "expected"), [(3, [0, 1, 2]), (100, [0, 25, 50, 75]), (4, [0, 1, 2, 3]), (0, [])])
def test_what_is_read_is_spread_over_the_split(length: int, expected: list[int]) -> None:
    assert preflight.read_some(range(length), "set/val", count=4, share=None) == expected


def test_the_dry_run_tells_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = six(tmp_path)
    path = cli_helpers.project(
        tmp_path, "caption", captions(tmp_path, [*records, records[0]], test=records[:2]), EVALUATED
    )
    assert cli_helpers.train(path, "run.batch_size_train=2", flags=DRY) == 0
    out = capsys.readouterr().out
    repeated = "1 records repeat an earlier one"
    assert f"files       caption/train: 6 image files found; {repeated}; 7 samples read, images 3 x 48 x 48" in out
    assert "files       caption/test: 2 image files found; 2 of them also trained on; 2 samples read" in out
    assert "device      cpu" in out


def test_the_dry_run_names_weights_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may come before the pretraining that makes them, so it is no error."""
    path, there = cli_helpers.project(tmp_path, "caption"), tmp_path / "there.pth"
    there.touch()
    assert cli_helpers.train(path, "model.pretrained=/no/a.pth", flags=["--dry-run", "--resume", "/no/b.pth"]) == 0
    out = capsys.readouterr().out
    assert "not found: /no/a.pth (model.pretrained)" in out
    assert "not found: /no/b.pth (run.resume_ckpt_path)" in out
    for options in (["model.pretrained=/no/a.pth", "model.load_pretrained=false"], [f"model.pretrained={there}"]):
        assert cli_helpers.train(path, *options, flags=["--dry-run"]) == 0
        assert "not found" not in capsys.readouterr().out


def test_a_shortest_text_above_the_longest_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for recipe in ("caption", "vqa_generate"):
        path = cli_helpers.project(tmp_path, recipe)
        assert cli_helpers.train(path, "run.max_len=4", "run.min_len=5", flags=["--dry-run"]) == 2
        assert "run.min_len=5 is above run.max_len=4" in capsys.readouterr().err


def test_a_dry_run_needs_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cli_helpers.project(tmp_path, "caption", EVALUATED)
    assert cli_helpers.train(path, "run.device=cuda:7", flags=DRY) == 0
    assert "device      not checked on this machine: run.device='cuda:7' needs CUDA device 7" in capsys.readouterr().out
    complains(capsys, cli_helpers.train(path, "run.device=cuda:7"), "needs CUDA device 7")


# Sizes


@pytest.mark.parametrize("flags", [DRY, []])
def test_a_sample_has_the_size_that_the_model_takes(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In training as in evaluation, which would only begin after an epoch."""
    for key in ("train", "eval"):
        option = f"datasets.shapes_caption.vis_processor.{key}.image_size=64"
        path = cli_helpers.project(tmp_path, "caption", EVALUATED)
        complains(capsys, cli_helpers.train(path, option, flags=flags), f"{key}.image_size: 64 is not model.image_size")


def test_a_processor_of_the_users_makes_the_size_that_the_model_takes() -> None:
    with pytest.raises(ValueError, match=r"own/val: .*64 x 64.*48 x 48"):
        preflight.check_size(
            {"arch": "blip_caption", "image_size": 48}, {"image": torch.zeros(1, 3, 64, 64)}, "own/val"
        )


def test_videos_are_for_models_that_take_them() -> None:
    video = {"image": torch.zeros(1, 3, 4, 48, 48)}
    with pytest.raises(ValueError, match=r"own/val: samples show videos, \(3, 4, 48, 48\), and blip_nlvr takes images"):
        preflight.check_size({"arch": "blip_nlvr", "image_size": 48}, video, "own/val")
    with pytest.raises(ValueError, match="blip2 takes images only"):
        preflight.check_size({"arch": "blip2", "image_size": 48}, video, "own/val")
    for arch in ("blip2_t5_instruct", "blip_vqa", "blip_retrieval"):
        assert preflight.check_size({"arch": arch, "image_size": 48}, video, "own/val") == (3, 4, 48, 48)


@pytest.mark.parametrize("flags", [DRY, []])
@pytest.mark.parametrize("builder", ["coco_caption_instruct", "instruct"])
def test_a_model_that_reads_one_text_takes_no_instructions(
    builder: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would learn to write the instruction: the caption is under `text_output`, which it does not read."""
    records = [{**record, "output": record["caption"]} for record in six(tmp_path)]
    learned = "output" if builder == "instruct" else "caption"
    changes = captions(tmp_path, records)
    section = changes["datasets"]["caption"]
    section |= {"builder": builder, "instructions": {"output": learned, "train": ["Describe it."]}}
    section["build_info"]["images"] = {"storage": str(tmp_path)}
    run = {"run": {"max_iters": 1, "valid_splits": [], "test_splits": []}}
    code = cli_helpers.train(cli_helpers.project(tmp_path, "caption", changes, run), flags=flags)
    complains(
        capsys,
        code,
        "caption/train: samples have a question or an instruction (text_input: 'Describe it.')",
        "blip_caption reads text_input alone, and would learn that; choose a dataset of captions, or ",
    )


def test_models_that_learn_answers_are_those_with_a_language_model() -> None:
    own = {name: registry.get_model_class(name) for name in registry.list_models()}
    taking = {n for n, c in own.items() if c.__module__.startswith("lavis_lite.") and c.learns_answers}
    names = "blip_vqa blip2_llm blip2_opt blip2_t5 blip2_t5_instruct blip2_vicuna blip2_vicuna_instruct"
    assert taking == set(names.split())


def test_the_size_of_an_encoder_is_its_own_or_the_constructor_s() -> None:
    assert model_setting({"arch": "blip_caption"}, "image_size") == 224
    assert model_setting({"arch": "blip2", "image_size": 364}, "image_size") == 364


# Task and model


@pytest.mark.parametrize("flags", [DRY, []])
def test_a_task_that_the_model_cannot_do_is_refused_by_name(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cli_helpers.project(tmp_path, "nlvr", {"model": {"arch": "blip_caption"}}, EVALUATED)
    code = cli_helpers.train(path, flags=flags)
    complains(capsys, code, "run.task: multimodal_classification evaluates by `predict`", "tasks that fit: captioning")
    assert not (tmp_path / "output").exists()


def test_a_language_model_classifies_only_into_named_classes() -> None:
    task = registry.get_task_class("multimodal_classification")()
    model_class, batch = registry.get_model_class("blip2_t5_instruct"), {"text_input": ["a dog"]}
    unnamed, named = SimpleNamespace(classes=[]), SimpleNamespace(classes=["no", "yes"])
    with pytest.raises(
        ValueError, match=r"run\.task: Blip2T5Instruct chooses between names .* the test split has none"
    ):
        task.check(model_class, unnamed, batch, split="test")
    task.check(model_class, named, batch, split="test")
    task.check(model_class, unnamed, {**batch, "candidates": [["no", "yes"]]}, split="test")
    task.check(registry.get_model_class("blip_nlvr"), unnamed, batch, split="test")


@pytest.mark.parametrize("recipe", ["caption", "vqa_rank", "retrieval"])
def test_a_split_for_evaluation_is_not_trained_on(
    recipe: str, tmp_path: Path, shapes_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cli_helpers.project(tmp_path, recipe)
    assert cli_helpers.train(path, "run.train_splits=[val]", "run.batch_size_train=2", flags=["--dry-run"]) == 2
    assert "run.train_splits: " in capsys.readouterr().err


def test_every_task_s_methods_are_some_model_s() -> None:
    classes = [registry.get_model_class(name) for name in registry.list_models()]
    tasks = {name: registry.get_task_class(name) for name in registry.list_tasks()}
    for name, task in tasks.items():
        if not task.__module__.startswith("lavis_lite."):
            continue  # another test's, which stays registered
        fitting = [c.__name__ for c in classes if all(callable(getattr(c, m, None)) for m in task.model_methods)]
        assert fitting, name
        has_none = ("image_text_pretrain", "capfilt")  # the latter needs one of two, which it checks itself
        assert bool(task.model_methods) == (name not in has_none), name


def test_ranking_needs_something_to_rank() -> None:
    class Model:
        def generate(self, samples: Any, **arguments: Any) -> list[str]:
            """As a captioner's."""
            raise AssertionError(samples)

        predict_answers = generate

    unlisted = SimpleNamespace(annotation=[{}], answer_list=None)
    with pytest.raises(ValueError, match="answer list"):
        VQATask().check(Model, unlisted, {}, split="val")
    VQATask(inference_method="generate").check(Model, unlisted, {}, split="val")
    with pytest.raises(ValueError, match="'mrr' ranks candidates"):
        InstructTask(metric="mrr").check(Model, unlisted, {"text_input": ["why?"]}, split="val")
    InstructTask(metric="mrr").check(Model, unlisted, {"candidates": [["a"]]}, split="val")


def test_samples_have_what_the_task_reads_in_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Captions of a split without image ids would fail after the first epoch."""
    crossed = {"datasets": {"shapes_caption": None, "shapes_pairs": cli_helpers.SHAPES}}
    path = cli_helpers.project(tmp_path, "caption", crossed, EVALUATED)
    complains(
        capsys, cli_helpers.train(path, flags=DRY), "shapes_pairs/test: CaptionTask evaluates samples by 'image_id'"
    )
    assert cli_helpers.train(path, "run.test_splits=[]", flags=DRY) == 0


# Lengths and answers, for which the model must have room


def recipe(folder: Path, name: str, arch: str | None, *changes: dict[str, Any]) -> Path:
    """A recipe of `cli_helpers`, with the tiny type of another architecture for BLIP's."""
    path = cli_helpers.project(folder, name, *changes)
    if arch is not None:
        tree = cli_helpers.yaml.safe_load(path.read_text()) | {"model": {"arch": arch, "model_type": "tiny"}}
        path.write_text(cli_helpers.yaml.safe_dump(tree))
    return path


PROMPT = "say " + "why " * 80 + "{} now"


@pytest.mark.parametrize("flags", [DRY, []])
@pytest.mark.parametrize(
    ("name", "arch", "options", "words"),
    [
        ("caption", None, ["max_len=66"], ["run.max_len=66: max_length: the text", "at most 65, got 66"]),
        (
            "caption",
            None,
            ["max_len=4", "min_len=1"],
            ["run.max_len=4: the prompt's 4 tokens leave none", "raise max_length"],
        ),
        ("caption", "blip2", ["max_len=130"], ["run.max_len=130: max_length: the text", "at most 129, got 130"]),
        ("caption", "blip2_opt", ["max_len=153"], ["run.max_len=153: ", "context has 160 tokens", "text 161"]),
        ("caption", "blip2_t5", ["max_len=2049"], ["run.max_len=2049: ", "context has 2048"]),
        ("vqa_generate", None, ["max_len=66"], ["run.max_len=66: max_length: the text", "at most 65"]),
        ("vqa_generate", "blip2_opt", ["max_len=150"], ["run.max_len=150: ", "has 160"]),
        ("vqa_rank", "blip2_opt", [f"prompt={PROMPT}"], ["run.inference_method=rank: ", "has 160"]),
    ],
)
def test_lengths_that_do_not_fit_the_model_are_refused_before_the_first_step(
    flags: list[str],
    name: str,
    arch: str | None,
    options: list[str],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, where = recipe(tmp_path, name, arch), f"shapes_{name.partition('_')[0]}/val: "
    complains(capsys, cli_helpers.train(path, *(f"run.{option}" for option in options), flags=flags), where, *words)
    assert not (tmp_path / "output" / "job").exists()


@pytest.mark.slow
def test_the_largest_lengths_that_fit_are_taken(tmp_path: Path) -> None:
    """What the check refuses is what would fail, and nothing else."""
    few = ["run.max_iters=1", "run.test_splits=[]", "run.min_len=1"]
    for number, (arch, most) in enumerate({None: 65, "blip2": 129, "blip2_opt": 152}.items()):
        path = recipe(tmp_path, "caption", arch)
        assert cli_helpers.train(path, *few, f"run.max_len={most}", job=f"job{number}") == 0


@pytest.mark.parametrize("flags", [DRY, []])
@pytest.mark.parametrize("arch", [None, "blip2_opt"])
def test_a_blank_answer_to_rank_is_refused_before_the_first_step(
    flags: list[str], arch: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        {**record, "question": "what?", "answer": "red", "question_id": i} for i, record in enumerate(six(tmp_path))
    ]
    section = cli_helpers.user_set(tmp_path / "own", {"train": records, "val": records})
    (tmp_path / "answers.json").write_text(json.dumps(["yes", ""]))
    questions = section["build_info"]["annotations"]["val"]
    questions["storage"] = [questions["storage"], str(tmp_path / "answers.json")]
    change = {"datasets": {"shapes_vqa": None, "vqa": section}, "run": {"test_splits": []}}
    path = recipe(tmp_path, "vqa_rank", arch, change)
    words = ["vqa/val: run.inference_method=rank: candidate 1 in answer_list: '' is blank"]
    complains(capsys, cli_helpers.train(path, flags=flags), *words)
    assert cli_helpers.train(path, "run.inference_method=generate", "run.max_len=5", "run.max_iters=1") == 0


def test_every_model_that_writes_says_what_it_has_room_for() -> None:
    """By arguments of the method itself."""
    for name in registry.list_models():
        model = registry.get_model_class(name)
        if not model.__module__.startswith("lavis_lite."):
            continue  # another test's, which stays registered
        for method in ("generate", "predict_answers"):
            if hasattr(model, method):
                assert callable(getattr(model, f"check_{method}")), (name, method)


@pytest.mark.parametrize(
    ("task", "setting"),
    [(CaptionTask(), "max_len"), (InstructTask(), "max_len"), (VQATask(inference_method="generate"), "max_len")],
)
def test_a_model_that_does_not_take_a_settings_name_is_refused_before_training(task: Any, setting: str) -> None:
    class Narrow:
        def generate(self, samples: Any, num_beams: int = 3) -> list[str]:
            """As a captioner's."""
            raise AssertionError(samples)

        predict_answers = generate

    class Open:
        def generate(self, samples: Any, **settings: Any) -> list[str]:
            """As the protocol asks."""
            raise AssertionError(samples)

        predict_answers = generate

    nothing = SimpleNamespace(annotation=[], answer_list=["a"])
    with pytest.raises(ValueError, match=rf"^Narrow\.\w+: .*'{setting}'.*num_beams.*\*\*settings"):
        task.check(Narrow, nothing, {}, split="val")
    task.check(Open, nothing, {}, split="val")


@pytest.mark.parametrize("method", ["rank", "generate"])
def test_a_prompt_that_blip_cannot_fill_is_refused_before_training(method: str) -> None:
    """With two placeholders it would fail at the first validation only."""
    task = VQATask(inference_method=method, prompt="{} in {}?", max_len=5)
    batch = {"image": torch.zeros(1, 3, 48, 48, device="meta"), "text_input": ["what?"]}
    with pytest.raises(ValueError, match=r"prompt.*'\{\} in \{\}\?'"):
        task.check_model(
            cli_helpers.build("vqa_rank"), SimpleNamespace(annotation=[], answer_list=["a"]), [batch], split="val"
        )


def test_a_model_without_length_checks_is_not_checked() -> None:
    """A user's own."""

    class Plain(BaseModel):
        def predict_answers(self, samples: Any, **arguments: Any) -> list[str]:
            """As a BLIP's."""
            raise AssertionError(samples)

        generate = predict_answers

    batch = {"image": torch.zeros(1, 3, 48, 48, device="meta"), "text_input": ["what?"]}
    nothing = SimpleNamespace(annotation=[], answer_list=["a"])
    for task in (CaptionTask(max_len=10**5), InstructTask(max_len=10**5), VQATask(max_len=10**5)):
        task.check_model(Plain(), nothing, [batch], split="val")


# Texts in a language that the tokenizer does not have


CHINESE, ENGLISH = ["一只狗在草地上", "两个红色的圆"], ["a red circle", "two blue squares"]


def told_of_unknown(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "are unknown to the tokenizer" in record.getMessage()]


@pytest.mark.parametrize("flags", [DRY, []])
@pytest.mark.parametrize(("arch", "setting"), [(None, "tokenizer=shapes"), ("blip2", "tokenizer=shapes")])
def test_captions_that_the_tokenizer_does_not_know_are_told(
    flags: list[str], arch: str | None, setting: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [{**record, "caption": CHINESE[i % 2]} for i, record in enumerate(six(tmp_path))]
    change = {"run": {"max_iters": 1, "valid_splits": [], "test_splits": []}, "model": {"prompt": ""}}
    path = recipe(tmp_path, "caption", arch, captions(tmp_path, records), change)
    assert cli_helpers.train(path, flags=flags) == 0
    (line,) = told_of_unknown(caplog)
    assert line.startswith(
        f"caption/train: 100% of the tokens of text_input are unknown to the tokenizer of model.{setting}"
    )
    assert f"{CHINESE[0]!r} is read as '[UNK]" in line
    assert "Choose another, or translate the texts" in line


@pytest.mark.parametrize("options", [[], [f"model.opt_model={TINY_HF / 'opt'}"]])
def test_known_texts_and_bytes_are_not_told(
    options: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A single emoji is not worth a line, and a vocabulary of bytes knows every character."""
    texts = CHINESE * 3 if options else [f"{ENGLISH[0]} \N{DOG FACE}", *ENGLISH * 2, ENGLISH[1]]
    records = [{**record, "caption": text} for record, text in zip(six(tmp_path), texts, strict=True)]
    change = {"run": {"valid_splits": [], "test_splits": []}}
    path = recipe(tmp_path, "caption", "blip2_opt" if options else None, captions(tmp_path, records), change)
    assert cli_helpers.train(path, *options, flags=DRY) == 0
    assert not told_of_unknown(caplog)


@pytest.mark.parametrize(
    ("arch", "question", "answer", "expected"),
    [
        (None, ENGLISH[0], CHINESE[0], ["answer tokenizer=shapes"]),
        (None, CHINESE[0], "red", ["text_input tokenizer=shapes"]),
        ("blip2_t5_instruct", ENGLISH[0], CHINESE[0], ["text_output t5_model=tiny_t5"]),
        ("blip2_t5_instruct", CHINESE[0], "red", ["text_input t5_model=tiny_t5", "text_input tokenizer=shapes"]),
        ("blip2_t5", CHINESE[0], "red", ["text_input t5_model=tiny_t5"]),
    ],
)
def test_each_text_is_looked_at_for_the_tokenizers_that_read_it(
    arch: str | None, question: str, answer: str, expected: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = {"question": question, "answer": answer}
    records = [{**record, **own, "question_id": i} for i, record in enumerate(six(tmp_path))]
    section = cli_helpers.user_set(tmp_path / "own", {"train": records})
    change = {"datasets": {"shapes_vqa": None, "vqa": section}, "run": {"valid_splits": [], "test_splits": []}}
    assert cli_helpers.train(recipe(tmp_path, "vqa_generate", arch, change), flags=DRY) == 0
    pattern = r"tokens of (\w+) are unknown to the tokenizer of model\.(\S+),"
    assert [" ".join(re.search(pattern, line).groups()) for line in told_of_unknown(caplog)] == expected


# File arguments


GOLD = [{"image_id": i, "caption": "a red circle"} for i in range(6)]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "no such file: "),
        ("[1]", "is not {"),
        ("{", "broken or truncated JSON"),
        ("[" * 100_000, "cannot be read"),
        ({"annotations": GOLD[:4]}, "has no references for 2 of 6 images of the test split, e.g. image id 4"),
    ],
)
def test_the_file_of_references_is_read_before_anything_is_captioned(
    content: Any, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{**record, "image_id": i} for i, record in enumerate(six(tmp_path))]
    path = cli_helpers.project(tmp_path, "caption", captions(tmp_path, records, test=records), EVALUATED)
    gold = tmp_path / "gold.json"
    if content is not None:
        gold.write_text(content if isinstance(content, str) else json.dumps(content))
    complains(capsys, cli_helpers.train(path, f"run.annotation_file={gold}", flags=DRY), "run.annotation_file: ", text)
    assert cli_helpers.train(path, f"run.annotation_file={gold}", "run.report_metric=false", flags=DRY) == 0
    gold.write_text(json.dumps({"annotations": GOLD}))
    assert cli_helpers.train(path, f"run.annotation_file={gold}", flags=DRY) == 0


def test_the_file_of_references_may_be_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gold = tmp_path / "gold.json"
    gold.write_text(json.dumps({"annotations": GOLD}))
    asked: list[str] = []
    monkeypatch.setattr(download, "fetch", lambda url: asked.append(url) or gold)
    url = "https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json"
    task = CaptionTask(annotation_file=url)
    assert task.references(None) == {str(i): ["a red circle"] for i in range(6)}
    assert asked == [url]


# Settings


@pytest.mark.parametrize(
    "key",
    [
        *(
            "num_workers",
            "batch_size_train",
            "batch_size_eval",
            "max_iters",
            "max_epoch",
            "accum_grad_iters",
            "log_freq",
        ),
        *("init_lr", "lr_layer_decay", "checkpoint_every", "keep_checkpoints", "warmup_steps", "weight_decay", "seed"),
    ],
)
def test_absurd_numbers_are_refused_at_once(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cli_helpers.project(tmp_path, "caption")
    complains(
        capsys, cli_helpers.train(path, f"run.{key}=1e308", flags=DRY), f"run.{key}: expected ", " or less, got 1"
    )


@pytest.mark.parametrize(
    "option",
    [
        *(f"run.{key}=999999999999" for key in ("max_len", "num_beams", "num_captions", "temperature")),
        *(
            f"datasets.shapes_caption.{key}=999999999999"
            for key in ("num_train", "questions_per_image", "gallery_size")
        ),
        *("datasets.shapes_caption.image_size=999999999999", "datasets.shapes_caption.num_val=999999999999"),
    ],
)
def test_absurd_numbers_of_tasks_and_datasets(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli_helpers.train(cli_helpers.project(tmp_path, "caption"), option, flags=DRY)
    complains(capsys, code, option.split("=")[0].split(".")[-1], "number from ")


def test_nan_is_no_number_of_a_setting() -> None:
    for key in ("init_lr", "weight_decay", "lr_layer_decay"):
        with pytest.raises(SettingError, match=f"run.{key}: .* got nan"):
            RunConfig(task="toy", **{key: math.nan})


def test_a_warm_up_longer_than_the_run_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """It is no error: a recipe is tried out with a small run.max_iters."""
    run = RunConfig(task="toy", init_lr=1e-3, warmup_lr=0.0, warmup_steps=1000)
    build_schedule(run, max_epoch=1, iters_per_epoch=2000, total_steps=1000)
    assert not caplog.records
    build_schedule(run, max_epoch=1, iters_per_epoch=2000, total_steps=101)
    expected = "warmup_steps=1,000 is longer than the whole run of 101 steps: the learning rate reaches 0.0001 of"
    assert expected in caplog.text
    caplog.clear()
    run.lr_sched_per_epoch = True
    build_schedule(run, max_epoch=9, iters_per_epoch=500, total_steps=4500)
    assert "longer than the first epoch" in caplog.text


# The start and the end


def test_a_run_says_what_it_is_and_how_it_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = cli_helpers.project(tmp_path, "caption", {"run": {"max_iters": 1, "test_splits": []}})
    assert cli_helpers.train(path) == 0
    model = cli_helpers.build("caption")
    count = sum(p.numel() for p in model.parameters())
    assert (
        f"blip_caption tiny: parameters {count:,} in all, {count:,} trainable (100.0 %); task captioning\n"
        in caplog.text
    )
    assert re.search(r"\ndevice cpu, float32( \(.*run\.precision=bf16\))?; seed 42\n", caplog.text)
    assert f"\nfolder {tmp_path / 'output' / 'job'}" in caplog.text
    assert f"{tmp_path / 'output' / 'job' / 'checkpoint_best.pth'}: agg_metrics " in caplog.text


# agg_metrics


class Unscored(ToyTask):
    """A task that scores only some of the splits, by these numbers."""

    def __init__(self, **numbers: list[float | None]) -> None:
        super().__init__()
        self.numbers = numbers

    def evaluate(self, model: torch.nn.Module, loader: Any, *, split: str, result_dir: Path) -> dict[str, Any]:
        """The next number of `split`."""
        number = self.numbers[split].pop(0)
        return {"agg_metrics": number, **({} if number is not None else {"note": "no answers"})}


@pytest.mark.parametrize("by", ["first", "mean"])
def test_what_was_not_scored_chooses_no_weights(by: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    runner = make(tmp_path, task=Unscored(val=[None, None]), best_by=by, test_splits=[])
    assert runner.train()["best"] == {"metric": None, "epoch": None}
    assert caplog.text.count("WARNING  lavis_lite.runners.runner") == 1
    assert "val: (no answers)" in caplog.text
    best = checkpoint.load(tmp_path / "checkpoint_best.pth")["model"]
    torch.testing.assert_close(best, last(tmp_path)["model"], rtol=0, atol=0)
    row = next(line for line in (tmp_path / "log.txt").read_text().splitlines() if '"split"' in line)
    assert json.loads(row)["metrics"] == {"agg_metrics": None, "note": "no answers"}


def test_the_mean_is_of_what_was_scored(tmp_path: Path) -> None:
    from test_runner import mixed_data

    task = Unscored(few_val=[0.9, 0.7], many_val=[None, None])
    runner = make(tmp_path, task=task, data=mixed_data(), best_by="mean", test_splits=[])
    assert runner.train()["best"] == {"metric": 0.9, "epoch": 0}


@pytest.mark.slow
def test_evaluation_takes_valid_and_test_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As LAVIS does with `evaluate: True`; a split of both lists once."""
    path = cli_helpers.project(tmp_path, "caption", {"run": {"valid_splits": ["val"], "test_splits": ["test", "val"]}})
    assert cli_helpers.evaluate(path) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["val", "test"]
    assert cli_helpers.evaluate(path, "run.test_splits=[]") == 0
    assert list(json.loads(capsys.readouterr().out)) == ["val"]
    complains(
        capsys,
        cli_helpers.evaluate(path, "run.test_splits=[]", "run.valid_splits=[]"),
        "run.evaluate: run.valid_splits and run.test_splits are empty",
    )


def test_what_was_not_scored_is_null_in_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"image": record["image"]} for record in six(tmp_path)]
    path = cli_helpers.project(tmp_path, "caption", captions(tmp_path, six(tmp_path), test=records), EVALUATED)
    assert cli_helpers.evaluate(path) == 0
    found = json.loads(capsys.readouterr().out)["test"]
    assert found["agg_metrics"] is None
    assert "no reference captions" in found["note"]


def test_images_differ_in_size_only_until_they_are_processed(tmp_path: Path) -> None:
    """Pictures of any size pass: the check looks at what the processor makes of them."""
    records = six(tmp_path)
    for i, record in enumerate(records):
        Image.new("RGB", (20 + i, 60), "red").save(record["image"])
    path = cli_helpers.project(tmp_path, "caption", captions(tmp_path, records, test=records), EVALUATED)
    assert cli_helpers.train(path, "run.batch_size_train=2", flags=DRY) == 0
