"""Configuration: merge order, inheritance, schemas, and that every mistake is named with its file and the way out."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from lavis_lite.common.config.config import Config, ConfigError, RunConfig
from lavis_lite.common.config.expected import Expected
from lavis_lite.common.config.files import load_with_bases, load_yaml, merge, merge_layers, parse_options
from lavis_lite.common.config.schema import Checker, describe, schema_of

PROJECTS = Path(__file__).parents[1] / "projects"
DATA_PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
BASIC = """
model: {arch: blip_caption, model_type: tiny}
datasets:
  shapes_caption:
run: {task: captioning}
"""


def write(folder: Path, text: str, name: str = "project.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str = BASIC, *options: str) -> Config:
    return Config.from_file(write(folder, text), options)


def message(folder: Path, text: str = BASIC, *options: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *options)
    return str(caught.value)


def checker_for(tree: dict[str, Any]) -> Checker:
    from lavis_lite.common.config.files import Layer

    return Checker([Layer("here.yaml", tree)])


def test_merge_order_defaults_model_dataset_project_options(tmp_path: Path):
    cfg = load(tmp_path)
    assert cfg.run == RunConfig(task="captioning")
    assert cfg.model["image_size"] == 48  # the model type's
    assert cfg.datasets["shapes_caption"]["vis_processor"]["train"]["name"] == "blip_image_eval"  # the dataset's

    project = BASIC.replace("model_type: tiny", "model_type: tiny, image_size: 64")
    project += "\nexpected: [{split: test, metric: CIDEr, value: 1, source: ours}]"
    cfg = load(tmp_path, project, "run.max_epoch=3", "datasets.shapes_caption.num_train=7")
    assert (cfg.model["image_size"], cfg.model["vit_type"]) == (64, "tiny")
    assert (cfg.run.max_epoch, cfg.datasets["shapes_caption"]["num_train"]) == (3, 7)
    assert load(tmp_path, project, "model.image_size=32").model["image_size"] == 32
    assert cfg.expected == [Expected(split="test", metric="CIDEr", value=1.0, source="ours")]


def test_bases_come_first_and_are_relative_to_their_file(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, BASIC + "imports: []\n", "root.yaml")
    write(tmp_path, "run: {seed: 1, max_epoch: 5}", "more.yaml")
    write(tmp_path / "sub", "_base_: [../root.yaml, ../more.yaml]\nrun: {seed: 2}", "mid.yaml")
    cfg = load(tmp_path, "_base_: sub/mid.yaml\nrun: {num_workers: 0}")
    assert (cfg.run.seed, cfg.run.max_epoch, cfg.run.num_workers, cfg.run.task) == (2, 5, 0, "captioning")


def test_circle_of_bases_is_an_error(tmp_path: Path):
    write(tmp_path, "_base_: b.yaml", "a.yaml")
    write(tmp_path, "_base_: a.yaml", "b.yaml")
    with pytest.raises(ConfigError, match=r"circle: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        load_with_bases(tmp_path / "a.yaml")


def test_missing_base_names_both_files(tmp_path: Path):
    text = message(tmp_path, "_base_: nowhere.yaml\n" + BASIC)
    assert "project.yaml: _base_" in text
    assert "nowhere.yaml" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected sections"),
        ("null", "expected sections"),
        ("- a\n- b", "expected sections"),
        ("run: {task: a}\nrun: {task: b}", "line 2: not valid YAML: found duplicate key"),
        ("run:\n  seed: 1\n   task: a", "line 3: not valid YAML"),
        ("just words", "project.yaml"),
        ("model: blip_caption", "model: expected a mapping"),
        ("models: {arch: a}", "models: unknown section. Did you mean 'model'?"),
        ("run: {task: captioning}", "model.arch: missing"),
        (
            "model: {arch: blip_caption}\nrun: {task: captioning}",
            "model.model_type: missing: it needs a type of blip_c",
        ),
        ("model: {arch: blip_captoin, model_type: tiny}\nrun: {task: captioning}", "Did you mean 'blip_caption'"),
        ("model: {arch: blip_caption, model_type: tinny}\nrun: {task: captioning}", "Did you mean 'tiny'"),
        ("model: {arch: blip_caption, model_type: tiny}", "run.task: missing"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, expected: str):
    error = message(tmp_path, text)
    assert expected in error
    assert "project.yaml" in error


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("[" * 2000 + "]" * 2000, "nested too deeply: at most 32 levels"),
        ("{a: " * 2000 + "1" + "}" * 2000, "nested too deeply: at most 32 levels"),
        ("[" * 33 + "]" * 33, "nested too deeply: at most 32 levels"),
        ("9" * 6000, "not valid YAML: ValueError: Exceeds the limit"),
        ("!!int x", "not valid YAML: ValueError: invalid literal"),
        ("!!bool x", "not valid YAML: KeyError"),
        ("!!timestamp 2001-01-01100", "not valid YAML: AttributeError"),
        ("x" * 2**20, "the file is larger than the 1,048,576 bytes"),
    ],
)
def test_files_beyond_the_limits_are_refused(tmp_path: Path, body: str, expected: str):
    assert expected in message(tmp_path, f"{BASIC}\nexpected: {body}\n")


def test_what_is_within_the_limits_is_read(tmp_path: Path):
    write(tmp_path, f"{BASIC}\nexpected: {'[' * 31}5{']' * 31}\n")
    assert load_yaml(tmp_path / "project.yaml")["expected"]


def test_missing_and_non_utf8_files_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nope\.yaml: cannot be read: No such file"):
        Config.from_file(tmp_path / "nope.yaml")
    (tmp_path / "caption_coco.yaml").touch()
    with pytest.raises(ConfigError, match=r"cannot be read: No such file.*\. Did you mean 'caption_coco\.yaml'\?"):
        Config.from_file(tmp_path / "coco_caption_coco.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"run: {task: caf\xe9}")
    with pytest.raises(ConfigError, match=r"latin\.yaml: not valid YAML"):
        Config.from_file(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        Config.from_file(tmp_path)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("run.output_dir=null", ["run.output_dir: ", "text", "got None (null)"]),
        ("run.output_dir=~", ["run.output_dir: ", "text", "got None (null)"]),
        ("run.output_dir=", ["run.output_dir: ", "got ''"]),
        ("run.train_splits=null", ["run.train_splits: ", "a list of text", "got None (null)"]),
        ("run.seed=\ud800", ["run.seed="]),
        ("expected=!!int x", ["expected=!!int x"]),
        ("expected=" + "9" * 6000, ["expected=999"]),
        ("run.temperature=1e308", ["run.temperature: ", "a number", "3e+38", "got 1e+308 (a number)"]),
        ("run.init_lr=.inf", ["run.init_lr: ", "a number", "3e+38", "got inf (a number)"]),
        ("run.init_lr=.nan", ["run.init_lr: ", "a number", "got nan (a number)"]),
        ("run.batch_size_eval=1e308", ["run.batch_size_eval: ", "a whole number", "9,007,199,254,740,992", "1e+308"]),
        ("run.max_iters=1e308", ["run.max_iters: ", "a whole number or null", "9,007,199,254,740,992", "1e+308"]),
        ("run.max_iters=1" + "0" * 400, ["run.max_iters: ", "9,007,199,254,740,992", "got 1000"]),
        ("run.valid_splits=[../x]", ["run.valid_splits: ", "got ['../x']"]),
        ("run.train_dataset_ratios={5: 1}", ["run.train_dataset_ratios: ", "text as keys", "got {5: 1}"]),
        ("run.train_dataset_ratios={a: -1}", ["run.train_dataset_ratios.a: ", "0.0 to 1,000,000,000", "got -1.0"]),
        ("datasets={../x: {builder: shapes_caption}}", ["datasets.../x: "]),
        ("datasets={5: {}}", ["datasets.5: "]),
        ("datasets={a: 1}", ["datasets.a: ", "got 1"]),
        ("datasets.shapes_caption.text_processor=5", ["text_processor: ", "a mapping", "got 5"]),
        ("datasets.shapes_caption.vis_processor.train.name=[1]", ["vis_processor.train.name: ", "got [1]"]),
        ("model.med_config_path=[1]", ["model.med_config_path: ", "has no [1]"]),
        ("imports=['..']", ["imports: ", "got ['..']"]),
        ("imports=['']", ["imports: ", "got ['']"]),
        ("run.max_epochs=3", ["--options: run.max_epochs: ", "Did you mean 'max_epoch'"]),
        ("run.num_beam=3", ["run.num_beam: ", "Did you mean 'num_beams'"]),
        ("model.image_sise=3", ["model.image_sise: ", "Did you mean 'image_size'"]),
        ("datasets.shapes_caption.num_trian=3", ["shapes_caption.num_trian: ", "Did you mean 'num_train'"]),
        ("datasets.shapes_captions={}", ["datasets.shapes_captions: ", "Did you mean 'shapes_caption'"]),
        ("datasets.shapes_caption.type=big", ["datasets.shapes_caption.type: ", "'big'", "Known: default"]),
        ("datasets.shapes_caption.vis_processor.val.name=a", ["vis_processor.val: ", "Did you mean 'eval'"]),
        ("datasets.shapes_caption.vis_processor.eval.name=blip_image_evil", ["Did you mean 'blip_image_eval'"]),
        ("datasets.shapes_caption.vis_processor.eval.size=3", ["vis_processor.eval.size: unknown key"]),
        ("datasets.shapes_caption.vis_processor.eval=3", ["vis_processor.eval: ", "got 3"]),
        ("run.task=caption", ["run.task: ", "'caption'", "Did you mean 'captioning'"]),
        ("run.runner=runner", ["run.runner: ", "'runner'"]),
        ("run.lr_sched=cosine", ["run.lr_sched: ", "'cosine'"]),
        ("run.precision=bf61", ["'auto' or 'fp32' or 'bf16' or 'fp16'", "Did you mean 'bf16'?", "got 'bf61' (text)"]),
        ("run.max_epoch=ten", ["run.max_epoch: ", "a whole number", "got 'ten' (text)"]),
        ("run.max_epoch=2.5", ["run.max_epoch: ", "a whole number", "got 2.5"]),
        ("run.max_epoch=true", ["run.max_epoch: ", "a whole number", "got True"]),
        ("run.init_lr=fast", ["run.init_lr: ", "a number", "got 'fast'"]),
        ("run.evaluate='no way'", ["run.evaluate: ", "true or false", "got 'no way'"]),
        ("run.train_splits=train", ["run.train_splits: ", "a list of text", "got 'train'"]),
        ("run.valid_splits=[1]", ["run.valid_splits.0: ", "text", "got 1 (a whole number)"]),
        ("run.batch_size_train=0", ["run.batch_size_train: ", "1 to 1,000,000", "got 0"]),
        ("run.init_lr=-1", ["run.init_lr: ", "0.0 to 1,000.0", "got -1.0"]),
        ("run.beta2=1", ["run.beta2: ", "0.0 to 1.0", "not 1", "got 1.0"]),
        ("run.grad_clip_norm=0", ["run.grad_clip_norm: ", "not 0", "got 0.0"]),
        ("run.job_id=a/b", ["run.job_id: ", "got 'a/b'"]),
        ("run.train_dataset_ratios={shapes_captoin: 1}", ["ratios.shapes_captoin: ", "Did you mean 'shapes_caption'"]),
        ("run.seed={a: b", ["run.seed={a: b", "YAML"]),
        ("run.seed", ["key=value", "'run.seed'"]),
        ("=3", ["key=value", "'=3'"]),
        ("run..seed=3", ["key=value", "'run..seed=3'"]),
        ("run.output_dir=${nothing.here}", ["run.output_dir: "]),
        ("run.output_dir=???", ["run.output_dir: "]),
    ],
)
def test_mistakes_in_options_are_named(tmp_path: Path, option: str, words: list[str]):
    error = message(tmp_path, BASIC, option)
    assert "--options" in error
    for part in words:
        assert part in error


def test_errors_name_the_file_that_has_the_key(tmp_path: Path):
    write(tmp_path, BASIC + "preprocess: {}\n", "clean.yaml")
    write(tmp_path, "_base_: clean.yaml\nrun: {max_epoch: many}", "base.yaml")
    assert message(tmp_path, "_base_: base.yaml\nrun: {seed: 1}").startswith(f"{tmp_path / 'base.yaml'}: run.max_epoch")
    assert load(tmp_path, "_base_: base.yaml\nrun: {max_epoch: 2}").run.max_epoch == 2


def test_a_missing_key_is_looked_for_in_the_file_whatever_the_command_line_sets(tmp_path: Path):
    path = write(tmp_path, BASIC.replace("task: captioning", "task: captioning, runner: runner_iter"))
    for flags in (["--job-id", "x"], ["--options", "run.seed=1"], ["--resume", "a.pth"]):
        with pytest.raises(ConfigError, match=r"project\.yaml: run\.max_iters: "):
            Config.from_cli(["--cfg-path", str(path), *flags])


def test_amp_is_precision_and_may_not_contradict_it(tmp_path: Path):
    assert load(tmp_path, BASIC, "run.amp=false").run.precision == "fp32"
    assert load(tmp_path, BASIC, "run.amp=true").run.precision == "auto"
    error = message(tmp_path, BASIC, "run.amp=false", "run.precision=bf16")
    for part in ("--options: run.amp: ", "False", "run.precision", "bf16"):
        assert part in error


def test_runner_iter_needs_its_number_of_steps(tmp_path: Path):
    assert "run.max_iters: missing" in message(tmp_path, BASIC, "run.runner=runner_iter")
    assert load(tmp_path, BASIC, "run.runner=runner_iter", "run.max_iters=2e4").run.max_iters == 20000
    text = message(tmp_path, BASIC, "run.iters_per_inner_epoch=2", "run.max_iters=8")
    assert "run.iters_per_inner_epoch: needs runner: runner_iter" in text


def test_numbers_as_lavis_writes_them(tmp_path: Path):
    text = BASIC.replace(
        "task: captioning", "task: captioning, init_lr: 1e-5, min_lr: 0, warmup_steps: 1e4, seed: 1_000"
    )
    run = load(tmp_path, text).run
    assert (run.init_lr, run.min_lr, run.warmup_steps, run.seed) == (1e-5, 0.0, 10_000, 1000)
    assert [type(v) for v in (run.init_lr, run.min_lr, run.warmup_steps)] == [float, float, int]


def test_text_options_are_kept_as_typed(tmp_path: Path):
    options = ["run.job_id=001", "model.prompt=a photo of ", "run.output_dir='it''s'", "run.resume_ckpt_path=null"]
    cfg = load(tmp_path, BASIC, *options)
    assert (cfg.run.job_id, cfg.model["prompt"], cfg.run.output_dir) == ("001", "a photo of ", "it's")
    assert cfg.run.resume_ckpt_path is None


@pytest.mark.parametrize(
    "text",
    ["Question: {} Answer:", "{} is it?", "[a] picture of", "a: b", "{a: b}", '"so": it\'s said', "@home", "- one: {}"],
)
def test_a_text_that_is_not_yaml_is_to_be_quoted(tmp_path: Path, text: str):
    """The message says to quote it, and quoted it is the text."""
    error = message(tmp_path, BASIC, f"model.prompt={text}")
    assert "model.prompt" in error
    assert "quote a text for YAML too" in error
    assert load(tmp_path, BASIC, f"model.prompt={json.dumps(text)}").model["prompt"] == text


def test_a_list_in_place_of_a_number_is_not_to_be_quoted(tmp_path: Path):
    assert "quote" not in message(tmp_path, BASIC, "run.max_epoch=[1]")


def test_keys_that_refer_to_a_text_option_have_its_spaces(tmp_path: Path):
    """A caption's prompt would be joined to its first word: "a photo ofa dog"."""
    cfg = load(tmp_path, BASIC, "model.prompt=a photo of ")
    assert cfg.preprocess["text_processor"]["train"]["prompt"] == cfg.model["prompt"] == "a photo of "


