"""Settings that must agree: processors follow the model's image size and encoder's statistics, captions its prompt.

`PIXELS` is what the types were published with (LAVIS's YAMLs), written down before the processors followed the model.
"""

import json
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import torch
import yaml
from PIL import Image
from test_bad_input import complains

from lavis_lite.common.config.agreement import preprocess_of
from lavis_lite.common.config.config import Config, ConfigError
from lavis_lite.common.config.zoo import dataset_zoo, model_zoo
from lavis_lite.common.registry import registry
from lavis_lite.models import from_pretrained, load_model, load_model_and_preprocess

PICTURE = Image.new("RGB", (50, 40), "teal")
PROJECTS = Path(__file__).parents[1] / "projects"
RECIPES = [path for path in sorted(PROJECTS.rglob("*.yaml")) if not path.name.startswith("_")]
TYPES = [
    (arch, kind)
    for arch, kinds in model_zoo
    for kind in kinds
    if arch.startswith("blip") and kind != "tiny_features"  # which takes no images
]
PIXELS = {
    "blip2": (364, "coco"),
    "blip2_feature_extractor": (364, "coco"),
    "blip2_image_text_matching": (364, "coco"),
    "blip2_opt": (364, "caption_coco_opt2.7b", "caption_coco_opt6.7b"),
    "blip2_t5": (364, "caption_coco_flant5xl"),
    "blip_caption": (384, "base_coco", "base_coco_paper", "large_coco"),
    "blip_classification": (384, "base"),
    "blip_image_text_matching": (384, "base", "large"),
    "blip_nlvr": (384, "nlvr"),
    "blip_retrieval": (384, "coco", "coco_paper", "flickr", "flickr_paper", "large_coco", "large_flickr"),
    "blip_visdial": (384, "base"),
    "blip_vqa": (480, "aokvqa", "okvqa", "vqav2", "vqav2_base"),
}
"""Types of another size than 224, or than 48 for `tiny`."""
SIZES = {f"{arch}/{kind}": size for arch, (size, *kinds) in PIXELS.items() for kind in kinds}
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
INCEPTION = ([0.5] * 3, [0.5] * 3)


def config(folder: Path, *options: str, **sections: Any) -> Config:
    path = folder / "project.yaml"
    path.write_text(json.dumps(sections))  # JSON is YAML
    return Config.from_file(path, options)


def sizes_of(blocks: dict[str, Any]) -> set[int]:
    return {block["image_size"] for block in blocks["vis_processor"].values()}


