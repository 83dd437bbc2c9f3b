"""Project YAMLs in LAVIS's form, one for each family and task and combination of keys that its own have, and the files
that they read. `/data` is the folder of the files.
"""

import copy
import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

PLACES = "{world_size: 1, dist_url: 'env://', distributed: True, device: cuda, seed: 42, resume_ckpt_path: null}"
EVALUATE = "evaluate: True, valid_splits: [test], train_splits: [train], save_freq: -1, val_freq: null"
SCHEDULE = (
    "lr_sched: linear_warmup_cosine_lr, init_lr: 1e-5, min_lr: 0, warmup_lr: 1e-8, warmup_steps: 1000, "
    "weight_decay: 0.05, max_epoch: 1, batch_size_train: 16, batch_size_eval: 16, num_workers: 4, accum_grad_iters: 1"
)
TRAIN = f"{SCHEDULE}, evaluate: False, amp: True, train_splits: [train], valid_splits: [val], test_splits: [test]"
CLIP = "{train: {name: clip_image_train, image_size: 224}, eval: {name: clip_image_eval, image_size: 224}}"
FRAMES = "n_frms: 4, image_size: 224, min_scale: 0.9, max_scale: 1.0, full_video: True"
ALPRO = f"{{train: {{name: alpro_video_train, {FRAMES}}}, eval: {{name: alpro_video_eval, {FRAMES}}}}}"
BLIP = "{{train: {{name: {}, image_size: {}}}, eval: {{name: blip_image_eval, image_size: {}}}}}"
QUESTION = "{train: {name: blip_question}, eval: {name: blip_question}}"


KEYS = {
    "model": "alpha apply_lemmatizer arch format_candidates_prompt freeze_vit image_size load_finetuned "
    "load_pretrained model_type negative_all_rank predict_with_gen pretrained prompt queue_size use_grad_checkpoint",
    "datasets.*": "data_type type text_processor.train.name text_processor.train.prompt text_processor.eval.name "
    "text_processor.eval.prompt pc_processor.train.name pc_processor.eval.name build_info.instance_id_key "
    "build_info.annotations.test.md5 build_info.annotations.test.storage build_info.annotations.test.url "
    "build_info.images.storage build_info.videos.storage build_info.pc.storage "
    + " ".join(
        f"vis_processor.{split}.{key}"
        for split in ("train", "eval")
        for key in ("name", "image_size", "n_frms", "full_video", "min_scale", "max_scale")
    ),
    "run": "accum_grad_iters amp anno_files.train anno_files.val anno_files.test annotation_file batch_size_eval "
    "batch_size_train device dist_url distributed evaluate img_ids inference_method init_lr iters_per_inner_epoch "
    "k_test length_penalty lr_decay_rate lr_layer_decay lr_sched max_epoch max_iters max_len min_len min_lr "
    "num_ans_candidates num_beams num_workers output_dir prompt ques_files.train ques_files.val ques_files.test "
    "report_metric resume_ckpt_path runner save_freq seed task test_splits train_splits use_dist_eval_sampler val_freq "
    "valid_splits warmup_lr warmup_steps weight_decay world_size",
}
"""All keys of LAVIS's project YAMLs of BLIP, BLIP-2 and InstructBLIP, by section."""


def files(stem: str, folder: str = "images", more: str = "") -> str:
    """`build_info` with the three splits of one file."""
    url, md5 = f"https://storage.googleapis.com/x/{stem}.json", "3ff34b0ef2db02d01c37399f6a2a6cd1"
    entry = f"{{url: ['{url}'], md5: ['{md5}'], storage: ['/data/{stem}.json']}}"
    splits = f"train: {entry}, val: {entry}, test: {entry}"
    return f"{{annotations: {{{splits}}}, {folder}: {{storage: /data}}{more}}}"


