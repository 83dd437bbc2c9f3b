"""InstructBLIP's recipes, at tiny size on made-up files in each set's published form, in the folders that the packaged
YAMLs name: instruction tuning from a BLIP-2, finetuning from what that left, one's own data, every evaluation.
"""

import gzip
import json
import math
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import cli_helpers
import full_size
import pytest
import torch
from safetensors.torch import save_file
from test_instruct_held_in import AOKVQA, PROBLEM, book, textcaps
from test_instruct_held_out import ICONS, IVQA, MEMES, TEXTVQA, VIDEO_QA, VISDIAL, VIZWIZ, VSR, WORDS, picture

from lavis_lite.common import checkpoint
from lavis_lite.common.config.config import Config
from lavis_lite.common.registry import registry
from lavis_lite.datasets import visual
from lavis_lite.models import load_model
from lavis_lite.nn.llm_loading import load_language_model
from lavis_lite.tasks.metrics import caption_java

PROJECT = cli_helpers.ROOT / "projects" / "instructblip"
TRAIN, EVAL = (sorted((PROJECT / kind).glob("[!_]*.yaml")) for kind in ("train", "eval"))
COCO = ["a.jpg", "b.jpg", "c.jpg"]
QUESTIONS = [
    {"question_id": i, "image": name, "question": "What color is it?", "answer": ["red"] * 9 + ["blue"]}
    for i, name in enumerate(COCO)
]
CAPTIONS = [{"image": name, "caption": ["a red circle.", "A circle"], "image_id": f"coco_{name}"} for name in COCO]
LETTERED = {**AOKVQA, "choices": ["red", "blue", "two"], "correct_choice_idx": 1, "direct_answers": ["blue"] * 10}
CHOICES = [{**LETTERED, "image": name, "question_id": name} for name in COCO]
UNANSWERED = [{k: v for k, v in c.items() if k not in ("correct_choice_idx", "direct_answers")} for c in CHOICES]
SAID = [
    ("human", "<image>\nwhat color is it?"),
    ("gpt", "red"),
    ("human", "where is it?"),
    ("gpt", "left of the circle"),
]
TALK = [{"id": n, "image": n, "conversations": [{"from": who, "value": text} for who, text in SAID]} for n in COCO]
PROBLEMS = [
    {**PROBLEM, "image": name, "split": split, "choices": ["red", "a blue circle"], "answer": 1, "hint": hint}
    for split in ("train", "val", "test")
    for name, hint in (("a.jpg", ""), ("b.jpg", "left of the circle."))
]
BOOKS = {name: book(split, "red", "a blue circle") for split, name in ((1, "a"), (2, "b"), (3, "c"))}
# annotation file below the data root: its content
FILES: dict[str, Any] = {
    "coco/annotations/coco_karpathy_train.json": CAPTIONS,
    "TextCaps/TextCaps_0.1_train.json": textcaps(("a", "a red circle"), ("a", "a circle"), ("b", "two circles")),
    "textvqa/annotations/TextVQA_Rosetta_OCR_v0.2_train.json": {"data": [{"image_id": "a", "ocr_tokens": ["red"]}]},
    "coco/annotations/vqa_train.json": QUESTIONS,
    "okvqa/annotations/okvqa_train.json": QUESTIONS,
    "okvqa/annotations/vqa_val_eval.json": QUESTIONS,
    "okvqa/annotations/answer_list.json": ["red", "blue"],
    "okvqa/annotations/OpenEnded_mscoco_val2014_questions.json": {"questions": QUESTIONS},
    "okvqa/annotations/mscoco_val2014_annotations.json": {
        "annotations": [{"question_id": i, "answers": [{"answer": "red", "answer_id": 1}] * 10} for i in range(3)]
    },
    "aokvqa/annotations/aokvqa_v1p0_train.json": CHOICES,
    "aokvqa/annotations/aokvqa_v1p0_val.json": CHOICES,
    "aokvqa/annotations/aokvqa_v1p0_test.json": UNANSWERED,
    "aokvqa/annotations/specialized_vocab_train_lavis.json": ["red", "blue"],
    "ocrvqa/annotations/ocrvqa.json": BOOKS,
    "LLaVA-Instruct-150K/annotations/conversation_58k.json": TALK,
    "LLaVA-Instruct-150K/annotations/detail_23k.json": TALK,
    "LLaVA-Instruct-150K/annotations/complex_reasoning_77k.json": TALK,
    "nocaps/annotations/nocaps_val.json": [{"image": "a.jpg", "img_id": 0}, {"image": "b.jpg", "img_id": 1}],
    "flickr30k/annotations/test.json": CAPTIONS,
    "gqa/annotations/testdev_balanced_questions.json": [{**question, "answer": "red"} for question in QUESTIONS],
    "textvqa/annotations/TextVQA_0.5.1_val.json": {"data": TEXTVQA["data"][:1]},
    "textvqa/annotations/TextVQA_Rosetta_OCR_v0.2_val.json": WORDS,
    "vizwiz/annotations/test.json": VIZWIZ[1:],
    "ivqa/annotations/test.csv": IVQA,
    **{f"{name}/annotations/qa_test.json": VIDEO_QA for name in ("msvd", "msrvtt")},
    **{f"{name}/annotations/qa_ans2label.json": {"play": 1, "two": 0, "red": 2} for name in ("msvd", "msrvtt")},
    "vsr/annotations/test.jsonl": VSR,
    "hateful_memes/dev_seen.jsonl": MEMES,
    "iconqa/annotations/test.json": ICONS,
    **{f"scienceqa/annotations/problems_{split}.json": PROBLEMS for split in ("train", "val", "test")},
    "visdial/visdial_1.0_val.json": VISDIAL,
}
VISDIAL_IMAGES = [f"visdial/VisualDialog_val2018/VisualDialog_val2018_{number:012d}.jpg" for number in (185565, 7)]
IMAGES = [
    *(
        f"{folder}/{name}"
        for folder in ("coco/images", "coco/images/train2017", "flickr30k", "gqa/images")
        for name in COCO
    ),
    *(f"{folder}/images/{name}" for folder in ("TextCaps", "ocrvqa", "nocaps", "scienceqa") for name in COCO),
    *("textvqa/train_images/003a.jpg", "vizwiz/test/VizWiz_test_00000001.jpg", "iconqa/all_images/a.png"),
    *("iconqa/all_images/b.png", "vsr/images/000000296471.jpg", "vsr/images/7.jpg", "hateful_memes/img/42953.png"),
    *("hateful_memes/img/5.png", *VISDIAL_IMAGES, *(f"{name}/videos/x.jpg" for name in ("msvd", "msrvtt", "ivqa"))),
]
TINY = ["model.model_type=tiny", "model.image_size=48"]
RUN = {"batch_size_train": 2, "batch_size_eval": 2, "num_workers": 0, "log_freq": 1, "tensorboard": "false"}
FEW = {"max_iters": 2, "max_epoch": 2}
# training recipe: its language model's setting, and what it goes on with: a BLIP-2 or another recipe's job
CHAIN = {
    "instruct_flant5xl": ("t5_model", "stage2"),
    "instruct_flant5xxl": ("t5_model", "stage2"),
    "instruct_vicuna7b": ("llm_model", "stage1"),
    "instruct_vicuna13b": ("llm_model", "stage1"),
    "lora": ("llm_model", "stage1"),
    "scienceqa_ft": ("llm_model", "instruct_vicuna7b"),
    "ocr_vqa_ft": ("llm_model", "instruct_vicuna7b"),
    "okvqa_ft": ("llm_model", "instruct_vicuna7b"),
    "aokvqa_ft": ("llm_model", "instruct_vicuna7b"),
    "aokvqa_mc_ft": ("llm_model", "instruct_vicuna7b"),
    "own_data": ("t5_model", "instruct_flant5xl"),
}


