"""What a checkpoint was trained as comes with it: `load_model`, `from_pretrained`, `evaluate.py`, the converter."""

import json
import logging
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import torch
from full_size import TINY_HF
from PIL import Image

from lavis_lite.cli import dry_run
from lavis_lite.common import checkpoint
from lavis_lite.common.config import trained as trained_config
from lavis_lite.common.config.config import Config
from lavis_lite.common.config.files import Layer
from lavis_lite.common.config.zoo import model_layers
from lavis_lite.common.errors import AdapterError
from lavis_lite.convert.__main__ import run
from lavis_lite.models import from_pretrained, load_model, load_model_and_preprocess
from lavis_lite.models.loading import described

IMAGE = Image.new("RGB", (200, 100), "teal")
OWN_PROCESSORS = {
    "vis_processor": {
        "train": {"name": "blip_image_eval", "image_size": 64},
        "eval": {"name": "blip_image_eval", "image_size": 64},
    },
    "text_processor": {"train": {"name": "blip_caption", "prompt": "a drawing of ", "max_words": 3}},
}
CHANGES = {"model": {"image_size": 64, "prompt": "a drawing of ", "max_txt_len": 12}, "run": {"max_iters": 1}}


@pytest.fixture(scope="module")
def caption_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The YAML and the best checkpoint of a run with sizes, prompt and processors of its own."""
    folder = tmp_path_factory.mktemp("caption")
    path = cli_helpers.project(folder, "caption", CHANGES, {"datasets": {"shapes_caption": OWN_PROCESSORS}})
    assert cli_helpers.train(path) == 0
    return path, folder / "output" / "job" / "checkpoint_best.pth"


def saved(folder: Path, trained: Any, /, **config: Any) -> Path:
    """A checkpoint as train.py writes it."""
    return checkpoint.save({"model": trained.checkpoint_state_dict(), "config": config}, folder / "checkpoint_best.pth")


def tiny(arch: str) -> dict[str, Any]:
    return model_layers(arch, "tiny")[-1].tree["model"]


def lines(caplog: pytest.LogCaptureFixture, *, level: int = logging.WARNING) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= level]


@pytest.mark.slow
def test_the_model_and_its_processors_are_those_of_the_training(
    caption_run: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    _, source = caption_run
    model, images, texts = load_model_and_preprocess("blip_caption", "tiny", is_eval=True, checkpoint=source)
    assert (model.prompt, model.max_txt_len, model.visual_encoder.image_size) == ("a drawing of ", 12, 64)
    assert (model.visual_encoder.width, model.text_config().num_layers) == (32, 2)
    assert images["eval"](IMAGE).shape == images["train"](IMAGE).shape == (3, 64, 64)
    assert texts["train"]("A dog. And a cat!") == "a drawing of a dog and"
    assert texts["eval"]("A dog. And a cat!") == "a dog and a cat"
    assert all(torch.equal(model.state_dict()[key], value) for key, value in cli_helpers.weights(source).items())
    assert model.generate({"image": images["eval"](IMAGE)[None]})
    logged = lines(caplog)
    assert f"{source}: model.image_size=64, as it was trained; the type has 48" in logged
    assert f"{source}: model.prompt='a drawing of ', as it was trained; the type has 'a picture of '" in logged
    assert f"{source}: model.max_txt_len=12, as it was trained" in logged
    assert sum("preprocess.text_processor.train" in line for line in logged) == 1


def test_arguments_override_the_checkpoint_and_are_logged(
    caption_run: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Processors follow what they were the same as in training; what was asked for is no warning."""
    caplog.set_level(logging.INFO)
    _, source = caption_run
    settings = {"image_size": 96, "prompt": "see "}
    model, images, texts = load_model_and_preprocess("blip_caption", "tiny", checkpoint=source, **settings)
    assert (model.prompt, model.visual_encoder.image_size, model.max_txt_len) == ("see ", 96, 12)
    assert images["eval"](IMAGE).shape == images["train"](IMAGE).shape == (3, 96, 96)
    assert texts["train"]("A dog.") == "see a dog"
    logged = lines(caplog, level=logging.INFO)
    assert f"{source}: model.image_size=96, as given; it was trained with 64" in logged
    assert f"{source}: model.prompt='see ', as given; it was trained with 'a drawing of '" in logged
    assert not [line for line in lines(caplog) if "as given" in line]