def test_options_may_be_lavis_pairs(tmp_path: Path):
    cfg = load(tmp_path, BASIC, "run.max_epoch", "4", "run.valid_splits", "['test']")
    assert (cfg.run.max_epoch, cfg.run.valid_splits) == (4, ["test"])
    with pytest.raises(ConfigError, match=r"'run\.max_epoch 4 run\.seed'"):
        parse_options(["run.max_epoch", "4", "run.seed"])
    with pytest.raises(ConfigError, match=r"'a\.b\.c=2'.*'b'"):
        parse_options(["a.b=1", "a.b.c=2"])


def test_interpolation_sees_the_whole_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_FOLDER", "/data")
    cfg = load(tmp_path, BASIC, "run.output_dir=${oc.env:SOME_FOLDER}/${model.arch}", "run.max_epoch=${run.seed}")
    assert (cfg.run.output_dir, cfg.run.max_epoch) == ("/data/blip_caption", 42)
    assert cfg.preprocess["text_processor"]["train"]["prompt"] == cfg.model["prompt"]


def test_datasets_can_be_taken_out_or_have_no_body(tmp_path: Path):
    write(tmp_path, BASIC, "base.yaml")
    cfg = load(tmp_path, "_base_: base.yaml\ndatasets: {shapes_caption: false, shapes_pairs: }")
    assert list(cfg.datasets) == ["shapes_pairs"]
    assert "datasets.shapes_caption: expected a mapping" in message(tmp_path, "datasets: {shapes_caption: 3}")