def recipe(model: str, datasets: dict[str, str], run: str) -> str:
    body = "\n".join(f"  {name}: {{{fields}}}" for name, fields in datasets.items())
    return f"model: {{{model}}}\ndatasets:\n{body}\nrun: {{<<: {PLACES}, output_dir: output/x, {run}}}\n"


def images(processor: str, size: int, text: str, stem: str) -> str:
    vis = BLIP.format(processor, size, size)
    return f"vis_processor: {vis}, text_processor: {text}, build_info: {files(stem)}"


CAPTION = "{{train: {{name: blip_caption, prompt: '{0}'}}, eval: {{name: blip_caption}}}}"
PLAIN = "{train: {name: blip_caption}, eval: {name: blip_caption}}"
PICTURE = CAPTION.format("a picture of ")
T5, VICUNA = (f"arch: blip2_{one}_instruct, load_pretrained: True" for one in ("t5", "vicuna"))
INSTRUCT = f"{EVALUATE}, {SCHEDULE}, amp: False, inference_method: generate"

YAMLS: dict[str, str] = {
    "blip captioning": recipe(
        "arch: blip_caption, model_type: base_coco, load_finetuned: False",
        {"coco_caption": f"data_type: images, {images('blip_image_train', 384, PICTURE, 'captions')}"},
        f"task: captioning, max_len: 20, min_len: 5, num_beams: 3, {TRAIN}",
    ),
    "blip captioning by steps": recipe(
        "arch: blip_caption, model_type: base_coco, load_finetuned: False",
        {"coco_caption": images("blip_image_train", 384, PICTURE, "captions")},
        "runner: runner_iter, max_iters: 2e4, iters_per_inner_epoch: 2e3, task: captioning, max_len: 20, min_len: 5, "
        f"num_beams: 3, {TRAIN}",
    ),
    "blip nocaps": recipe(
        "arch: blip_caption, model_type: base_coco",
        {"nocaps": images("blip_image_train", 384, CAPTION.format("a picture of "), "nocaps")},
        f"task: captioning, report_metric: False, max_len: 20, min_len: 5, num_beams: 3, {EVALUATE}, {SCHEDULE}",
    ),
    "blip vqa": recipe(
        "arch: blip_vqa, model_type: vqav2, load_finetuned: False, image_size: 480, "
        "load_pretrained: True, pretrained: 'https://storage.googleapis.com/x/model_base_capfilt_large.pth'",
        {
            "coco_vqa": images("blip_image_train", 480, QUESTION, "questions"),
            "vg_vqa": images("blip_image_train", 480, QUESTION, "questions"),
        },
        f"task: vqa, inference_method: rank, num_ans_candidates: 128, max_len: 10, min_len: 1, num_beams: 3, {TRAIN}",
    ),
    "blip okvqa": recipe(
        "arch: blip_vqa, model_type: okvqa, image_size: 480",
        {"ok_vqa": images("blip_image_train", 480, QUESTION, "questions")},
        f"task: vqa, inference_method: rank, num_ans_candidates: 128, max_len: 10, min_len: 1, num_beams: 256, "
        f"{SCHEDULE}, evaluate: True, test_splits: [test]",
    ),
    "blip aok_vqa": recipe(
        "arch: blip_vqa, model_type: aokvqa, load_finetuned: False, image_size: 480",
        {"aok_vqa": images("blip_image_train", 480, QUESTION, "questions")},
        f"task: aok_vqa, inference_method: rank, num_ans_candidates: 128, max_len: 10, min_len: 1, num_beams: 256, "
        f"{TRAIN}",
    ),
    "blip nlvr": recipe(
        "arch: blip_nlvr, model_type: nlvr, load_finetuned: False",
        {"nlvr": images("blip_image_train", 384, PLAIN, "pairs")},
        f"task: multimodal_classification, {TRAIN}",
    ),
    "blip retrieval": recipe(
        "arch: blip_retrieval, model_type: coco, load_finetuned: False, queue_size: 57600, alpha: 0.4, "
        "negative_all_rank: True",
        {"coco_retrieval": images("blip_image_train", 384, PLAIN, "captions")},
        f"task: retrieval, k_test: 256, use_dist_eval_sampler: False, {TRAIN}",
    ),
    "blip pretrain": recipe(
        "arch: blip_pretrain, model_type: base, load_pretrained: False, queue_size: 57600, alpha: 0.4",
        {
            "coco_caption": images("blip_image_train", 224, PLAIN, "captions"),
            "vg_caption": images("blip_image_train", 224, PLAIN, "captions"),
        },
        "task: image_text_pretrain, lr_sched: linear_warmup_step_lr, lr_decay_rate: 0.9, init_lr: 3e-4, min_lr: 1e-6, "
        "warmup_lr: 1e-6, warmup_steps: 3000, weight_decay: 0.05, max_epoch: 20, batch_size_train: 75, "
        "batch_size_eval: 75, num_workers: 4, evaluate: False, train_splits: [train]",
    ),
    "blip2 captioning": recipe(
        "arch: blip2_opt, model_type: caption_coco_opt2.7b, load_pretrained: False, load_finetuned: False, "
        "use_grad_checkpoint: True, freeze_vit: False",
        {"coco_caption": images("blip2_image_train", 364, CAPTION.format("a photo of "), "captions")},
        f"task: captioning, max_len: 30, min_len: 8, num_beams: 5, {TRAIN}",
    ),
    "blip2 pretrain": recipe(
        "arch: blip2, model_type: pretrain, load_pretrained: False, freeze_vit: True",
        {
            "coco_caption": images("blip2_image_train", 224, PLAIN, "captions"),
            "vg_caption": images("blip_image_train", 224, PLAIN, "captions"),
        },
        f"task: image_text_pretrain, {SCHEDULE}, evaluate: False, train_splits: [train]",
    ),
    "blip2 retrieval": recipe(
        "arch: blip2, model_type: coco, use_grad_checkpoint: True, freeze_vit: False",
        {"coco_retrieval": images("blip2_image_train", 364, PLAIN, "captions")},
        f"task: retrieval, k_test: 128, use_dist_eval_sampler: False, lr_layer_decay: 0.95, {SCHEDULE}, amp: True, "
        "evaluate: True, valid_splits: [val, test], test_splits: [test]",
    ),
    "blip2 vqa": recipe(
        "arch: blip2_t5, model_type: pretrain_flant5xl",
        {"coco_vqa": f"type: eval, {images('blip_image_train', 224, QUESTION, 'questions')}"},
        "task: vqa, inference_method: generate, prompt: 'Question: {} Short answer:', max_len: 10, min_len: 1, "
        f"num_beams: 5, {SCHEDULE}, evaluate: True, test_splits: [val]",
    ),
    "blip2 gqa": recipe(
        "arch: blip2_opt, model_type: pretrain_opt2.7b",
        {"gqa": f"type: balanced_testdev, {images('blip_image_train', 224, QUESTION, 'questions')}"},
        "task: gqa, inference_method: generate, prompt: 'Question: {} Short answer:', max_len: 10, min_len: 1, "
        f"num_beams: 5, {SCHEDULE}, amp: True, evaluate: True, test_splits: [val]",
    ),
    "instruct captioning": recipe(
        f"{VICUNA}, model_type: vicuna7b, prompt: a short description",
        {
            "coco_caption": f"vis_processor: {CLIP}, text_processor: {{eval: {{name: blip_caption}}}}, "
            f"build_info: {files('captions')}"
        },
        f"task: captioning, max_len: 80, min_len: 10, num_beams: 5, length_penalty: 1.0, prompt: a short description, "
        f"{INSTRUCT}",
    ),
    "instruct nocaps": recipe(
        f"{T5}, model_type: flant5xl, prompt: A short image caption.",
        {
            "nocaps": f"data_type: images, vis_processor: {CLIP}, "
            f"text_processor: {{eval: {{name: blip_caption, prompt: ''}}}}, build_info: {files('nocaps')}"
        },
        "task: captioning, max_len: 30, min_len: 10, num_beams: 5, length_penalty: 0.0, report_metric: True, "
        f"annotation_file: /data/references.json, img_ids: [1, 2], {INSTRUCT}",
    ),
    "instruct msvd captioning": recipe(
        f"{T5}, model_type: flant5xxl, prompt: describe the video",
        {
            "msvd_caption": f"data_type: videos, vis_processor: {ALPRO}, "
            f"text_processor: {{eval: {{name: blip_caption}}}}, build_info: {files('clips', 'videos')}"
        },
        "task: captioning, max_len: 80, min_len: 10, num_beams: 5, length_penalty: 1.0, img_ids: ['v0.gif', 'v2.gif'], "
        f"{INSTRUCT}",
    ),
    "instruct vatex captioning": recipe(
        f"{VICUNA}, model_type: vicuna13b, prompt: ''",
        {
            "vatex_caption": f"data_type: videos, vis_processor: {ALPRO}, "
            f"text_processor: {{eval: {{name: blip_question, prompt: given the image respond to}}}}, "
            f"build_info: {files('clips', 'videos')}"
        },
        f"task: captioning, max_len: 30, min_len: 5, num_beams: 5, prompt: describe the video, {INSTRUCT}",
    ),
    "instruct msvd vqa": recipe(
        f"{VICUNA}, model_type: vicuna7b, prompt: 'Question: {{}} Short Answer:'",
        {
            "msvd_qa_instruct": f"data_type: videos, vis_processor: {ALPRO}, text_processor: {QUESTION}, "
            f"build_info: {files('clips', 'videos', ', instance_id_key: question_id')}"
        },
        "task: gqa, max_len: 30, min_len: 1, num_beams: 5, length_penalty: -1.0, prompt: 'Question: {} Short Answer:', "
        "ques_files: {train: /data/official.json, val: /data/official.json, test: /data/official.json}, "
        "anno_files: {train: /data/official.json, val: /data/official.json, test: /data/official.json}, "
        f"{INSTRUCT}",
    ),
    "instruct okvqa": recipe(
        f"{T5}, model_type: flant5xl, prompt: 'Question: {{}} Short Answer:', apply_lemmatizer: False",
        {"ok_vqa": f"vis_processor: {CLIP}, text_processor: {QUESTION}, build_info: {files('questions')}"},
        f"task: vqa, max_len: 10, min_len: 1, num_beams: 5, length_penalty: -1.0, {INSTRUCT}",
    ),
    "instruct snli_ve": recipe(
        f"{T5}, model_type: flant5xl, few_shot_prob: 0, num_few_shot_examples: 0",
        {
            "snli_ve": f"vis_processor: {CLIP}, text_processor: {{eval: {{name: blip_question, prompt: given}}}}, "
            f"build_info: {files('statements')}"
        },
        f"task: multimodal_classification, max_len: 3, min_len: 1, num_beams: 5, length_penalty: 0.0, segments: 1, "
        f"prompt: '', {INSTRUCT}",
    ),
    "instruct snli_ve of words": recipe(
        f"{VICUNA}, model_type: vicuna7b",
        {"snli_ve_instruct": f"vis_processor: {CLIP}, build_info: {files('statements')}"},
        f"task: multimodal_classification, max_len: 80, min_len: 1, num_beams: 5, length_penalty: -1.0, {INSTRUCT}",
    ),
    "instruct classes of views": recipe(
        f"{VICUNA}, model_type: vicuna7b, format_candidates_prompt: 'a 3d model of a {{}}', predict_with_gen: True, "
        "prompt: describe the 3d model.",
        {
            "views": "builder: classification, classes: [cup, door, sofa], data_type: ['images', 'pc'], "
            f"vis_processor: {CLIP}, pc_processor: {{train: {{name: ulip_pc}}, eval: {{name: ulip_pc}}}}, "
            f"build_info: {files('views', 'images', ', pc: {storage: /data}')}"
        },
        f"task: multimodal_classification, max_len: 80, min_len: 1, prompt: describe the 3d model, {INSTRUCT}",
    ),
}
"""Name to text."""