def test_resizing_of_positions_is_logged(caption_run: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    load_model("blip_caption", "tiny", checkpoint=caption_run[1], image_size=96)
    resized = [line for line in lines(caplog, level=logging.INFO) if "position embeddings" in line]
    assert resized == ["position embeddings are resized from 4 x 4 to 6 x 6 patches"]


def test_a_checkpoint_of_train_py_needs_no_type(caption_run: tuple[Path, Path], tmp_path: Path) -> None:
    _, source = caption_run
    model, images, texts = from_pretrained(source, processors=True, is_eval=True)
    assert (model.prompt, model.training) == ("a drawing of ", False)
    assert images["eval"](IMAGE).shape == (3, 64, 64)
    assert texts["train"]("A dog") == "a drawing of a dog"
    assert from_pretrained(source, prompt="").prompt == ""
    plain = checkpoint.save({"model": model.state_dict()}, tmp_path / "lavis.pth")
    with pytest.raises(ValueError, match=r"lavis.pth does not say what it was trained as: .*load_model\(arch"):
        from_pretrained(plain)


def test_no_warning_of_random_weights_for_a_language_model_in_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    random = "tiny_opt has no weights: the language model's are random"
    model = load_model("blip2_opt", "tiny")
    assert random in lines(caplog)
    source = saved(tmp_path, model, model=tiny("blip2_opt") | {"model_type": "tiny"})
    caplog.clear()
    again = load_model("blip2_opt", "tiny", checkpoint=source)
    cli_helpers.assert_same_state(again.state_dict(), model.state_dict())
    assert not lines(caplog)


def test_a_merged_file_keeps_its_configuration(caption_run: tuple[Path, Path], tmp_path: Path) -> None:
    """LAVIS reads the entry `model` only; what else a file has does not concern it."""
    whole = tmp_path / "whole.pth"
    assert run(["to-lavis", str(caption_run[1]), str(whole), "--options", "prompt='see '"]) == 0
    model, images, texts = from_pretrained(whole, processors=True)
    assert (model.prompt, model.max_txt_len) == ("see ", 12)
    assert images["train"](IMAGE).shape == (3, 64, 64)
    assert texts["train"]("A dog. And a cat!") == "see a dog and"


@pytest.mark.parametrize("arch", ["blip_caption", "blip2_opt"])
def test_a_prompt_without_its_space_is_replaced_too(arch: str, tmp_path: Path) -> None:
    """The caption recipe of BLIP-2's quickstart: `prompt: a photo of`, and a processor with `${model.prompt} `."""
    section = tiny(arch) | {"model_type": "tiny", "prompt": "a photo of"}
    blocks = {"text_processor": {"train": {"name": "blip_caption", "prompt": "a photo of "}}}
    source = saved(tmp_path, load_model(arch, "tiny"), model=section, datasets={"shapes_caption": blocks})
    path = tmp_path / "evaluate.yaml"
    path.write_text(
        f"model: {{arch: {arch}, model_type: tiny}}\ndatasets: {{caption: {{}}}}\nrun: {{task: captioning}}\n"
    )
    for given, (prompt, begins) in {(): ("a photo of", "a photo of "), ("model.prompt=see",): ("see", "see ")}.items():
        cfg = Config.from_file(path, given, checkpoint=str(source))
        assert cfg.model["prompt"] == prompt
        assert cfg.datasets["caption"]["text_processor"]["train"]["prompt"] == begins
        settings = {"prompt": prompt} if given else {}
        _, _, texts = load_model_and_preprocess(arch, "tiny", checkpoint=source, **settings)
        assert texts["train"]("A cat") == f"{begins}a cat"


def test_another_architecture_takes_images_and_no_texts(
    caption_run: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """blip_vqa has no prompt to which a processor could refer."""
    _, source = caption_run
    settings = {"arch": "blip_feature_extractor", "processors": True}
    caplog.clear()
    with pytest.raises(ValueError, match=r"lacks .* trainable keys .*; name a checkpoint that has them"):
        from_pretrained(source, **settings)
    assert not [line for line in lines(caplog) if "keys" in line]  # the error says it
    layers, tree = described(source, "blip_vqa", {})
    assert set(tree["preprocess"]) == {"vis_processor"}
    assert tree["preprocess"]["vis_processor"]["eval"]["image_size"] == tree["model"]["image_size"] == 64
    assert layers


@pytest.mark.parametrize("source", ["", " ", 5])
def test_an_empty_name_of_weights_is_an_error(source: Any, tmp_path: Path) -> None:
    """`$CHECKPOINT` that is not set: random weights would be evaluated."""
    words = rf"expected a file, a folder, a URL or a hub id, got {source!r}"
    for load in (lambda: load_model("blip_caption", "tiny", checkpoint=source), lambda: from_pretrained(source)):
        with pytest.raises(ValueError, match=words):
            load()
    if isinstance(source, str):
        with pytest.raises(ValueError, match=f"--checkpoint: {words}"):
            Config.from_file(cli_helpers.project(tmp_path, "caption"), checkpoint=source)


def test_a_file_without_config_is_loaded_as_the_type_says(
    caption_run: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """LAVIS's files; BLIP's own training saved a flat config, which says nothing here."""
    model = load_model("blip_caption", "tiny")
    caplog.clear()
    for more in ({}, {"config": {"image_size": 384, "vit": "base"}}, {"config": "large"}, {"config": {"model": {}}}):
        path = checkpoint.save({"model": model.state_dict(), **more}, tmp_path / "weights.pth")
        again, images, _ = load_model_and_preprocess("blip_caption", "tiny", checkpoint=path)
        assert (again.prompt, again.visual_encoder.image_size) == ("a picture of ", 48)
        assert images["eval"](IMAGE).shape == (3, 48, 48)
    assert not lines(caplog)


def test_evaluation_takes_what_its_yaml_does_not_state(caption_run: tuple[Path, Path], tmp_path: Path) -> None:
    _, source = caption_run
    text = "model: {arch: blip_caption, model_type: tiny, max_txt_len: 20}\nrun: {task: captioning}\n"
    path = tmp_path / "evaluate.yaml"
    path.write_text(text + "datasets: {shapes_caption: {num_train: 4}, caption: {}}\n")
    cfg = Config.from_file(path, ["model.prompt='it is '"], checkpoint=str(source))
    assert cfg.model["vit"] == cli_helpers.SIZES["vit"]
    assert (cfg.model["image_size"], cfg.model["prompt"], cfg.model["max_txt_len"]) == (64, "it is ", 20)
    assert cfg.model["checkpoint"] == str(source)
    assert cfg.datasets["caption"]["vis_processor"]["eval"] == {"name": "blip_image_eval", "image_size": 64}
    assert cfg.datasets["caption"]["text_processor"]["train"]["prompt"] == "it is "
    again = tmp_path / "again.yaml"
    again.write_text(cfg.to_yaml())
    assert Config.from_file(again).model == cfg.model
    path.write_text(text.replace("max_txt_len: 20", f"checkpoint: '{source}'"))
    assert Config.from_file(path).model["image_size"] == 64


def test_evaluate_runs_with_a_minimal_yaml(caption_run: tuple[Path, Path], tmp_path: Path) -> None:
    _, source = caption_run
    shapes = {**cli_helpers.SHAPES, "vis_processor": {"eval": OWN_PROCESSORS["vis_processor"]["eval"]}}
    recipe = {
        "model": {"arch": "blip_caption", "model_type": "tiny"},
        "datasets": {"shapes_caption": shapes},
        "run": {**cli_helpers.RUN, **cli_helpers.CAPTIONING, "output_dir": str(tmp_path / "output")},
    }
    path = tmp_path / "evaluate.yaml"
    path.write_text(cli_helpers.yaml.safe_dump(recipe))
    assert cli_helpers.evaluate(path, weights=source) == 0
    assert cli_helpers.log(tmp_path / "output" / "evaluation")


@pytest.mark.parametrize(
    "way", [["to-hf", "blip_caption", "tiny", "{new}", "--checkpoint", "{old}"], ["to-lavis", "{old}", "{new}"]]
)
def test_the_converter_logs_differences_without_warning(
    way: list[str], caption_run: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    places = {"old": caption_run[1], "new": tmp_path / "new"}
    assert run([*(part.format(**places) for part in way), "--options", "prompt=see "]) == 0
    logged = lines(caplog, level=logging.INFO)
    assert any("model.prompt='see ', as given; it was trained with" in line for line in logged)
    assert any("model.image_size=64, as it was trained" in line for line in logged)
    assert not [line for line in lines(caplog) if "trained" in line]


def test_the_converter_writes_what_was_trained(caption_run: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    assert run(["to-hf", "blip_caption", "tiny", str(folder), "--checkpoint", str(caption_run[1])]) == 0
    model, images, texts = from_pretrained(folder, processors=True)
    assert (model.prompt, model.max_txt_len) == ("a drawing of ", 12)
    assert images["eval"](IMAGE).shape == (3, 64, 64)
    assert texts["train"]("A dog") == "a drawing of a dog"
    model, images, _ = from_pretrained(folder, processors=True, image_size=32)
    assert images["eval"](IMAGE).shape == (3, 32, 32)
    # the folder as the checkpoint of a type: its prompt too
    again = load_model(
        "blip_caption", "tiny", checkpoint=folder, vit=cli_helpers.SIZES["vit"], med=cli_helpers.SIZES["med"]
    )
    assert again.prompt == "a drawing of "


@pytest.mark.parametrize(
    "arch", ["blip_retrieval", "blip_caption", "blip_image_text_matching", "blip_feature_extractor"]
)
def test_from_pretraining_to_a_task_warns_of_the_prompt_only(
    arch: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sizes and tokenizer are the file's; what belongs to the task (prompt, lengths) is the type's."""
    section = cli_helpers.section("pretrain", image_size=64, prompt="x ", max_txt_len=9)
    path = saved(tmp_path, cli_helpers.build("pretrain", image_size=64, prompt="x ", max_txt_len=9), model=section)
    caplog.set_level(logging.INFO)
    caplog.clear()
    model = load_model(arch, "tiny", checkpoint=path)
    assert model.visual_encoder.image_size == 64
    assert model.visual_encoder.width == 32
    assert model.max_txt_len == {"blip_caption": 40}.get(arch, 35)
    assert getattr(model, "prompt", "a picture of ") == "a picture of "
    state = cli_helpers.weights(path)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if "queue" not in key)
    logged = lines(caplog)
    assert f"{path}: model.image_size=64, as it was trained; the type has 48" in logged
    about_prompt = [line for line in logged if line.startswith("model.prompt: ")]
    assert all(": model." in line and "as it was trained" in line for line in logged if line not in about_prompt)
    assert len(about_prompt) == (arch == "blip_caption")
    assert any(f"{path} is a checkpoint of blip_pretrain; {arch} takes" in line for line in lines(caplog, level=20))


def test_a_prompt_that_pretraining_did_not_have_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In an evaluation: training learns captions with the prompt. The texts of the pretraining may have had it too."""
    section = {**tiny("blip_pretrain"), "prompt": "a picture of "}  # without effect

    def warnings(own: dict[str, Any], **config: Any) -> list[str]:
        caplog.clear()
        path = checkpoint.save({"model": {}, "config": {"model": section, **config}}, tmp_path / "pretrain.pth")
        layers = [Layer("own", {"model": {"arch": "blip_caption", "checkpoint": str(path)}} | own)]
        trained_config.lay_under(model_layers("blip_caption", "tiny"), layers, trained_config.read(path), level=20)
        return lines(caplog)

    (line,) = warnings({})
    assert "begin with 'a picture of '" in line
    assert "pretrain.pth (blip_pretrain) was trained on texts without a prompt: set model.prompt=''" in line
    assert warnings({"run": {"evaluate": True}}) == [line]
    assert not warnings({"run": {"evaluate": False}})
    assert not warnings({"model": {"arch": "blip_caption", "prompt": ""}})
    texts = {"text_processor": {"train": {"name": "blip_caption", "prompt": "a picture of "}}}
    assert not warnings({}, preprocess=texts)
    assert not warnings({}, datasets={"a": texts, "b": {"text_processor": {"train": {"name": "blip_caption"}}}})
    (line,) = warnings({"model": {"arch": "blip_caption", "prompt": "see"}}, preprocess=texts)
    assert "texts with 'a picture of ': set model.prompt='a picture of '" in line


def test_parts_of_another_task_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path, cli_helpers.build("vqa_rank"), model=cli_helpers.section("vqa_rank"))
    load_model("blip_caption", "tiny", checkpoint=path)
    assert any("text_encoder" in line and "BlipCaption" in line for line in lines(caplog))


def test_defaults_of_the_file_s_architecture_count(tmp_path: Path) -> None:
    """An InstructBLIP's Q-Former reads text unless it was logged not to, a BLIP-2's does not."""
    model = load_model("blip2_t5_instruct", "tiny")
    path = saved(tmp_path, model, model=tiny("blip2_t5_instruct"))
    assert load_model("blip2_t5", "tiny", checkpoint=path).qformer_text_input
    with pytest.raises(ValueError, match=r"tensors that were trained have no place in the model: Qformer\.bert"):
        load_model("blip2_t5", "tiny", checkpoint=path, qformer_text_input=False)


def test_trained_parts_without_a_place_are_an_error(tmp_path: Path) -> None:
    section = cli_helpers.section("caption")
    model = cli_helpers.build("caption")
    state = model.checkpoint_state_dict() | {"new_head.weight": torch.ones(2), "visual_encoder_m.x": torch.ones(1)}
    path = checkpoint.save({"model": state, "config": {"model": section}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"1 tensors that were trained have no place in the model: new_head\.weight"):
        load_model("blip_caption", "tiny", checkpoint=path)


def test_weights_are_the_file_s_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the training started from is not looked for."""
    monkeypatch.setenv("LAVIS_LITE_OFFLINE", "1")
    sources = {"pretrained": "https://nowhere.example/a.pth", "init_vit": "no_such", "init_text": "/no/such/bert"}
    sources |= {"finetuned": "/no/such.pth", "load_finetuned": True, "checkpoint": "gone.pth"}
    path = saved(tmp_path, cli_helpers.build("caption"), model={**cli_helpers.section("caption"), **sources})
    assert load_model("blip_caption", "tiny", checkpoint=path).prompt == "a picture of "
    assert from_pretrained(path).prompt == "a picture of "


LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def with_adapters(arch: str, folder: Path) -> Path:
    """A checkpoint of a run with `llm_lora`."""
    return saved(folder, load_model(arch, "tiny", llm_lora=LORA), model={**tiny(arch), "llm_lora": LORA})


@pytest.mark.parametrize(
    ("arch", "settings", "was", "now"),
    [
        ("blip2_t5", {}, "blip2_opt (opt_model=tiny_opt)", "blip2_t5 (t5_model=tiny_t5)"),
        ("blip2_llm", {}, "blip2_opt (opt_model=tiny_opt)", "blip2_llm (llm_model=tiny_opt)"),
        ("blip2", {}, "blip2_opt (opt_model=tiny_opt)", "blip2 (no language model)"),
        ("blip2_llm", {"llm_model": "tiny_t5"}, "blip2_llm (llm_model=tiny_opt)", "blip2_llm (llm_model=tiny_t5)"),
        ("blip2_llm", {"llm_model": "tiny_vicuna"}, "blip2_llm (llm_model=tiny_opt)", "(llm_model=tiny_vicuna)"),
    ],
)
@pytest.mark.slow
def test_adapters_of_another_language_model_are_an_error(
    arch: str, settings: dict[str, Any], was: str, now: str, tmp_path: Path
) -> None:
    source = was.split()[0]
    path = with_adapters(source, tmp_path)
    with pytest.raises(AdapterError) as logged:
        load_model(arch, "tiny", checkpoint=path, **settings)
    assert str(logged.value).startswith(
        f"{path} was trained as {was} with adapters (model.llm_lora), and this model is "
    )
    assert f"{now}: adapters fit no other language model than their own" in str(logged.value)
    assert load_model(source, "tiny", checkpoint=path).lm.model


def test_a_dry_run_refuses_adapters_of_another_language_model(tmp_path: Path) -> None:
    path = with_adapters("blip2_llm", tmp_path)
    section = {**tiny("blip2_llm"), "checkpoint": str(path), "llm_lora": LORA}
    assert dry_run.build_without_weights(section)
    with pytest.raises(AdapterError, match=r"trained as blip2_llm \(llm_model=tiny_opt\) .* \(llm_model=tiny_t5\)"):
        dry_run.build_without_weights({**section, "llm_model": "tiny_t5"})


def test_adapters_without_their_settings_are_an_error(tmp_path: Path) -> None:
    """It is the same language model."""
    path = with_adapters("blip2_opt", tmp_path)
    with pytest.raises(AdapterError, match=r"holds 24 tensors of adapters .* Set model\.llm_lora as it was"):
        load_model("blip2_opt", "tiny", checkpoint=path, llm_lora=None)


def test_processors_of_mixtures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where training sets had different ones, the model type's are taken."""
    one, other = ({"text_processor": {"train": {"name": name}}} for name in ("blip_caption", "blip_question"))
    preprocess = {"text_processor": {"train": {"name": "blip_caption", "max_words": 7}}}
    config = {"model": cli_helpers.section("caption"), "preprocess": preprocess, "datasets": {"a": one, "b": other}}
    path = saved(tmp_path, cli_helpers.build("caption"), **config)
    _, _, texts = load_model_and_preprocess("blip_caption", "tiny", checkpoint=path)
    assert texts["train"].max_words == 7
    assert any("its training sets had different text_processors" in line for line in lines(caplog))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"prompt": "${oc.env:HOME}"}}, r"its config holds '\$\{'.*oc\.env:HOME"),
        ({"model": {"med": {"hidden_size": torch.ones(1)}}}, "its config holds a Tensor, not a plain value"),
        ({"model": {"vit": json.loads('{"a":' * 20 + "1" + "}" * 20)}}, "more than 8 levels"),
        ({"model": {"max_txt_len": "long"}}, r"config of .*pth: model.max_txt_len: expected a whole number"),
        ({"model": {"vit": {"witdh": 3}}}, r"model\.vit: no size witdh"),
        (
            {"model": {"tokenizer": "https://evil.example/t"}},
            r"takes model.tokenizer from https://evil.example/t, which",
        ),
    ],
)
def test_a_foreign_config_is_data_and_is_checked(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = saved(
        tmp_path, cli_helpers.build("caption"), **cli_helpers.merged({"model": cli_helpers.section("caption")}, changes)
    )
    with pytest.raises(ValueError, match=message):
        load_model("blip_caption", "tiny", checkpoint=path)


def test_a_foreign_config_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = {
        "model": cli_helpers.section("caption"),
        "imports": ["evil_module"],
        "datasets": {"x": {"builder": "evil"}},
    }
    path = saved(tmp_path, cli_helpers.build("caption"), **config)
    assert from_pretrained(path).prompt == "a picture of "
    recipe = tmp_path / "x.yaml"
    recipe.write_text(
        f"model: {{arch: blip_caption, model_type: tiny, checkpoint: '{path}'}}\nrun: {{task: captioning}}"
    )
    assert Config.from_file(recipe).imports == []
    config["preprocess"] = {"vis_processor": {"eval": {"name": "evil_processor"}}}
    path = saved(tmp_path, cli_helpers.build("caption"), **config)
    with pytest.raises(ValueError, match=r"preprocess.vis_processor.eval.name: .*evil_processor"):
        load_model_and_preprocess("blip_caption", "tiny", checkpoint=path)


def test_keys_of_another_version_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path, cli_helpers.build("caption"), model={**cli_helpers.section("caption"), "old_key": 3})
    load_model("blip_caption", "tiny", checkpoint=path)
    assert f"{path}: its config has model.old_key=3, which is unknown here: left out" in lines(caplog)


def test_precision_and_checkpointing_stay_the_type_s(tmp_path: Path) -> None:
    """A GPU's fp16 is not taken to a CPU, where it does not run."""
    model = load_model("blip2_opt", "tiny")
    path = saved(tmp_path, model, model={**tiny("blip2_opt"), "vit_precision": "fp16", "llm_precision": "fp16"})
    again = load_model("blip2_opt", "tiny", checkpoint=path)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}


def test_frozen_parts_come_from_the_sources_of_the_training(tmp_path: Path) -> None:
    """The file leaves out an image encoder and a language model that can be fetched again."""
    encoder = load_model("blip2_opt", "tiny").visual_encoder.state_dict()
    checkpoint.save({"model": {f"visual_encoder.{key}": value for key, value in encoder.items()}}, tmp_path / "vit.pth")
    sources = {"opt_model": str(TINY_HF / "opt"), "vit_weights": str(tmp_path / "vit.pth")}
    model = load_model("blip2_opt", "tiny", **sources)
    path = saved(tmp_path, model, model={**tiny("blip2_opt"), **sources})
    assert not any(key.startswith(("visual_encoder.", "opt_model.")) for key in cli_helpers.weights(path))
    for again in (load_model("blip2_opt", "tiny", checkpoint=path), from_pretrained(path)):
        cli_helpers.assert_same_state(again.state_dict(), model.state_dict())