def test_a_dataset_may_be_called_anything_if_it_names_its_builder(tmp_path: Path):
    """The example of docs/data.md, and what else a name of one's own goes through."""
    (example,) = re.findall(r"### Several of a kind\n.*?```yaml\n(.*?)```", DATA_PAGE, re.DOTALL)
    text = example.replace("run:", "run:\n  task: instruct") + "model: {arch: blip2_t5_instruct, model_type: tiny}"
    cfg = load(tmp_path, text, "run.train_dataset_factors.garden_videos=2")
    assert list(cfg.datasets) == ["garden", "garden_videos"]
    assert [body["builder"] for body in cfg.datasets.values()] == ["instruct", "instruct"]
    assert cfg.datasets["garden_videos"]["num_frames"] == 8
    assert cfg.datasets["garden"]["vis_processor"] == cfg.preprocess["vis_processor"]
    again = Config.from_file(write(tmp_path, cfg.to_yaml(), "again.yaml"))
    assert again == replace(cfg, source=again.source)
    text = BASIC.replace("shapes_caption:", "mine: {builder: coco_caption, type: default}")
    own, packaged = load(tmp_path, text).datasets["mine"], load(tmp_path, BASIC.replace("shapes_", "coco_"))
    assert own == {"builder": "coco_caption"} | packaged.datasets["coco_caption"]  # the YAML of its builder


