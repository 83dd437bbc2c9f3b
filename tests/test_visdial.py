"""Visual Dialog: BLIP's dialog encoder against a forward pass by hand, its data, and training and evaluation through
train.py with metrics by hand.
"""

import json
import math
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import torch
import yaml

from lavis_lite.common.errors import InputError
from lavis_lite.datasets.zoo import load_dataset

QUESTIONS = ["is it red", "how many shapes", "is there a square"]
ANSWERS = ["yes", "no", "two", "one", "a square"]


def clean_model(**changes: Any) -> Any:
    return cli_helpers.build("blip_visdial", max_txt_len=64, **changes).eval()


def samples() -> dict[str, Any]:
    image = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    dialogs = ["q: is it red? a: yes q: how many? a:", "q: is there a square? a:"]
    candidates = [["two", "one", "a blue square"], ["yes", "no", "two"]]
    return {"image": image, "caption": ["a red circle", "two blue shapes in a row"], "text_input": dialogs} | {
        "candidates": candidates,
        "label": torch.tensor([1, 0]),
    }


def by_hand(model: Any, given: dict[str, Any]) -> torch.Tensor:
    """The logits (B,C,2), each candidate alone, without padding."""
    rows = []
    for row, own in enumerate(given["candidates"]):
        ids, mask = model.tokenize([given["caption"][row]])
        caption = model.text_encoder(ids, mask)[0]
        states = torch.cat([model.visual_encoder(given["image"][row : row + 1]), model.caption_proj(caption)], dim=1)
        context = model.text_encoder.project_kv(states)
        for answer in own:
            ids, mask = model.tokenize([f"{given['text_input'][row]} {answer}"])
            ids[:, 0] = model.tokenizer.enc_token_id
            rows.append(model.itm_head(model.text_encoder(ids, mask, context=context)[0][:, 0]))
    return torch.cat(rows).view(len(given["image"]), -1, 2)


@pytest.mark.parametrize("width", [32, 48])
@torch.no_grad()
def test_candidates_are_scored_as_by_hand(width: int) -> None:
    model = clean_model(vit={"width": width})
    assert (width == 32) == isinstance(model.caption_proj, torch.nn.Identity)
    expected = by_hand(model, samples())
    losses = model.class_losses(samples(), samples()["candidates"])
    torch.testing.assert_close(losses, -expected.log_softmax(-1)[..., 1], rtol=1e-4, atol=1e-5)
    is_right = torch.tensor([[0, 1, 0], [1, 0, 0]])
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), is_right.flatten())
    output = model(samples())
    assert float(output["loss"]) == pytest.approx(float(loss), abs=1e-5)
    found = expected.argmax(-1) == is_right
    accuracy = (found[is_right == 1].float().mean() + found[is_right == 0].float().mean()) / 2
    assert float(output["acc_itm"]) == pytest.approx(float(accuracy))


@torch.no_grad()
def test_lists_of_different_lengths_are_filled_with_inf() -> None:
    model, given = clean_model(), samples()
    losses = model.class_losses(given, [given["candidates"][0], given["candidates"][1][:2]])
    assert losses.isinf().tolist() == [[False] * 3, [False, False, True]]
    torch.testing.assert_close(losses[0], model.class_losses(given, given["candidates"])[0])
    with pytest.raises(InputError, match="candidates"):
        model(given | {"candidates": [["a"], ["a", "b"]]})


@torch.no_grad()
def test_a_long_dialogue_loses_its_beginning() -> None:
    model, given = clean_model(), samples()
    given["text_input"] = [" ".join(["q: is it red? a: yes"] * 30), given["text_input"][1]]
    with_other = given | {"text_input": ["q: is it blue? a: no " + given["text_input"][0], given["text_input"][1]]}
    first, second = (model.class_losses(one, given["candidates"]) for one in (given, with_other))
    assert torch.equal(first, second)
    assert len(set(first[0].tolist())) == 3  # the candidates are still read


def dialogues(folder: Path, split: str, count: int = 2, rounds: int = 3) -> dict[str, Any]:
    """Visual Dialog's form: answers and questions by index."""
    found = []
    for number in range(count):
        turns = [
            {
                "question": i % 3,
                "answer": (number + i) % 5,
                "answer_options": [4, 3, 2, 1, 0],
                "gt_index": 4 - (number + i) % 5,
            }
            for i in range(rounds)
        ]
        found.append({"image_id": 10 + number, "caption": f"a picture number {number}", "dialog": turns})
        image = folder / f"VisualDialog_{split}2018/VisualDialog_{split}2018_{10 + number:012d}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        Path(cli_helpers.pictures(folder / "drawn", count)[number]).rename(image)
    data = {"questions": QUESTIONS, "answers": ANSWERS, "dialogs": found}
    return {"version": "1.0", "split": f"{split}2018" if split != "train" else split, "data": data}


