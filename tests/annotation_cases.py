"""A good annotation file of every builder, and the dataset that is made of a file of any content."""

import copy
import csv
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lavis_lite.common.config.zoo import packaged_dataset
from lavis_lite.common.registry import registry

CAPTIONS = [
    {"image": "a.png", "caption": "a red tulip", "image_id": 1},
    {"image": "b.png", "caption": ["two daisies", "daisies"], "image_id": 2},
]
QUESTIONS: list[dict[str, Any]] = [
    {"image": "a.png", "question": "what?", "answer": ["red", "pink"], "question_id": 1, "answer_type": "other"},
    {"image": "b.png", "question": "is it?", "answer": "no", "question_id": 2, "answer_type": "yes/no"},
]
INSTRUCTIONS: list[dict[str, Any]] = [
    {"image": "a.png", "instruction": "What grows?", "output": "tulips", "question_id": 1},
    {"image": "b.png", "instruction": "Ripe?", "output": "no", "candidates": ["yes", "no"], "group": "x"},
    {"image": "b.png", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a pot"}]},
]
VISDIAL = {
    "split": "val2018",
    "data": {
        "questions": ["is it nice", "how many"],
        "answers": ["2", "no", "yes"],
        "dialogs": [
            {
                "image_id": 7,
                "caption": "a cat",
                "dialog": [{"question": 0, "answer": 2, "answer_options": [0, 2], "gt_index": 1}],
            }
        ],
    },
}
PROBLEMS = {
    "1": {
        **{"question": "which?", "choices": ["x", "y"], "answer": 0, "hint": "", "lecture": ""},
        **{"image": "image.png", "split": "train"},
    },
    "2": {
        **{"question": "who?", "choices": ["x", "y"], "answer": 1, "hint": "h", "lecture": ""},
        **{"image": "image.png", "split": "test"},
    },
}
BOOKS = {
    "a": {"questions": ["who?"], "answers": ["Hesse"], "split": 1},
    "b": {"questions": ["when?", "who?"], "answers": ["1927", "me"], "split": 2},
}
TEXTCAPS = {"data": [{"image_id": "a", "caption_str": "a cup"}, {"image_id": "b", "caption_str": "b"}]}

BY_READER: dict[str, Any] = {
    "caption coco_caption nocaps flickr30k_caption retrieval coco_retrieval flickr30k pairs vg_caption sbu_caption "
    "conceptual_caption_3m conceptual_caption_12m capfilt14m coco_caption_instruct flickr30k_caption_instruct "
    "vg_caption_instruct sbu_caption_instruct conceptual_caption_3m_instruct conceptual_caption_12m_instruct "
    "capfilt14m_instruct caption_instruct": CAPTIONS,
    "vqa coco_vqa vg_vqa ok_vqa aok_vqa gqa coco_vqa_instruct vg_vqa_instruct ok_vqa_instruct aok_vqa_instruct "
    "gqa_instruct vqg_coco_vqa vqg_ok_vqa vqg_aok_vqa vqa_instruct": QUESTIONS,
    "nlvr": [{"images": ["a.png", "b.png"], "sentence": "one is left", "label": "True"}],
    "classification": [{"image": "a.png", "sentence": "a dog", "label": 1}, {"image": "b.png", "label": "0"}],
    "snli_ve snli_ve_instruct": [{"image": "a", "sentence": "a dog", "label": "neutral"}],
    "instruct llava150k_dialogue_instruct llava150k_conversation_instruct llava150k_detail_instruct "
    "llava150k_reasoning_instruct": INSTRUCTIONS[::2],
    "ocr_vqa ocr_vqa_instruct": BOOKS,
    "scienceqa scienceqa_instruct": PROBLEMS,
    "vsr_classification vsr_classification_instruct": [
        {"image": "a.png", "caption": "It is on it.", "label": 1, "relation": "on"}
    ],
    "classification_instruct": [{"image": "a.png", "instruction": "Is it red?", "label": 1}],
    "vsr_caption vsr_caption_instruct": [{"image": "a.png", "caption": "It is on it.", "label": 1}],
    "hateful_memes": [{"id": 42953, "img": "a.png", "label": 0, "text": "hi"}],
    "iconqa iconqa_instruct": [{"image": "a.png", "question": "which?", "choices": ["x", "y"], "answer": 1}],
    "vizwiz_vqa": [{"image": "a.png", "question": "what?", "answers": [{"answer": "a can"}], "answer_type": "other"}],
    "textvqa": {"data": [{"image_id": "a", "question": "what?", "question_id": 3, "answers": ["x"]}]},
    "visdial visdial_instruct visdial_options": VISDIAL,
    "visual_dialog": [
        {"image": "a.png", "caption": "a cat", "history": "q: is it? a: yes", "question": "is it nice"}
        | {"candidates": ["no", "yes"], "label": 1}
    ],
    "textcaps_caption textcaps_caption_instruct": TEXTCAPS,
    "ivqa": [{"video_id": "v", "start": "1", "end": "2", "question": "what?", "answer1": "a", "answer2": "b"}],
    "msvd_qa msvd_qa_instruct msrvtt_qa msrvtt_qa_instruct": [
        {"video": "v.mp4", "question": "what?", "answer": "play", "question_id": 30}
    ],
    "msvd_caption msvd_caption_instruct msrvtt_caption msrvtt_caption_instruct vatex_caption vatex_caption_instruct "
    "msrvtt_retrieval": [{"video": "v.mp4", "caption": "a dog"}],
}
GOOD = {name: content for names, content in BY_READER.items() for name in names.split()}
"""The content of a JSON file, by builder: all but `shapes`, whose annotations are generated."""

OPTIONS = {"textvqa": {"instructions": "vqa"}}
"""What a builder needs beside its YAML to read one file alone."""


@cache
def section_of(name: str) -> dict[str, Any]:
    """The section of the builder's default YAML."""
    return packaged_dataset(name)


def pictures(folder: Path) -> None:
    """The images that the records name, by the rules of each format."""
    dialog = "VisualDialog_val2018/VisualDialog_val2018_000000000007.jpg"
    names = ("a.png", "b.png", "a.jpg", "b.jpg", "train/1/image.png", "test/2/image.png", "train_images/a.jpg", dialog)
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3), (20 * number, 0, 0)).save(folder / name)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """The picture's first pixel."""
    return torch.tensor([float(image.getpixel((0, 0))[0])])  # type: ignore[index]