def test_mistakes_with_a_builder_are_named(tmp_path: Path):
    def said(body: str) -> str:
        return message(tmp_path, BASIC.replace("shapes_caption:", f"mine: {body}"))

    assert "datasets.mine: unknown builder 'mine'" in said("{}")
    assert "A name of your own needs the key builder." in said("{}")
    assert "datasets.mine.builder: unknown builder 'instuct'. Did you mean 'instruct'" in said("{builder: instuct}")
    assert "datasets.mine.builder: expected a name, got [1]" in said("{builder: [1]}")
    assert "datasets.mine.type: nocaps has no type 'big'" in said("{builder: nocaps, type: big}")
    for info, key, nearest in (
        ("{anotations: {}}", "anotations", "annotations"),
        ("{annotations: {train: {storag: x}}}", "annotations.train.storag", "storage"),
        ("{images: {storge: x}}", "images.storge", "storage"),
    ):
        wanted = f"datasets.mine.build_info.{key}: unknown key. Did you mean '{nearest}'"
        assert wanted in said(f"{{builder: instruct, build_info: {info}}}")
    assert "datasets.mine.num_frame: unknown key. Did you mean 'num_frames'" in said(
        "{builder: instruct, num_frame: 3}"
    )


def test_dataset_without_processors_takes_the_models(tmp_path: Path):
    text = BASIC.replace("shapes_caption:", "coco_caption: {vis_processor: {eval: {name: blip_image_eval}}}")
    body = load(tmp_path, text).datasets["coco_caption"]
    assert body["vis_processor"] == {"eval": {"name": "blip_image_eval", "image_size": 48}}
    assert body["text_processor"]["train"] == {"name": "blip_caption", "prompt": "a picture of "}
    assert "dataset_card" not in body


