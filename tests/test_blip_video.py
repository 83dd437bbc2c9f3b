"""Videos in BLIP's models and in retrieval: against frames encoded one by one, and through evaluate.py on clips."""

import json
from pathlib import Path
from typing import Any

import cli_helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry
from lavis_lite.datasets.readers.owners import owners_records
from lavis_lite.datasets.zoo import load_dataset
from lavis_lite.models.reranking import similarity_matrices
from lavis_lite.tasks.metrics.retrieval import gallery_ranks, median_ranks

QUESTIONS = ["what color is the circle", "how many squares are there"]


def clips(count: int = 2, frames: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, frames, 48, 48, generator=torch.Generator().manual_seed(0))


def frames_of(model: Any, video: torch.Tensor) -> list[torch.Tensor]:
    """The tokens (1,S,E) of each frame of a clip (3,F,H,W), encoded one by one."""
    return [model.visual_encoder(video[None, :, i]) for i in range(video.shape[1])]


@torch.no_grad()
def test_a_videos_feature_is_the_normalised_mean_of_its_frames_projections() -> None:
    model = cli_helpers.build("blip_retrieval").eval()
    tokens, feature = model.image_features(clips())
    for row, video in enumerate(clips()):
        own = frames_of(model, video)
        torch.testing.assert_close(tokens[row], torch.cat(own, dim=1)[0], rtol=1e-4, atol=1e-5)
        projected = torch.stack([model.vision_proj(frame[0, 0]) for frame in own]).mean(dim=0)
        torch.testing.assert_close(feature[row], F.normalize(projected, dim=0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_matching_reads_all_frames_tokens() -> None:
    model = cli_helpers.build("blip_retrieval").eval()
    text = ["a red circle", "two blue squares", "a dot"]
    loader = Gallery(text, [{"image": clips(1)[:1], "index": [0]}, {"image": clips()[1:], "index": [1]}])
    scores, _ = similarity_matrices(model, loader, k_test=3)
    for row, video in enumerate([clips(1)[0], clips()[1]]):
        own = frames_of(model, video)
        mean = torch.stack([model.vision_proj(frame[0, 0]) for frame in own]).mean(dim=0)
        for column, one in enumerate(text):
            ids, mask = model.tokenize([one])
            contrast = F.normalize(mean, dim=0) @ model.encode_text(ids, mask)[0]
            ids[:, 0] = model.tokenizer.enc_token_id
            context = model.text_encoder.project_kv(torch.cat(own, dim=1))
            state = model.text_encoder(ids, mask, context=context)[0][:, 0]
            expected = model.itm_head(state)[0, 1] + contrast
            assert scores[row, column] == pytest.approx(float(expected), abs=1e-4)


class Gallery(list[dict[str, Any]]):
    def __init__(self, text: list[str], batches: list[dict[str, Any]]) -> None:
        super().__init__(batches)
        self.dataset = type("Dataset", (list,), {"text": text})(range(sum(len(b["index"]) for b in batches)))


@torch.no_grad()
@pytest.mark.parametrize("arch", ["blip_vqa", "blip_caption", "blip_retrieval", "blip_image_text_matching"])
def test_a_video_of_one_frame_is_an_image(arch: str) -> None:
    model = cli_helpers.build(arch).eval()
    assert torch.equal(model.encode_image(clips(frames=1)), model.encode_image(clips(frames=1)[:, :, 0]))


@torch.no_grad()
def test_questions_are_answered_from_all_frames_tokens() -> None:
    model = cli_helpers.build("blip_vqa").eval()
    samples = {"image": clips(), "text_input": QUESTIONS}
    states, _ = model.encode_questions(samples)
    for row, question in enumerate(QUESTIONS):
        ids, mask = model.tokenize([question], start=model.encoder_start)
        context = model.text_encoder.project_kv(torch.cat(frames_of(model, clips()[row]), dim=1))
        expected = model.text_encoder(ids, mask, context=context)[0]
        torch.testing.assert_close(states[row, : ids.shape[1]], expected[0], rtol=1e-4, atol=1e-5)
    for method in ("generate", "rank"):
        answers = model.predict_answers(samples, inference_method=method, answer_list=["red", "two"])
        assert len(answers) == 2


@pytest.mark.parametrize("arch", ["blip_retrieval", "blip_vqa", "blip_caption", "blip_pretrain"])
def test_training_on_videos_reaches_the_image_encoder(arch: str) -> None:
    model = cli_helpers.build(arch)
    samples = {"image": clips(), "text_input": QUESTIONS, "image_id": torch.tensor([0, 1])}
    samples |= {"answer": ["red", "two"], "weight": torch.ones(2), "n_answers": torch.tensor([1, 1])}
    model(samples)["loss"].backward()
    assert model.visual_encoder.pos_embed.grad.abs().sum() > 0


@pytest.mark.parametrize("arch", ["blip_classification", "blip_nlvr"])
def test_models_of_images_refuse_videos(arch: str) -> None:
    model = cli_helpers.build(arch)
    samples = {"image": clips(), "image0": clips(), "image1": clips(), "text_input": QUESTIONS}
    with pytest.raises(InputError, match=r"\(2, 3, 4, 48, 48\)"):
        model.predict(samples | {"label": torch.tensor([0, 1])})


def test_median_ranks_by_hand() -> None:
    # rows: the ranks of the right candidate are 1, 3, 2 for the images, and 2, 1, 3 for the texts
    i2t = np.array([[3.0, 2, 1], [3, 1, 2], [1, 3, 2]])
    t2i = np.array([[2.0, 3, 1], [1, 3, 2], [3, 2, 1]])
    ranks = gallery_ranks(i2t, t2i, [0, 1, 2], [[0], [1], [2]])
    assert ranks.of_images.tolist() == [0, 2, 1]
    assert ranks.of_texts.tolist() == [1, 0, 2]
    assert median_ranks(ranks) == {"txt_mdr": 2.0, "img_mdr": 2.0}
    assert median_ranks(ranks, k_test=1) == {}
    assert median_ranks(ranks, k_test=2) == {"txt_mdr": 2.0, "img_mdr": 2.0}


def written_clip(path: Path, color: tuple[int, int, int], count: int = 6) -> None:
    """An animation of squares that grow."""
    images = []
    for number in range(count):
        image = Image.new("RGB", (48, 48), "white")
        image.paste(color, (0, 0, 8 + 6 * number, 8 + 6 * number))
        images.append(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path.with_suffix(".gif"), save_all=True, append_images=images[1:])
    path.with_suffix(".gif").rename(path)  # the reader goes by the content


COLORS = {"red": (250, 20, 20), "blue": (20, 20, 250), "green": (20, 200, 20)}


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_msrvtts_test_split_is_read_as_its_owners_write_it(tmp_path: Path, form: str) -> None:
    names = {name: f"video{7020 + i}" for i, name in enumerate(COLORS)}
    if form == "csv":
        rows = [f"ret{i},msr{clip[5:]},{clip},a {name} square grows" for i, (name, clip) in enumerate(names.items())]
        text = "\n".join(["key,vid_key,video_id,sentence", *rows])
    else:
        entries = [
            {"clip_name": clip, "retrieval_key": f"ret{i}", "caption": f"a {name} square grows"}
            for i, (name, clip) in enumerate(names.items())
        ]
        text = "\n".join(map(json.dumps, entries))
    (tmp_path / f"test.{form}").write_text(text)
    for name, clip in names.items():
        written_clip(tmp_path / "videos" / f"{clip}.mp4", COLORS[name])
    dataset = gallery_section(tmp_path, f"test.{form}")
    recipe = cli_helpers.project(
        tmp_path,
        "retrieval",
        {"datasets": {"shapes_retrieval": None, "msrvtt_retrieval": dataset}, "run": {"evaluate": True, "k_test": 2}},
        {"run": {"valid_splits": [], "test_splits": ["test"]}},
    )
    assert cli_helpers.evaluate(recipe) == 0
    result = json.loads(next((tmp_path / "output").glob("**/test_retrieval.json")).read_text())
    assert result["images"] == [f"{clip}.mp4" for clip in names.values()]
    assert result["texts"] == [f"a {name} square grows" for name in names]
    for name in ("top_texts_of_image", "top_images_of_text"):
        scores = np.array(result[f"{name}_scores"])
        assert scores.shape == (3, 2)
        assert (np.diff(scores, axis=1) <= 0).all()
        assert (scores > -100).all()
    assert {"img_r1", "txt_r1"} <= result["metrics"].keys()


def gallery_section(folder: Path, file: str) -> dict[str, Any]:
    eye = {"name": "blip_image_eval", "image_size": 48}
    annotations = {"train": None, "val": None, "test": {"storage": str(folder / file), "url": None}}
    info = {"annotations": annotations, "videos": {"storage": str(folder / "videos")}}
    return {"build_info": info, "vis_processor": {"eval": eye}, "num_frames": 3}


def test_owners_rows_become_videos(tmp_path: Path) -> None:
    (tmp_path / "video1.avi").touch()
    rows = [{"clip_name": "video1", "caption": "a"}, {"clip_name": "video2", "caption": "b"}]
    found = owners_records(rows, split="test", root=tmp_path)
    assert found == [{"video": "video1.avi", "caption": "a"}, {"video": "video2.mp4", "caption": "b"}]


def test_training_samples_of_one_clip_share_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVIS_LITE_DATA", str(tmp_path))
    for name in COLORS:
        written_clip(tmp_path / "msrvtt/videos" / f"{name}.mp4", COLORS[name])
    rows = [{"video": f"{name}.mp4", "caption": f"{word} {name} square"} for name in COLORS for word in ("a", "one")]
    for split in ("train", "val", "test"):
        path = tmp_path / f"msrvtt/annotations/retrieval_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows))
    splits = load_dataset("msrvtt_retrieval")
    assert splits["train"].image_index == [0, 0, 1, 1, 2, 2]
    assert splits["test"].img2txt == [[0, 1], [2, 3], [4, 5]]


def test_images_and_videos_are_two_datasets(tmp_path: Path) -> None:
    records = [{"image": "a.jpg", "caption": "a"}, {"video": "b.mp4", "caption": "b"}]
    section = cli_helpers.user_set(tmp_path, {"train": records, "val": records})
    for split in ("train", "val"):
        with pytest.raises(InputError, match=rf"{split}\.json: record 1 .*'video'.*'image'"):
            registry.get_builder_class("retrieval")(**section).build([split])


@pytest.mark.parametrize("method", ["rank", "generate"])
def test_video_questions_through_the_entry_point(tmp_path: Path, method: str) -> None:
    for number, color in enumerate(COLORS.values()):
        written_clip(tmp_path / "videos" / f"vid{number}.avi", color)
    rows = [{"video": f"vid{i}.avi", "question": "what color is it", "answer": c} for i, c in enumerate(COLORS)]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    (tmp_path / "answers.json").write_text(json.dumps(list(COLORS)))
    section = gallery_section(tmp_path, "test.json")
    section["build_info"]["annotations"]["ans2label"] = {"storage": str(tmp_path / "answers.json"), "url": None}
    section["instructions"] = {"output": "answer", "eval": "{question}"}
    recipe = cli_helpers.project(
        tmp_path,
        "vqa_rank",
        {"datasets": {"shapes_vqa": None, "msvd_qa": section}, "run": {"evaluate": True, "inference_method": method}},
        {"run": {"valid_splits": [], "test_splits": ["test"], "accuracy": "normalised"}},
    )
    assert cli_helpers.evaluate(recipe) == 0
    result = json.loads(next((tmp_path / "output").glob("**/test_vqa.json")).read_text())
    assert [entry["question_id"] for entry in result] == [0, 1, 2]
    if method == "rank":
        assert {entry["answer"] for entry in result} <= set(COLORS)