def recipe(name: str) -> Path:
    (path,) = [path for path in TRAIN + EVAL if path.stem == name]
    return path


def write(path: Path, content: Any) -> None:
    """JSON, JSONL or a text, by the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = content if path.suffix == ".jsonl" else [content]
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data root, as someone would fill it who works without a network."""
    root = tmp_path_factory.mktemp("data")
    for name, content in FILES.items():
        write(root / name, content)
    web = [{"image": str(root / "coco/images" / name), "caption": "a circle"} for name in COCO]
    write(root / "capfilt14m/annotations/annotation.json", web)
    for name in IMAGES:
        picture(root / name)
    return root


@pytest.fixture(autouse=True)
def _surroundings(root: Path, shapes_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That root, no Java; a video is frames of one grey, as bright as its name is long."""
    monkeypatch.setenv("LAVIS_LITE_DATA", str(root))
    monkeypatch.setattr(caption_java, "find_java", lambda: None)
    monkeypatch.setattr(
        visual, "read_frames", lambda path, count, _, **__: torch.full((3, count, 48, 48), len(path.name) / 20)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs go, with what they start from: image encoder, language models, BLIP-2 after either stage."""
    folder = tmp_path_factory.mktemp("instructblip")
    encoder = f"model.vit_weights={folder / 'encoder.safetensors'}"
    save_file(load_model("blip2", "tiny").visual_encoder.state_dict(), folder / "encoder.safetensors")
    for setting, name in (("t5_model", "tiny_t5"), ("llm_model", "tiny_vicuna")):
        model, tokenizer = load_language_model(name, dtype=torch.float32)
        model.save_pretrained(folder / setting)
        tokenizer.save_pretrained(folder / setting)
    path = cli_helpers.ROOT / "projects" / "blip2" / "train" / "retrieval_coco_ft.yaml"
    for stage, arch, own in (
        ("stage1", "blip2", []),
        ("stage2", "blip2_t5", [f"model.t5_model={folder / 't5_model'}"]),
    ):
        options = [*TINY, f"model.arch={arch}", "model.load_pretrained=false", "model.freeze_vit=true", encoder, *own]
        model = registry.get_model_class(arch).from_config(Config.from_file(path, options).model)
        checkpoint.save({"model": model.checkpoint_state_dict()}, folder / f"{stage}.pth")
    return folder


def small(output: Path, *options: str, **run: Any) -> list[str]:
    """Options that make the recipe tiny, all else as it is."""
    settings = {"output_dir": output, **RUN, **run}
    return [*TINY, *options, *(f"run.{key}={value}" for key, value in settings.items())]


# Training


def start_of(name: str, folder: Path) -> list[str]:
    """Options that say what the recipe goes on with, which is trained first if it is a recipe's."""
    language_model, before = CHAIN[name]
    path = folder / f"{before}.pth" if before.startswith("stage") else trained(before, folder) / "checkpoint_last.pth"
    own = [f"model.{language_model}={folder / language_model}", f"model.vit_weights={folder / 'encoder.safetensors'}"]
    reads = [f"model.init_text={folder / 'stage1.pth'}"] if before.startswith("stage") else []
    return [*own, *reads, f"model.pretrained={path}"]


def trained(name: str, folder: Path, *options: str, **run: Any) -> Path:
    """The job of the recipe's two steps."""
    job = folder / name / "job"
    if not job.exists():
        settings = {**FEW, "iters_per_inner_epoch": 2} if CHAIN[name][1].startswith("stage") else FEW
        options = (*start_of(name, folder), *options)
        assert cli_helpers.train(recipe(name), *small(job.parent, *options, **settings, **run)) == 0
    return job


@pytest.mark.slow
@pytest.mark.parametrize("name", ["instruct_flant5xl", "instruct_flant5xxl", "instruct_vicuna7b", "instruct_vicuna13b"])
def test_instruction_tuning_trains_the_q_former_from_blip2(name: str, folder: Path) -> None:
    job = trained(name, folder)
    assert [row["step"] for row in cli_helpers.steps(job)] == [1, 2]
    saved = cli_helpers.weights(job / "checkpoint_best.pth")
    projection = CHAIN[name][0].replace("model", "proj")
    assert {key.split(".")[0] for key in saved} == {"Qformer", "query_tokens", "ln_vision", projection}
    start = cli_helpers.weights(folder / "stage1.pth") | cli_helpers.weights(folder / f"{CHAIN[name][1]}.pth")
    moved = {key: float((saved[key] - start[key]).abs().max()) for key in saved.keys() & start.keys()}
    assert {key for key in saved if key not in start} <= {f"{projection}.weight", f"{projection}.bias"}
    assert 0 < max(moved.values()) < 1e-6  # two steps of a warm-up from 1e-8
    (best,) = [row["metrics"] for row in cli_helpers.log(job) if row.get("split") == "mean"]
    assert best["agg_metrics"] == cli_helpers.metrics(job, "validation")["accuracy"]


@pytest.mark.slow
def test_the_mixture_draws_every_set_by_the_square_root_of_its_size(folder: Path) -> None:
    options = start_of("instruct_flant5xl", folder)
    output = folder / "mixture"
    run = {"max_iters": 60, "iters_per_inner_epoch": 60, "valid_splits": "[]"}
    assert cli_helpers.train(recipe("instruct_flant5xl"), *small(output, *options, **run)) == 0
    log = cli_helpers.log(output / "job")
    (mixture,) = [row["mixture"] for row in log if "mixture" in row]
    sizes = dict.fromkeys(mixture, 3) | {"coco_caption_instruct": 6, "ocr_vqa_instruct": 2}  # two captions an image
    sizes |= {name: 6 for name in mixture if name.startswith("llava")}  # two questions a conversation
    assert {name: row["samples"] for name, row in mixture.items()} == sizes
    total = sum(math.sqrt(size) for size in sizes.values())
    assert {name: row["share"] for name, row in mixture.items()} == pytest.approx(
        {name: math.sqrt(size) / total for name, size in sizes.items()}
    )
    (given,) = [row["datasets"] for row in log if "datasets" in row]
    assert len(sizes) == 13
    assert all(row["batches"] > 0 and math.isfinite(row["loss"]) for row in given.values())


def test_the_factors_are_a_key() -> None:
    """The paper's hand adjustments, whose values are not published."""
    run = Config.from_file(recipe("instruct_vicuna7b"), ["run.train_dataset_factors.ok_vqa_instruct=2"]).run
    assert run.train_dataset_factors == {"aok_vqa_instruct": 1.0, "ok_vqa_instruct": 2.0}
    assert run.train_dataset_sampling == "sqrt"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHAIN if name.endswith("_ft")])