def test_another_processor_replaces_the_old_ones_arguments():
    old = {"vis_processor": {"train": {"name": "a", "image_size": 48}, "eval": {"name": "b", "image_size": 48}}}
    new = {"vis_processor": {"train": {"name": "c"}, "eval": {"flip": True}}}
    assert merge(old, new)["vis_processor"] == {
        "train": {"name": "c"},
        "eval": {"name": "b", "image_size": 48, "flip": True},
    }
    assert merge({"x": {"name": "a", "k": 1}}, {"x": {"name": "b"}}) == {"x": {"name": "b", "k": 1}}


def test_ignored_keys_of_lavis_are_accepted_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    dead = "world_size: 8, dist_url: 'env://', distributed: True, use_dist_eval_sampler: False"
    cfg = load(tmp_path, BASIC.replace("task: captioning", f"task: captioning, {dead}"))
    assert "world_size" not in cfg.to_dict()["run"]
    notes = [record.getMessage() for record in caplog.records if "world_size" in record.getMessage()]
    assert len(notes) == 1
    assert "dist_url" in notes[0]


def test_med_config_path_is_ignored_or_read(tmp_path: Path):
    stock = load(tmp_path, BASIC, "model.med_config_path=configs/models/med_config.json")
    assert stock.model == load(tmp_path).model
    bert = {"hidden_size": 96, "num_attention_heads": 3, "hidden_dropout_prob": 0.5, "type_vocab_size": 2}
    write(tmp_path, json.dumps(bert), "small.json")
    med = load(tmp_path, BASIC, f"model.med_config_path={tmp_path / 'small.json'}", "model.med.num_heads=6").model[
        "med"
    ]
    assert (med["hidden_size"], med["num_heads"], med["hidden_dropout"]) == (128, 6, 0.5)  # the YAML's `med` wins
    assert "med_config_path: " in message(tmp_path, BASIC, "model.med_config_path=gone.json")