def write(path: Path, content: Any) -> Path:
    """The content as the path's suffix says: records as a table, one object per line, or JSON."""
    records = content if isinstance(content, list) and all(isinstance(r, dict) for r in content) else None
    if path.suffix == ".jsonl":
        lines = records if records is not None else [content]
        text = "\n".join(json.dumps(record) for record in lines)
    elif path.suffix in (".csv", ".tsv") and records:
        out = io.StringIO()
        table = csv.writer(out, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
        header = list(dict.fromkeys(str(key) for record in records for key in record))
        table.writerows([header, *([record.get(key, "") for key in header] for record in records)])
        text = out.getvalue()
    else:
        text = json.dumps(content)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


def build(name: str, split: str, paths: Path | list[Path], images: Path, **options: Any) -> Any:
    """The split of the builder that has this file, or these; its text processors are BLIP's."""
    cleaned = {side: {"name": "blip_caption"} for side in ("train", "eval")}
    own = {**copy.deepcopy(section_of(name)), "text_processor": cleaned, "vis_processor": {}, **OPTIONS.get(name, {})}
    storage = [str(path) for path in (paths if isinstance(paths, list) else [paths])]
    own["build_info"] = {"annotations": {split: {"storage": storage}}, "images": {"storage": str(images)}}
    dataset = registry.get_builder_class(name)(**own | options).build([split])[split]
    dataset.vis_processor = to_tensor
    return dataset


def use(dataset: Any) -> None:
    """What a run does with a dataset: its first samples, a batch of each, and what results are keyed and scored by."""
    for index in range(min(3, len(dataset))):
        dataset.collater([dataset[index]])
    if hasattr(dataset, "references") and dataset.split != "train":
        for image_id, texts in dataset.references().items():
            str(image_id).encode()
            assert all(isinstance(text, str) and text.strip() and text.encode() for text in texts)
    for record in dataset.annotation:
        for key in {"question_id", "image_id", "group", "question_type", "answer_type"} & dataset.fields.keys():
            str(record.get(key)).encode()
            hash(record.get(key))
        assert dataset.split == "train" or all(isinstance(answer, str) for answer in record.get("answers") or [])
    for answer in getattr(dataset, "answer_list", None) or []:
        answer.encode()