def test_finetuning_starts_from_instructblip_and_is_tested(name: str, folder: Path) -> None:
    job = trained(name, folder, *short_answers(recipe(name)))
    assert [row["step"] for row in cli_helpers.steps(job)] == [1, 2]
    cfg = Config.from_file(recipe(name))
    for split in [*cfg.run.valid_splits, *cfg.run.test_splits]:
        assert list((job / "result").glob(f"{split}_*.json"))
        assert "agg_metrics" in cli_helpers.metrics(job, split)
    start, saved = (
        cli_helpers.weights(path / "checkpoint_last.pth") for path in (trained("instruct_vicuna7b", folder), job)
    )
    assert start.keys() == saved.keys()
    assert 0 < max(float((saved[key] - start[key]).abs().max()) for key in saved) < 1e-5


@pytest.mark.slow
def test_lora_trains_adapters_of_the_language_model_too(folder: Path) -> None:
    saved = cli_helpers.weights(trained("lora", folder) / "checkpoint_last.pth")
    adapters = [key for key in saved if key.startswith("llm_model.")]
    assert adapters
    assert all(re.search(r"\.[qv]_proj\.lora_[AB]\.", key) for key in adapters)


# One's own data


def own_files(folder: Path, records: list[dict[str, Any]]) -> list[str]:
    """Options that name files with these records, the second half for validation."""
    middle = len(records) // 2
    for split, part in {"train": records[:middle], "val": records[middle:]}.items():
        write(folder / f"{split}.jsonl", part)
    info = {split: {"storage": str(folder / f"{split}.jsonl")} for split in ("train", "val")}
    return [
        f"datasets.instruct.build_info.annotations={json.dumps(info)}",
        "datasets.instruct.build_info.images.storage=''",
    ]