def test_task_fields_are_separated_from_run_fields(tmp_path: Path):
    cfg = load(tmp_path, BASIC, "run.num_beams=5")
    assert cfg.task == {"num_beams": 5}
    assert cfg.to_dict()["run"]["num_beams"] == 5


def test_merged_configuration_is_read_as_the_same_again(tmp_path: Path):
    cfg = load(tmp_path, BASIC, "run.num_beams=5", "run.job_id=007", "datasets.shapes_caption.num_train=9")
    again = Config.from_file(write(tmp_path, cfg.to_yaml(), "config.yaml"))
    assert again.to_dict() == cfg.to_dict()
    assert again.run == cfg.run
    assert yaml.safe_load(cfg.to_yaml())["run"]["job_id"] == "007"


def test_imports_bring_a_users_own_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path,
        "from dataclasses import dataclass\nfrom lavis_lite.registry import registry\n"
        "from lavis_lite.tasks.base import BaseTask\n"
        "@registry.register_task('task_of_mine')\n@dataclass(kw_only=True)\nclass Mine(BaseTask):\n"
        "    depth: int = 1\n",
        "my_module_for_tests.py",
    )
    text = BASIC.replace("captioning", "task_of_mine, depth: 3") + "imports: [my_module_for_tests]\n"
    assert load(tmp_path, text).task == {"depth": 3}
    assert "imports: cannot import 'my_modul'" in message(tmp_path, BASIC + "imports: [my_modul]\n")


