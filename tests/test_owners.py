"""Owners' own annotation files: each form in a miniature as it is published, and the records that are made of it."""

from pathlib import Path
from typing import Any

import pytest

from lavis_lite.common.errors import InputError
from lavis_lite.datasets.readers.owners import owners_records


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


KARPATHY_COCO = {
    "dataset": "coco",
    "images": [
        {
            "filepath": split,
            "sentids": [1, 2],
            "filename": f"COCO_{split}_000000391895.jpg",
            "imgid": number,
            "split": own,
            "sentences": [{"tokens": ["a", "man"], "raw": "A man.", "imgid": 0, "sentid": 1}, {"raw": "A bike."}],
            "cocoid": 391895 + number,
        }
        for number, (split, own) in enumerate([("val2014", "test"), ("val2014", "restval"), ("train2014", "train")])
    ],
}
KARPATHY_FLICKR = {
    "dataset": "flickr30k",
    "images": [
        {"sentids": [0], "imgid": 0, "sentences": [{"raw": "Two men."}], "split": "val", "filename": "1000092795.jpg"}
    ],
}
GQA = {
    "201640614": {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "sky"}],
        "entailed": ["201640615"],
        "equivalent": ["201640614"],
        "question": "Is the sky dark?",
        "imageId": "2354786",
        "isBalanced": True,
        "groups": {"global": None, "local": "06-sky_dark"},
        "answer": "yes",
        "semanticStr": "select: sky",
        "annotations": {},
        "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
        "fullAnswer": "Yes, the sky is dark.",
    }
}
AOKVQA = [
    {
        "split": "val",
        "image_id": 461751,
        "question_id": "22jbM6gDxdaMaunuzgrsBB",
        "question": "What is in the motorcyclist's mouth?",
        "choices": ["toothpick", "food", "popsicle stick", "cigarette"],
        "correct_choice_idx": 3,
        "direct_answers": ["cigarette"] * 10,
        "difficult_direct_answer": False,
        "rationales": ["He is smoking."],
    }
]
NLVR2 = [
    {
        "validation": {"12": "True"},
        "sentence": "There is a redheaded girl.",
        "left_url": "https://example.org/a.png",
        "right_url": "https://example.org/b.png",
        "writer": "1",
        "label": "True",
        "identifier": "train-10171-0-0",
        "directory": 39,
        "synset": "x",
        "query": "y",
    }
]
SNLI_VE = [
    {
        "Flickr30K_ID": "4705552913",
        "annotator_labels": ["neutral"],
        "captionID": "4705552913.jpg#2",
        "gold_label": "neutral",
        "pairID": "4705552913.jpg#2r1n",
        "sentence1": "Two women are embracing.",
        "sentence2": "The sisters are hugging goodbye.",
    }
]
ICONQA = {
    "0": {
        "question": "Which?",
        "choices": ["a", "b"],
        "answer": 1,
        "ques_type": "choose_txt",
        "grade": "g",
        "split": "test",
    },
    "1": {"question": "How many?", "choices": None, "answer": "5", "ques_type": "fill_in_blank", "split": "test"},
}
MSRVTT_QA = [{"answer": "couch", "category_id": 14, "id": 158581, "question": "what?", "video_id": 6513}]
MSVD_QA = [{"answer": "someone", "id": 0, "question": "who?", "video_id": 1}]
GENOME_REGIONS = [
    {
        "regions": [
            {"region_id": 1382, "width": 82, "height": 139, "image_id": 7, "phrase": "the clock", "y": 5, "x": 4}
        ],
        "id": 7,
    }
]
GENOME_QUESTIONS = [
    {
        "id": 7,
        "qas": [
            {
                "a_objects": [],
                "question": "What colour?",
                "image_id": 7,
                "qa_id": 986769,
                "answer": "Green.",
                "q_objects": [],
            }
        ],
    }
]
SBU = {
    "image_urls": ["http://static.flickr.com/2723/4385058960_b0f291553e.jpg"],
    "user_names": ["x"],
    "captions": ["A wooden chair in the living room"],
}
NOCAPS = {
    "licenses": [],
    "info": {},
    "images": [
        {
            "coco_url": "https://s3.amazonaws.com/nocaps/val/0013ea2087020901.jpg",
            "date_captured": "2018-11-06",
            "file_name": "0013ea2087020901.jpg",
            "height": 1024,
            "id": 0,
            "license": 0,
            "open_images_id": "0013ea2087020901",
            "width": 732,
            "domain": "near-domain",
        }
    ],
}
BLIP = [
    {"url": "http://example.org/1.jpg", "caption": "a dog"},
    {"url": "http://example.org/2.jpg", "caption": "a cat"},
]


def test_karpathys_coco(tmp_path: Path) -> None:
    records = owners_records(KARPATHY_COCO, split="train", root=tmp_path)
    assert [record["image"] for record in records] == [
        "val2014/COCO_val2014_000000391895.jpg",
        "train2014/COCO_train2014_000000391895.jpg",
    ]
    (test,) = owners_records(KARPATHY_COCO, split="test", root=tmp_path)
    assert (test["image_id"], test["caption"]) == (391895, ["A man.", "A bike."])


def test_images_that_lie_without_their_folder_are_found(tmp_path: Path) -> None:
    touch(tmp_path, "COCO_val2014_000000391895.jpg")
    (test,) = owners_records(KARPATHY_COCO, split="test", root=tmp_path)
    assert test["image"] == "COCO_val2014_000000391895.jpg"