def write_files(folder: Path) -> None:
    """Write the files that the YAMLs name: pictures, clips of six frames, and records about them."""
    names = [f"p{i}.png" for i in range(4)]
    for i, name in enumerate(names):
        Image.new("RGB", (64, 48), (60 * i, 200 - 40 * i, 90)).save(folder / name)
        Image.new("RGB", (64, 48), (60 * i, 200 - 40 * i, 90)).save(folder / f"{i}.jpg")
        frames = [Image.new("RGB", (64, 48), (40 * f, 60 * i, 20)) for f in range(6)]
        frames[0].save(folder / f"v{i}.gif", save_all=True, append_images=frames[1:])
    clips = [
        {
            "video": f"v{i}.gif",
            "caption": "a dog runs",
            "question": "what is it?",
            "answer": "dog",
            "question_id": i + 10,
        }
        for i in range(4)
    ]
    statements = [
        {"image": str(i), "sentence": "a dog", "label": ("contradiction", "neutral", "entailment")[i % 3]}
        for i in range(4)
    ]
    records: dict[str, Any] = {
        "captions": [{"image": n, "caption": ["a dog", "one dog"], "image_id": f"x_{i}"} for i, n in enumerate(names)],
        "nocaps": [{"image": name, "img_id": i} for i, name in enumerate(names)],
        "questions": [
            {"image": name, "question": "what is it?", "answer": ["dog"] * 10, "question_id": i}
            for i, name in enumerate(names)
        ],
        "pairs": [{"images": names[:2], "sentence": "two dogs", "label": i % 2 == 0} for i in range(4)],
        "clips": clips,
        "statements": statements,
        "views": [{"image": name, "label": ("cup", "door", "sofa")[i % 3]} for i, name in enumerate(names)],
        "references": {"images": [], "annotations": [{"image_id": i, "id": i, "caption": "a dog"} for i in range(4)]},
        "official": {
            "questions": [{"question_id": clip["question_id"], "question": "what is it?"} for clip in clips],
            "annotations": [
                {"question_id": clip["question_id"], "answers": [{"answer": "dog", "answer_id": 1}]} for clip in clips
            ],
        },
    }
    (folder / "msvd" / "annotations").mkdir(parents=True)
    records["msvd/annotations/qa_ans2label"] = {"dog": 0, "cat": 1}
    for stem, content in records.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))


def tree(name: str, folder: Path) -> dict[str, Any]:
    """A YAML's content, with its files in `folder`."""
    content: dict[str, Any] = yaml.safe_load(YAMLS[name].replace("/data", str(folder)))
    return content


def tiny(content: dict[str, Any]) -> dict[str, Any]:
    """Return the same recipe at the tests' sizes: sizes, weights and lengths change, and no other key."""
    small = copy.deepcopy(content)
    model, run = small["model"], small["run"]
    model |= {"model_type": "tiny", "load_pretrained": False, "load_finetuned": False}
    model["image_size"] = 48
    if "queue_size" in model:
        model["queue_size"] = 8
    model.pop("pretrained", None)
    for dataset in small["datasets"].values():
        for block in dataset["vis_processor"].values():
            block["image_size"] = 48
    most = {"max_len": 6, "min_len": 1, "num_beams": 2, "batch_size_train": 2, "batch_size_eval": 2, "max_epoch": 1}
    most |= {"num_workers": 0, "max_iters": 2, "iters_per_inner_epoch": 1, "num_ans_candidates": 2, "k_test": 2}
    run |= {key: min(float(run[key]), value) for key, value in most.items() if key in run}
    return small