def own_record(image: str, number: int) -> dict[str, Any]:
    return {"image": image, "instruction": "what color is it?", "output": "red" if number % 2 else "blue"}


@pytest.mark.slow
def test_own_data_trains_validates_and_mixes(folder: Path, tmp_path: Path, root: Path) -> None:
    images = [str(root / "coco/images" / name) for name in COCO] * 4
    written = own_files(tmp_path / "written", [own_record(image, i) for i, image in enumerate(images)])
    job = trained("own_data", folder, *written)
    assert 0 <= cli_helpers.metrics(job, "val")["accuracy"] <= 100
    chosen = own_files(
        tmp_path / "ranked", [{**own_record(n, i), "candidates": ["red", "blue"]} for i, n in enumerate(images)]
    )
    mixed = ["datasets.llava150k_conversation_instruct={}"]
    ratios = "{instruct: 1, llava150k_conversation_instruct: 1}"
    options = [*start_of("own_data", folder), *chosen, *mixed, f"run.train_dataset_ratios={ratios}"]
    assert cli_helpers.train(recipe("own_data"), *small(tmp_path / "mix", *options, **FEW)) == 0
    (row,) = [row for row in cli_helpers.log(tmp_path / "mix" / "job") if "mixture" in row]
    assert {name: own["share"] for name, own in row["mixture"].items()} == {
        "instruct": 0.5,
        "llava150k_conversation_instruct": 0.5,
    }
    predictions = json.loads((tmp_path / "mix/job/result/val_predictions.json").read_text())
    right = [entry["prediction"] == own_record("", i)["output"] for i, entry in enumerate(predictions)]
    assert cli_helpers.metrics(tmp_path / "mix" / "job", "val")["accuracy"] == pytest.approx(100 * fmean(right))