@pytest.fixture
def visdial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files as `visdial_options` names them; of the validation set one round has dense annotations."""
    monkeypatch.setenv("LAVIS_LITE_DATA", str(tmp_path))
    folder = tmp_path / "visdial"
    for split in ("train", "val"):
        content = dialogues(folder, split)
        (folder / f"visdial_1.0_{split}.json").write_text(json.dumps(content))
    return folder


def test_a_training_sample_has_the_right_answer_and_a_wrong_one(visdial: Path) -> None:
    train = load_dataset("visdial_options")["train"]
    assert len(train) == 6
    sample = train[1]
    assert sample["text_input"] == "q: is it red? a: yes q: how many shapes? a:"
    assert sample["caption"] == "a picture number 0"
    assert sample["label"] == 0
    assert sample["candidates"][0] == "no"
    drawn = {train[1]["candidates"][1] for _ in range(60)}
    assert drawn == set(ANSWERS) - {"no"}
    batch = train.collater([{key: one[key] for key in ("label", "candidates")} for one in (train[0], train[5])])
    assert batch["label"].tolist() == [0, 0]
    assert len(batch["candidates"]) == 2


def test_an_evaluation_sample_has_all_candidates(visdial: Path) -> None:
    val = load_dataset("visdial_options")["val"]
    sample = val[4]  # the second dialogue's second round: the answer is number 2
    assert sample["candidates"] == ANSWERS[::-1]
    assert sample["question_id"] == "11_2"
    assert val.annotation[4]["label"] == 2
    assert sample["caption"] == "a picture number 1"


def test_too_few_candidates_are_an_error(visdial: Path) -> None:
    with pytest.raises(InputError, match=r"visdial_1.0_train.json.*num_negatives=5"):
        build_with(num_negatives=5)


def build_with(**settings: Any) -> Any:
    from lavis_lite.common.config.zoo import packaged_dataset
    from lavis_lite.common.registry import registry

    section = packaged_dataset("visdial_options") | settings
    return registry.get_builder_class("visdial_options")(**section).build(["train"])


def test_training_and_evaluation_through_the_entry_points(visdial: Path, tmp_path: Path) -> None:
    relevance = [0.0, 0.5, 0.0, 1.0, 0.0]
    dense = [{"image_id": 10, "round_id": 2, "gt_relevance": relevance}]
    (visdial / "dense.json").write_text(json.dumps(dense))
    eye = {"name": "blip_image_eval", "image_size": 48}
    files = [str(visdial / "visdial_1.0_val.json"), str(visdial / "dense.json")]
    recipe = {
        "model": {"arch": "blip_visdial", **cli_helpers.SIZES, "max_txt_len": 64},
        "datasets": {
            "visdial_options": {
                "build_info": {"annotations": {"val": {"storage": files}}},
                "vis_processor": {"train": eye, "eval": eye},
            }
        },
        "run": {**cli_helpers.RUN, "task": "instruct", "metric": "mrr", "server_file": "visdial", "max_epoch": 1},
    }
    recipe["run"] |= {"test_splits": ["val"], "output_dir": str(tmp_path / "output")}
    path = tmp_path / "visdial.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert cli_helpers.train(path) == 0
    job = tmp_path / "output/job"
    (results,) = [json.loads(file.read_text()) for file in job.glob("**/val*_predictions.json")][:1]
    ranks = []
    for number, result in enumerate(results):
        label = 4 - (number // 3 + number % 3) % 5
        ranks.append(1 + sum(loss < result["losses"][label] for loss in result["losses"]))
    metrics = cli_helpers.metrics(job, "val")
    assert metrics["mrr"] == pytest.approx(100 * sum(1 / rank for rank in ranks) / 6)
    assert metrics["mean_rank"] == pytest.approx(sum(ranks) / 6)
    assert metrics["r1"] == pytest.approx(100 * sum(rank == 1 for rank in ranks) / 6)
    order = sorted(range(5), key=lambda i: results[1]["losses"][i])
    gain = relevance[order[0]] + relevance[order[1]] / math.log2(3)
    assert metrics["ndcg"] == pytest.approx(100 * gain / (1.0 + 0.5 / math.log2(3)))
    (server,) = [json.loads(file.read_text()) for file in job.glob("**/val*_visdial_submission.json")][:1]
    assert sorted(server[1]["ranks"]) == [1, 2, 3, 4, 5]