def test_karpathys_flickr30k(tmp_path: Path) -> None:
    (record,) = owners_records(KARPATHY_FLICKR, split="val", root=tmp_path)
    assert record == {"image": "1000092795.jpg", "image_id": 0, "caption": ["Two men."]}


def test_gqa(tmp_path: Path) -> None:
    (record,) = owners_records(GQA, split="val", root=tmp_path)
    assert (record["image"], record["question_id"], record["answer"]) == ("2354786.jpg", "201640614", "yes")
    assert (record["entailed"], record["types"]["structural"], record["is_balanced"]) == (["201640615"], "verify", True)


@pytest.mark.parametrize(
    ("there", "image"),
    [
        (None, "val2017/000000461751.jpg"),
        ("val2014/COCO_val2014_000000461751.jpg", "val2014/COCO_val2014_000000461751.jpg"),
        ("train2017/000000461751.jpg", "train2017/000000461751.jpg"),
    ],
)
def test_aokvqas_images_are_found_in_either_release(tmp_path: Path, there: str | None, image: str) -> None:
    touch(tmp_path, *([there] if there else []))
    (record,) = owners_records(AOKVQA, split="val", root=tmp_path)
    assert record["image"] == image
    assert record["direct_answers"] == ["cigarette"] * 10
    assert owners_records(AOKVQA, split="train", root=tmp_path) == []


def test_nlvr2(tmp_path: Path) -> None:
    (record,) = owners_records(NLVR2, split="train", root=tmp_path)
    assert record["images"] == [f"images/train/39/train-10171-0-img{side}.png" for side in (0, 1)]
    (dev,) = owners_records(
        [{"identifier": "dev-850-0-1", "sentence": "a", "label": "False"}], split="val", root=tmp_path
    )
    assert dev["images"][0] == "images/dev/dev-850-0-img0.png"
    touch(tmp_path, "dev/dev-850-0-img0.png")
    (dev,) = owners_records(
        [{"identifier": "dev-850-0-1", "sentence": "a", "label": "False"}], split="val", root=tmp_path
    )
    assert dev["images"][0] == "dev/dev-850-0-img0.png"


@pytest.mark.parametrize(
    ("content", "split", "record"),
    [
        (SNLI_VE, "test", {"image": "4705552913", "sentence": "The sisters are hugging goodbye.", "label": "neutral"}),
        (MSRVTT_QA, "test", {"video": "video6513.mp4", "question": "what?", "answer": "couch", "question_id": 158581}),
        (GENOME_REGIONS, "train", {"image": "VG_100K/7.jpg", "caption": "the clock"}),
        (
            GENOME_QUESTIONS,
            "train",
            {"image": "VG_100K/7.jpg", "question": "What colour?", "answer": "Green.", "question_id": 986769},
        ),
        (SBU, "train", {"image": "4385058960_b0f291553e.jpg", "caption": "A wooden chair in the living room"}),
    ],
)
def test_records(tmp_path: Path, content: Any, split: str, record: dict[str, Any]) -> None:
    assert owners_records(content, split=split, root=tmp_path) == [record]


def test_iconqa_keeps_choices_in_words(tmp_path: Path) -> None:
    (record,) = owners_records(ICONQA, split="test", root=tmp_path)
    assert (record["image"], record["choices"], record["answer"]) == ("test/choose_txt/0/image.png", ["a", "b"], 1)


def test_videos_are_called_as_they_lie(tmp_path: Path) -> None:
    touch(tmp_path, "vid1.avi")
    assert owners_records(MSVD_QA, split="test", root=tmp_path)[0]["video"] == "vid1.avi"


def test_visual_genomes_second_archive(tmp_path: Path) -> None:
    touch(tmp_path, "VG_100K/8.jpg")
    assert owners_records(GENOME_REGIONS, split="train", root=tmp_path)[0]["image"] == "VG_100K_2/7.jpg"


def test_nocaps_images(tmp_path: Path) -> None:
    (record,) = owners_records(NOCAPS, split="val", root=tmp_path)
    assert (record["image"], record["image_id"], record["domain"]) == ("0013ea2087020901.jpg", 0, "near-domain")


def test_addresses_with_captions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "00000/000000001.jpg")
    assert owners_records(BLIP, split="train", root=tmp_path) == [{"image": "00000/000000001.jpg", "caption": "a cat"}]
    assert "1 of 2 images are not there" in caplog.text


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (
            {"images": [*KARPATHY_FLICKR["images"], {"split": "val", "sentences": [{}], "filename": "b.jpg"}]},
            "record 1: ",
        ),
        ({**GQA, "2": {"question": "Is it?"}}, "record 1: .*'imageId'"),
        ({**ICONQA, "2": 3}, "record 2: "),
        ([*NLVR2, {"sentence": "a"}], "record 1: .*'identifier'"),
        ([*GENOME_QUESTIONS, {"id": 8, "qas": 5}], "record 1: "),
        ([*MSVD_QA, None], "record 1: "),
        ({**SBU, "captions": []}, "captions and image_urls: "),
    ],
)
def test_a_damaged_record_is_named(content: Any, where: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{where}"):
        owners_records(content, split="val" if "images" in content else "test", root=tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        [{"image": "a.jpg", "caption": "a"}],
        [{"url": "x", "image": "a.jpg", "caption": "a"}],
        {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []},
        {"questions": [{"question": "a", "image_id": 1}]},
        [{"image": "a.jpg", "image_id": 1, "question": "q", "choices": ["a"]}],
        ["yes", "no"],
        {"yes": 0},
        [],
        {},
        None,
    ],
)
def test_other_content_is_left_alone(content: Any, tmp_path: Path) -> None:
    assert owners_records(content, split="val", root=tmp_path) is None