@pytest.mark.slow
def test_own_videos_train(folder: Path, tmp_path: Path) -> None:
    records = [{"video": f"{i}.mp4", "instruction": "what is it?", "output": "a circle"} for i in range(8)]
    options = [*start_of("own_data", folder), *own_files(tmp_path, records), "datasets.instruct.num_frames=2"]
    assert cli_helpers.train(recipe("own_data"), *small(tmp_path / "out", *options, **FEW)) == 0
    assert len(cli_helpers.steps(tmp_path / "out" / "job")) == 2


def test_what_own_data_has_commented_out_is_valid(tmp_path: Path) -> None:
    text, count = re.subn(r"^( *)# (?=[a-z]\w+:( |$))", r"\1", recipe("own_data").read_text(), flags=re.M)
    assert count == 7
    (tmp_path / "own.yaml").write_text(text)
    cfg = Config.from_file(tmp_path / "own.yaml")
    assert {"llm_lora", "llm_grad_checkpoint", "llm_quantization"} <= cfg.model.keys()
    assert {"instructions", "num_frames"} <= cfg.datasets["instruct"].keys()
    assert cfg.run.train_dataset_ratios.keys() == cfg.datasets.keys()


def test_every_training_recipe_is_trained_here() -> None:
    assert {path.stem for path in TRAIN} == set(CHAIN)


# Evaluation


def short_answers(path: Path) -> list[str]:
    """Options for fewer words and metrics than the recipe's."""
    cfg = Config.from_file(path)
    return ["run.metrics=[bleu,cider]", "run.max_len=12"] if cfg.run.task == "captioning" else []