def test_command_line_flags(tmp_path: Path):
    path = str(write(tmp_path, BASIC))
    cfg = Config.from_cli(
        ["--cfg-path", path, "--options", "run.seed=1", "--cfg-options", "run.seed=2", "--job-id", "x"]
    )
    assert (cfg.run.seed, cfg.run.job_id, cfg.run.resume) == (2, "x", None)
    assert Config.from_cli(["--cfg-path", path, "--resume", "auto"]).run.resume == "auto"
    assert Config.from_cli(["--cfg-path", path, "--resume", "a.pth"]).run.resume_ckpt_path == "a.pth"
    with pytest.raises(ConfigError, match=r"--job-id: .*'a/b'"):
        Config.from_cli(["--cfg-path", path, "--job-id", "a/b"])
    with pytest.raises(SystemExit):
        Config.from_cli(["--cfg-path", path, "--optoins", "a=b"])


@dataclass
class Inner:
    size: int = 1
    names: tuple[str, ...] = ()


class Parent:
    def __init__(self, *, inner: Inner | None = None, folder: Path | None = None) -> None: ...


class Child(Parent):
    def __init__(self, *, mode: Literal["a", "b"], rate: float | list[float] = 0.0, **parts: Any) -> None: ...


def test_schema_follows_kwargs_to_the_parent():
    schema, open_ended = schema_of(Child)
    assert (list(schema), open_ended) == (["mode", "rate", "inner", "folder"], False)
    assert schema_of(lambda **anything: None) == ({}, True)


def test_values_are_checked_into_nested_dataclasses_and_converted():
    schema, _ = schema_of(Child)
    tree = {"mode": "a", "rate": [1, 2.5], "inner": {"size": 2.0, "names": ["x"]}, "folder": "here"}
    checked = checker_for({"model": tree}).section(tree, schema, ("model",))
    assert checked == {"mode": "a", "rate": [1.0, 2.5], "inner": {"size": 2, "names": ["x"]}, "folder": Path("here")}
    tree = {"mode": "a", "inner": {"sise": 2}}
    with pytest.raises(ConfigError, match=r"here.yaml: model.inner.sise: unknown key. Did you mean 'size'"):
        checker_for({"model": tree}).section(tree, schema, ("model",))
    with pytest.raises(ConfigError, match=r"here.yaml: model.mode: missing: it needs 'a' or 'b'"):
        checker_for({"model": {}}).section({}, schema, ("model",))


def test_annotations_in_words():
    assert describe(int | None) == "a whole number or null"
    assert describe(list[str]) == "a list of text"
    assert describe(dict[str, float]) == "a mapping"
    assert describe(Literal["x"]) == "'x'"


def test_layers_are_merged_without_changing_them(tmp_path: Path):
    write(tmp_path, BASIC, "base.yaml")
    layers = load_with_bases(write(tmp_path, "_base_: base.yaml\nmodel: {image_size: 3}"))
    merge_layers(layers)
    assert layers[0].tree["model"] == {"arch": "blip_caption", "model_type": "tiny"}


def project_files() -> list[Path]:
    """Every project YAML but the parts others build on, whose names start with an underscore."""
    return sorted(path for path in PROJECTS.glob("**/*.yaml") if not path.name.startswith("_"))


@pytest.mark.slow
@pytest.mark.parametrize("path", project_files(), ids=lambda path: str(path.relative_to(PROJECTS)))
def test_every_project_is_valid(path: Path):
    cfg = Config.from_file(path)
    assert cfg.datasets
    assert cfg.run.train_splits if not cfg.run.evaluate else cfg.run.test_splits