@pytest.mark.parametrize(("arch", "kind"), TYPES, ids=map("/".join, TYPES))
@pytest.mark.slow
def test_every_type_has_its_published_size_and_follows_another(
    arch: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the command line and in `load_model_and_preprocess`, here without building the model."""
    sections = {"model": {"arch": arch, "model_type": kind}, "run": {"task": "captioning"}}
    published = SIZES.get(f"{arch}/{kind}", 48 if kind == "tiny" else 224)
    assert sizes_of(config(tmp_path, **sections).preprocess) == {published}
    assert sizes_of(config(tmp_path, "model.image_size=252", **sections).preprocess) == {252}
    monkeypatch.setattr(registry.get_model_class(arch), "from_config", lambda cfg, device: torch.nn.Identity())
    _, vis, _ = load_model_and_preprocess(arch, kind, image_size=252)
    assert vis["train"](PICTURE).shape == vis["eval"](PICTURE).shape == (3, 252, 252)


@pytest.mark.parametrize("arch", ["blip_caption", "blip2_opt", "blip2"])
def test_a_model_of_another_size_answers_about_its_processors_images(arch: str) -> None:
    model, vis, _ = load_model_and_preprocess(arch, "tiny", is_eval=True, image_size=72)
    image = torch.stack([vis[split](PICTURE) for split in ("train", "eval")])
    assert image.shape == (2, 3, 72, 72)
    with torch.no_grad():
        assert len(model.generate({"image": image}, num_beams=1, max_length=6, min_length=1)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(PROJECTS).with_suffix("").as_posix())
def test_every_recipe_follows_another_size(path: Path) -> None:
    cfg = Config.from_file(path, ["model.image_size=252"])
    assert {size for section in [cfg.preprocess, *cfg.datasets.values()] for size in sizes_of(section)} == {252}


@pytest.mark.slow
def test_every_packaged_dataset_follows_the_model(tmp_path: Path) -> None:
    for name, kinds in dataset_zoo:
        for kind in kinds:
            sections = {"model": {"arch": "blip2", "model_type": "tiny", "image_size": 60}, "run": {"task": "vqa"}}
            cfg = config(tmp_path, datasets={name: {"type": kind}}, **sections)
            assert sizes_of(cfg.datasets[name]) == {60}, name


def test_a_jobs_config_follows_another_size_and_prompt(tmp_path: Path) -> None:
    """It has every value written out, at the model and at each processor."""
    datasets = {"shapes_caption": {}, "caption": {"text_processor": {"eval": {"name": "blip_caption"}}}}
    cfg = config(tmp_path, datasets=datasets, **OWN)
    (tmp_path / "config.yaml").write_text(cfg.to_yaml())
    assert "${" not in cfg.to_yaml()
    again = Config.from_file(tmp_path / "config.yaml", ["model.image_size=96", "model.prompt=a drawing of "])
    assert {size for section in [again.preprocess, *again.datasets.values()] for size in sizes_of(section)} == {96}
    assert again.preprocess["text_processor"]["train"]["prompt"] == "a drawing of "
    assert again.datasets["shapes_caption"]["text_processor"]["train"]["prompt"] == "a drawing of "


@pytest.mark.parametrize("stated", ["it is", "it is ", " it is"])
def test_a_jobs_config_keeps_the_spaces_around_its_prompt(stated: str, tmp_path: Path) -> None:
    """BLIP-2's prompts have none, its processors put one after it."""
    blocks = {"train": {"name": "blip_caption", "prompt": f"{stated.strip()} "}, "eval": {"name": "blip_caption"}}
    model = {"arch": "blip2_opt", "model_type": "tiny", "prompt": stated}
    datasets = {"shapes_caption": {"text_processor": blocks}}
    cfg = config(tmp_path, model=model, datasets=datasets, run={"task": "captioning"})
    (tmp_path / "config.yaml").write_text(cfg.to_yaml())
    if stated.startswith(" "):  # other spaces than the processor's: there is nothing to refer to
        with pytest.raises(ConfigError, match=r"'it is ' is not model.prompt, which is 'see'"):
            Config.from_file(tmp_path / "config.yaml", ["model.prompt=see"])
        return
    again = Config.from_file(tmp_path / "config.yaml", ["model.prompt=see"])
    assert again.datasets["shapes_caption"]["text_processor"]["train"]["prompt"].strip() == "see"
    assert Config.from_file(tmp_path / "config.yaml").to_dict() == cfg.to_dict()


MODEL = {"arch": "blip_caption", "model_type": "tiny"}
OWN: dict[str, Any] = {"model": MODEL, "run": {"task": "captioning"}}


@pytest.mark.parametrize("name", ["blip_image_eval", "blip_video_eval"])
def test_processors_of_ones_own_take_the_size_of_the_model(name: str, tmp_path: Path) -> None:
    blocks = {"vis_processor": {"eval": {"name": name}}}
    cfg = config(tmp_path, datasets={"caption": blocks}, **OWN)
    assert cfg.datasets["caption"]["vis_processor"]["eval"] == {"name": name, "image_size": 48}
    section = {**MODEL, "image_size": 96}
    cfg = config(tmp_path, datasets={"caption": blocks}, model=section, run=OWN["run"])
    assert sizes_of(cfg.datasets["caption"]) == {96}


def test_another_size_than_the_models_is_an_error_that_names_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = {"vis_processor": {"train": {"name": "blip_image_train", "image_size": 64}}}
    words = "64 is not model.image_size, which is 48"
    with pytest.raises(ConfigError, match=f"datasets.caption.vis_processor.train.image_size: {words}"):
        config(tmp_path, datasets={"caption": blocks}, **OWN)
    for flags in (["--dry-run"], []):
        complains(capsys, cli_helpers.train(tmp_path / "project.yaml", job=None, flags=flags), words)
    with pytest.raises(ConfigError, match=f"project.yaml: preprocess.vis_processor.train.image_size: {words}"):
        config(tmp_path, preprocess=blocks, **OWN)


def test_the_size_is_not_set_among_the_encoders_sizes() -> None:
    for arch, words in (
        ("blip_caption", "vit.image_size: set model.image_size instead"),
        ("blip2", "model.vit: no size"),
    ):
        with pytest.raises(ValueError, match=words):
            load_model(arch, "tiny", vit={"image_size": 96})


# Mean and standard deviation


@pytest.mark.parametrize(
    ("vit_model", "mean", "std"),
    [
        ("vit_tiny_patch16_224", *INCEPTION),
        ("vit_base_patch16_siglip_224", *INCEPTION),
        ("convnext_tiny", *IMAGENET),
        ("vit_small_patch14_dinov2", *IMAGENET),
    ],
)
def test_a_timm_encoders_images_have_its_own_mean_and_std(
    vit_model: str, mean: list[float], std: list[float], tmp_path: Path
) -> None:
    """As their authors say: [-1, 1] of "How to train your ViT" and SigLIP, ImageNet's of ConvNeXt and DINOv2."""
    sections: dict[str, Any] = {"model": {"arch": "blip2", "model_type": "pretrain"}, "run": {"task": "retrieval"}}
    datasets = {"coco_retrieval": {}, "retrieval": {"vis_processor": {"eval": {"name": "blip_image_eval"}}}}
    cfg = config(tmp_path, f"model.vit_model={vit_model}", datasets=datasets, **sections)
    printed = yaml.safe_load(cfg.to_yaml())
    for section in (printed["preprocess"], *printed["datasets"].values()):
        for block in section["vis_processor"].values():
            assert (block["mean"], block["std"], block["image_size"]) == (mean, std, 224)


def test_explicit_mean_and_std_win_and_other_encoders_have_clips(tmp_path: Path) -> None:
    block = {"name": "blip_image_eval", "mean": [0.1, 0.2, 0.3]}
    sections = {"preprocess": {"vis_processor": {"eval": block}}, "run": {"task": "retrieval"}}
    model = {"arch": "blip2", "model_type": "pretrain", "vit_model": "convnext_tiny"}
    found = config(tmp_path, model=model, **sections).preprocess["vis_processor"]["eval"]
    assert (found["mean"], found["std"]) == (block["mean"], IMAGENET[1])
    for section in ({**MODEL, "vit_type": "base"}, {"arch": "blip2", "model_type": "pretrain_vitL"}):
        cfg = config(tmp_path, model=section, run={"task": "retrieval"})
        assert not {"mean", "std"} & cfg.preprocess["vis_processor"]["eval"].keys()


def test_loading_a_model_gives_processors_with_its_encoders_mean() -> None:
    settings = {"vit_model": "vit_tiny_patch16_224", "vit": {"width": 32, "depth": 1, "num_heads": 2}, "image_size": 32}
    _, vis, _ = load_model_and_preprocess("blip2", "tiny", **settings)
    assert vis["train"].mean == vis["eval"].mean == (0.5, 0.5, 0.5)
    assert vis["eval"](Image.new("RGB", (8, 8), "white")).unique().tolist() == [1.0]  # (1 - 0.5) / 0.5
    _, vis, _ = load_model_and_preprocess("blip2", "tiny")
    assert vis["eval"].mean == (0.48145466, 0.4578275, 0.40821073)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_a_hugging_face_folders_mean_and_std_are_its_processors(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from lavis_lite.convert.folders import write_folder

    folder = write_folder(load_model("blip_caption", "tiny"), tmp_path / "hf", arch="blip_caption")
    content = {"image_mean": IMAGENET[0], "image_std": IMAGENET[1], "size": {"height": 48, "width": 48}}
    (folder / "processor_config.json").unlink()
    nested = {"image_processor": content} if name == "processor_config.json" else content
    (folder / name).write_text(json.dumps(nested))
    _, vis, _ = from_pretrained(folder, processors=True)
    assert (vis["eval"].mean, vis["eval"].std) == tuple(map(tuple, IMAGENET))
    assert vis["eval"](Image.new("RGB", (9, 9))).shape == (3, 48, 48)
    assert "pixels" not in caplog.text
    _, vis, _ = from_pretrained(folder, processors=True, image_size=96)
    assert vis["eval"](Image.new("RGB", (9, 9))).shape == (3, 96, 96)
    assert "images of 48 pixels in its preprocessor, and the model takes 96" in caplog.text


# The prompt of captions


def test_a_caption_prompt_other_than_the_models_is_an_error(tmp_path: Path) -> None:
    def texts(prompt: str) -> dict[str, Any]:
        return {"caption": {"text_processor": {"train": {"name": "blip_caption", "prompt": prompt}}}}

    with pytest.raises(ConfigError, match=r"train\.prompt: 'a drawing of ' is not model\.prompt.* 'a picture of '"):
        config(tmp_path, datasets=texts("a drawing of "), **OWN)
    section = {**MODEL, "prompt": "a drawing of"}
    cfg = config(tmp_path, datasets=texts("a drawing of "), model=section, run=OWN["run"])  # but for the space
    assert cfg.model["prompt"] == "a drawing of"
    config(tmp_path, datasets=texts(""), **OWN)
    pretraining = {"arch": "blip_pretrain", "model_type": "tiny"}  # whose prompt has no effect
    config(tmp_path, datasets=texts("a drawing of "), model=pretraining, run={"task": "image_text_pretrain"})


def test_the_stored_prompt_of_a_processor_follows_the_models() -> None:
    stored = {"text_processor": {"train": {"name": "blip_caption", "prompt": "a picture of "}}}
    section = {**MODEL, "prompt": "a drawing of"}
    assert preprocess_of(section, stored)["text_processor"]["train"]["prompt"] == "a drawing of "
    assert preprocess_of(MODEL, stored)["text_processor"] == stored["text_processor"]


def learned_by(model: Any, texts: list[str]) -> list[str]:
    """What the captioner's labels read, without `[SEP]`."""
    ids, _ = model.tokenize(texts, start=model.decoder_start, max_length=model.max_txt_len)
    labels = model.caption_labels(ids, texts)
    return [model.tokenizer.decode(row[row != -100], skip_special_tokens=True) for row in labels]


def test_a_prompt_is_masked_only_where_the_text_begins_with_it(caplog: pytest.LogCaptureFixture) -> None:
    """`a picture of ` is three tokens: masked by their number, the others would lose their first words."""
    model = load_model("blip_caption", "tiny")
    texts = ["a picture of a red circle", "a red circle left of a star", "a picture", "red"]
    assert learned_by(model, texts) == ["a red circle", "a red circle left of a star", "a picture", "red"]
    assert "begins with" not in caplog.text
    image = torch.zeros(2, 3, 48, 48)
    for _ in range(2):
        assert model({"image": image, "text_input": ["red", "blue"]})["loss"].isfinite()
    said = [r.getMessage() for r in caplog.records if "model.prompt: " in r.getMessage()]
    assert len(said) == 1
    assert "'a picture of ', e.g. 'red'" in said[0]


def test_a_prompt_as_long_as_max_txt_len_is_an_error() -> None:
    model = load_model("blip_caption", "tiny", max_txt_len=5)
    with pytest.raises(ValueError, match=r"model\.prompt: .a picture of .*max_txt_len=5"):
        model({"image": torch.zeros(1, 3, 48, 48), "text_input": ["a picture of a cat"]})
    roomy = load_model("blip_caption", "tiny", max_txt_len=6)
    assert learned_by(roomy, ["a picture of red squares"]) == ["red"]


def test_a_batch_without_any_label_names_its_texts() -> None:
    model = load_model("blip2_opt", "tiny", max_output_txt_len=1)  # which the start token takes
    samples = {"image": torch.zeros(2, 3, 48, 48), "text_input": ["what?", "who?"], "text_output": ["a cat", "a dog"]}
    with pytest.raises(
        ValueError, match=r"none of the batch's 2 texts has a token to learn \('a cat', 'a dog' \.\.\.\)"
    ):
        model(samples)


@pytest.mark.parametrize("arch", ["blip2_opt", "blip2_vicuna"])
def test_a_language_model_learns_all_but_the_prompt(arch: str) -> None:
    """Also of a caption that only begins with the prompt's letters, and of one that is the prompt."""
    model = load_model(arch, "tiny", prompt="a photo")
    texts = ["a photo of a cat", "a photograph of a cat", "a dog", "a photo"]
    batch = model.llm_tokenizer.caption_batch(texts, model.prompt)
    decode = model.llm_tokenizer.tokenizer.decode
    learned = [decode(row[row != -100], skip_special_tokens=True).strip() for row in batch.labels]
    assert learned == ["of a cat", "a photograph of a cat", "a dog", ""]
    assert [decode(row, skip_special_tokens=True).strip() for row in batch.ids][1] == "a photo a photograph of a cat"