T5, VICUNA, BLIP2 = ("blip2_t5_instruct", "blip2_vicuna_instruct", "blip2_t5")
OTHERS = [("nocaps", VICUNA), ("gqa", VICUNA), ("visdial", VICUNA), ("msvd_qa", VICUNA)]
OTHERS += [(name, BLIP2) for name in ("nocaps", "gqa", "scienceqa", "msvd_qa")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arch"), [*((path.stem, T5) for path in EVAL), *OTHERS])
def test_evaluation_recipe_evaluates(name: str, arch: str, tmp_path: Path) -> None:
    """Also where BLIP-2's rows of the paper's table come from."""
    path = recipe(name)
    options = [f"model.arch={arch}", *short_answers(path)]
    if name == "nocaps":
        write(tmp_path / "gt.json", {"annotations": [{"image_id": i, "caption": "a red circle"} for i in range(2)]})
        options.append(f"run.annotation_file={tmp_path / 'gt.json'}")
    assert cli_helpers.evaluate(path, *small(tmp_path, *options)) == 0
    cfg = Config.from_file(path)
    results = {split: list((tmp_path / "evaluation/result").glob(f"{split}_*.json")) for split in cfg.run.test_splits}
    assert all(results.values())
    metrics = cli_helpers.metrics(tmp_path / "evaluation", cfg.run.test_splits[0])
    if name == "vizwiz":
        assert json.loads((tmp_path / "evaluation/result/test_vizwiz_submission.json").read_text())[0]["image"]
        assert "only the result file was written" in metrics["note"]
        return
    wanted = {entry.metric for entry in cfg.expected} or {"agg_metrics"}
    assert all(0 <= metrics[metric] <= 100 for metric in wanted)


PROMPTS = {
    "flickr30k": "A short image description:",
    "gqa": "Question: what color is it? Short answer:",
    "okvqa": "Question: what color is it? Short answer:",
    "aokvqa": "Question: what is the man awaiting? Short answer:",
    "ocr_vqa": "Question: question 0? Short answer:",
    "vizwiz": "Question: what? Short answer:",
    "ivqa": "Question: what tool? Short answer:",
    "msvd_qa": "Question: what is a boy doing? Short answer:",
    "msrvtt_qa": "Question: what is a boy doing? Short answer:",
    "textvqa": f"OCR tokens: {', '.join(f'w{i}' for i in range(30))}. Question: what is the brand? Short answer:",
    "vsr": 'Based on the image, is this statement true or false? "The cat (A) is inside." Answer:',
    "hateful_memes": 'This is an image with: "their character: not {that}" written on it. Is it hateful? Answer:',
    "iconqa": "Question: how likely? Options: (a) certain (b) unlikely (c) never. Short answer:",
    "aokvqa_mc": "Question: what is the man awaiting? Options: (a) red (b) blue (c) two. Short answer:",
    "visdial": "Dialog history: \n Question: is it nice? Short answer:",
    "scienceqa": f"Context:  Question: {PROBLEM['question']} Options: (a) red (b) a blue circle. Answer:",
}
"""What the paper's appendix E says is asked, of the first sample."""


@pytest.mark.parametrize("path", EVAL, ids=lambda path: path.stem)
def test_the_paper_s_prompt_is_asked_and_decoding_is_explicit(path: Path, tmp_path: Path) -> None:
    cfg = Config.from_file(path, small(tmp_path))
    task = registry.get_task_class(cfg.run.task)(**cfg.task)
    ((dataset, *_),) = (list(splits.values()) for splits in task.build_datasets(cfg).values())
    assert cfg.model["max_output_txt_len"] == 256
    others = ("accuracy", "metric", "prompt", "metrics", "annotation_file", "server_file")
    decoding = {key: value for key, value in cfg.task.items() if key not in others}
    if cfg.run.task == "captioning":
        penalties = {"length_penalty": 1.0, "repetition_penalty": 1.5}
        assert decoding == {"num_beams": 5, "max_len": 80, "min_len": 10, **penalties}
        assert cfg.task["prompt"] == "A short image description:"
    elif cfg.run.task == "instruct":
        assert decoding == {}
        assert dataset[0]["candidates"]
    elif path.stem in ("msvd_qa", "msrvtt_qa"):
        assert decoding == {"inference_method": "rank", "num_ans_candidates": 100_000}
        assert dataset.answer_list == ["two", "play", "red"]
    else:
        max_len = 30 if path.stem == "ocr_vqa" else 10
        lengths = {"num_beams": 5, "max_len": max_len, "min_len": 1, "length_penalty": -1.0}
        assert decoding == {"inference_method": "generate", **lengths}
    if path.stem != "nocaps":
        assert dataset[0]["text_input"] == PROMPTS[path.stem]


# What the sources say


@pytest.mark.slow
def test_settings_of_the_paper() -> None:
    """Section 2.6: 60,000 steps at most, validation every 3,000, batches of 192, 128 and 64 on 16 GPUs."""
    batches = {"instruct_flant5xl": 192, "instruct_vicuna7b": 128, "instruct_flant5xxl": 64, "instruct_vicuna13b": 64}
    for name, batch in batches.items():
        cfg = Config.from_file(recipe(name))
        run, model = cfg.run, cfg.model
        assert 16 * run.batch_size_train * run.accum_grad_iters == batch
        assert f"16 processes x {run.batch_size_train}." in recipe(name).read_text()
        assert (run.runner, run.max_iters, run.iters_per_inner_epoch) == ("runner_iter", 60_000, 3000)
        assert (run.warmup_lr, run.init_lr, run.min_lr, run.warmup_steps) == (1e-8, 1e-5, 0, 1000)
        assert (run.lr_sched, run.beta1, run.beta2, run.weight_decay) == ("linear_warmup_cosine_lr", 0.9, 0.999, 0.05)
        assert (model["image_size"], model["max_txt_len"], model["max_output_txt_len"]) == (224, 128, 256)
        assert (model["freeze_vit"], model["qformer_text_input"]) == (True, True)
        blip2 = {"flant5xl": "_flant5xl", "flant5xxl": "_flant5xxl"}.get(name.removeprefix("instruct_"), "")
        assert model["pretrained"].endswith(f"/BLIP2/blip2_pretrained{blip2}.pth")


def test_the_published_averages_are_those_of_the_recipes() -> None:
    """Figure 4: 52.9 over eight held-out sets for InstructBLIP with Flan-T5-XL, 46.1 for BLIP-2, read off a figure."""
    names = ("gqa", "textvqa", "vsr", "hateful_memes", "iconqa", "scienceqa", "ivqa", "vizwiz")
    found = [Config.from_file(recipe(name)).expected for name in names]
    for model, printed, tolerance in ((None, 52.9, 0.1), ("blip2_t5/pretrain_flant5xl", 46.1, 0.35)):
        values = [entry.value for entries in found for entry in entries if entry.model == model]
        assert len(values) == 8
        assert fmean(values) == pytest.approx(printed, abs=tolerance)


@pytest.mark.parametrize(
    ("name", "manifest"),
    [("instruct_flant5xl", "blip2_t5_instruct__flant5xl"), ("instruct_vicuna7b", "blip2_vicuna_instruct__vicuna7b")],
)
@pytest.mark.slow
def test_dry_run_counts_what_the_original_had(
    name: str, manifest: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bert = [f"model.tokenizer={full_size.TINY_HF / 'bert'}", "model.qformer={vocab_size: 30523}"]
    run = ["run.batch_size_train=2", "run.num_workers=0", f"run.output_dir={tmp_path}"]
    with full_size.hub_stand_ins():
        assert cli_helpers.train(recipe(name), *bert, *run, job=None, flags=["--dry-run"]) == 0
    found = json.loads(gzip.decompress((full_size.REFERENCE / "manifests" / f"{manifest}.json.gz").read_bytes()))
    out = capsys.readouterr().out
    assert f"parameters  {found['n_params']:,} in all, {found['n_trainable']:,} trainable" in out
    assert "60,000 in all (2 samples per step)" in out
