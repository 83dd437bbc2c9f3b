"""Whether a contrastive run learns: contrast within the batch, the numbers beside the losses, and the warnings."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_lite.common.registry import registry
from lavis_lite.nn.learning import METRICS, matching_accuracy, mean_cosine, top1_accuracy
from lavis_lite.runners.learning import LearningWatch, learning_metrics

TEXTS = ["a red circle", "a blue star", "yes", "a green square"]
CONTRASTIVE = ("blip_pretrain", "blip_retrieval", "blip2")


@pytest.fixture(autouse=True)
def kept_generator() -> Iterator[None]:
    """Leaves torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        yield


def samples(**changes: Any) -> dict[str, Any]:
    image = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(3))
    return {"image": image, "text_input": TEXTS, "image_id": torch.arange(4), **changes}


def build(arch: str, **changes: Any) -> Any:
    """A tiny model in evaluation mode, so without dropout, whose momentum twin is not its copy."""
    if arch == "blip2":
        return registry.get_model_class("blip2").from_config(
            {"vit_model": "eva_tiny", "vit_weights": "random", "image_size": 48, "tokenizer": "shapes",
             "qformer": cli_helpers.SIZES["med"], "num_query_token": 3, "embed_dim": 16, **changes}
        ).eval()  # fmt: skip
    model = cli_helpers.build(arch, embed_dim=16, **changes).eval()
    with torch.no_grad():
        for _, twin in model.momentum_pairs():
            for parameter in twin.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def features(model: Any, *, twin: bool = False) -> tuple[Tensor, Tensor]:
    """A momentum model's features (4,E) of images and texts, from the parts' own forward passes."""
    vit, bert, vision_proj, text_proj = (pair[twin] for pair in model.momentum_pairs())
    ids, mask = model.tokenize(TEXTS)
    image = F.normalize(vision_proj(vit(samples()["image"])[:, 0]), dim=-1)
    return image, F.normalize(text_proj(bert(ids, mask)[0][:, 0]), dim=-1)


@pytest.mark.parametrize("arch", ["blip_pretrain", "blip_retrieval"])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [5, 6, 5, 7]])
def test_contrast_within_the_batch_by_hand(arch: str, ids: list[int]) -> None:
    """Candidates are the twin's features of the batch, targets 0.6 the pair (or all of one image) and 0.4 the twin."""
    model = build(arch, queue_size=0, alpha=0.4, momentum=0.9)
    online = [tensor.detach() for tensor in features(model)]
    output = model(samples(image_id=torch.tensor(ids)))
    twin = [tensor.detach() for tensor in features(model, twin=True)]  # after the update in the forward pass
    same = torch.eye(4) if arch == "blip_pretrain" else torch.tensor([[float(a == b) for b in ids] for a in ids])
    losses = []
    for own, own_twin, others in zip(online, twin, reversed(twin), strict=True):
        target = 0.4 * (own_twin @ others.t() / 0.07).softmax(1) + 0.6 * same / same.sum(1, keepdim=True)
        losses.append(-(target * (own @ others.t() / 0.07).log_softmax(1)).sum(1).mean())
    torch.testing.assert_close(output.loss_itc, sum(losses) / 2)


@pytest.mark.parametrize("arch", ["blip_pretrain", "blip_retrieval"])
def test_contrast_within_the_batch_teaches_both_towers(arch: str) -> None:
    """And the twin and what an empty queue holds stay out of it."""
    model = build(arch, queue_size=0)
    twin = model.momentum_features(samples()["image"], *model.tokenize(TEXTS), update=False)
    loss, _ = model.contrastive_loss(*features(model), twin, torch.eye(4), 0.4)
    loss.backward()
    for name in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
        part = getattr(model, name)
        assert max(float(p.grad.abs().max()) for p in part.parameters() if p.grad is not None) > 1e-5, name
        assert all(p.grad is None for p in getattr(model, f"{name}_m").parameters())
    model(samples())["loss"].backward()
    assert model.queue_ptr.tolist() == [0]
    assert model.image_queue.shape == model.text_queue.shape == (16, 0)


def test_a_queue_of_the_whole_batch_is_the_batch_again() -> None:
    """Filled with the current batch, a queue only doubles every candidate: the loss is log 2 higher."""
    within, queued = (build("blip_pretrain", queue_size=size, alpha=0.0, momentum=1.0) for size in (0, 4))
    queued.load_state_dict(
        {**queued.state_dict(), **{k: v for k, v in within.state_dict().items() if "queue" not in k}}
    )
    twin = queued.momentum_features(samples()["image"], *queued.tokenize(TEXTS), update=False)
    queued.enqueue_features(twin)
    losses = [model.eval()(samples())["loss_itc"] for model in (within, queued)]
    torch.testing.assert_close(losses[1], losses[0] + torch.tensor(2.0).log())


@pytest.mark.parametrize("arch", ["blip_pretrain", "blip_retrieval"])
@pytest.mark.parametrize(("saved", "wanted"), [(0, 8), (8, 0), (0, 0)])
def test_weights_move_between_queue_lengths(
    arch: str, saved: int, wanted: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All names stay, a queue of another length starts anew and is named."""
    source = build(arch, queue_size=saved)
    source(samples())["loss"].backward()
    torch.save({"model": source.checkpoint_state_dict()}, tmp_path / "model.pth")
    with caplog.at_level(logging.INFO):
        model = cli_helpers.build(arch, embed_dim=16, queue_size=wanted, checkpoint=str(tmp_path / "model.pth"))
    assert model.state_dict().keys() == source.state_dict().keys()
    assert model.image_queue.shape == (16, wanted)
    assert model.queue_ptr.tolist() == [0]
    torch.testing.assert_close(model.vision_proj_m.weight, source.vision_proj_m.weight)
    assert ("image_queue of 8 columns is left out" in caplog.text) == (saved == 8)
    model(samples())


def test_a_negative_queue_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"model\.queue_size: must be a whole number from 0 to 10,000,000, got -1"):
        build("blip_pretrain", queue_size=-1)
    with pytest.raises(ValueError, match=r"model\.queue_size: 3 is less than the global batch of 4"):
        build("blip_pretrain", queue_size=3)(samples())


def test_numbers_beside_the_losses_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0], [1.0, 5.0, 0.0]])
    positive = torch.tensor([[True, False, False], [False, True, False], [False, True, True]])
    assert top1_accuracy(logits, positive) == pytest.approx(2 / 3)
    match = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert matching_accuracy(match, 2) == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert matching_accuracy(torch.tensor([[1.0, 0.0]]).expand(6, 2), 2) == 0.5  # always "no match"
    rows = F.normalize(torch.randn(5, 7), dim=1)
    pairs = [float(rows[i] @ rows[j]) for i in range(5) for j in range(5) if i != j]
    assert float(mean_cosine(rows)) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert float(mean_cosine(rows[:1].expand(5, 7))) == pytest.approx(1.0)
    queries = torch.stack([rows, rows.flip(1)], dim=1)
    assert float(mean_cosine(queries)) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


@pytest.mark.parametrize("queue_size", [0, 8])
def test_models_tell_how_well_they_do_in_the_batch(queue_size: int) -> None:
    """Accuracy is within the batch: features in a queue that are likelier than the right text do not count."""
    model = build("blip_pretrain", queue_size=queue_size)
    if queue_size:
        model.text_queue[:, :4] = features(model)[0].detach().t()  # each image's own feature, of cosine 1
    image, text = (tensor.detach() for tensor in features(model))
    with torch.no_grad():
        output = model(samples())
        image_m, text_m = features(model, twin=True)
    right = [(a @ b.t()).argmax(1) == torch.arange(4) for a, b in ((image, text_m), (text, image_m))]
    assert float(output.acc_itc) == pytest.approx(float(torch.cat(right).float().mean()))
    assert float(output.chance_itc) == 0.25
    assert float(output.temp) == pytest.approx(0.07)
    for mean, rows in ((output.cos_image, image), (output.cos_text, text)):
        cosines = rows @ rows.t()
        torch.testing.assert_close(mean, (cosines.sum() - cosines.trace()) / 12)


@pytest.mark.parametrize("arch", CONTRASTIVE)
def test_every_contrastive_model_has_the_numbers(arch: str) -> None:
    model = build(arch)
    output = model(samples())
    assert learning_metrics(output).keys() == set(METRICS)
    assert not any(output[name].requires_grad for name in METRICS)
    assert output.keys() == set(METRICS) | {name for name in output if name.startswith("loss")}
    model.temp.data.fill_(0.3)
    assert float(output.temp) == pytest.approx(0.07)  # a copy: the step that follows does not change it
    one = samples(image=samples()["image"][:1], text_input=TEXTS[:1], image_id=torch.zeros(1, dtype=torch.long))
    assert learning_metrics(model(one)).keys() == {"acc_itc", "chance_itc", "acc_itm", "temp"}


HEALTHY = {"acc_itc": 0.4, "chance_itc": 1 / 64, "acc_itm": 0.7, "temp": 0.05, "cos_image": 0.5, "cos_text": 0.6,
           "loss_itc": 2.0, "loss_itm": 0.5}  # fmt: skip
SYMPTOMS = {
    "batch's images were all alike.*lower run.init_lr": {"cos_image": 0.995},
    "batch's texts were all alike": {"cos_text": 0.999},
    r"temp 0\.001, limits 0\.001 and 0\.5.*model\.queue_size=0": {"temp": 0.001},
    r"temp 0\.5, limits": {"temp": 0.5},
    r"at chance \(acc_itc 0\.0160, by guessing 0\.0156, with loss_itc 5\)": {"acc_itc": 0.016, "loss_itc": 5.0},
    r"every pair \(loss_itm 0\.6340.*run\.k_test=0": {"acc_itm": 0.5, "loss_itm": 0.634},
}


def watched(caplog: pytest.LogCaptureFixture, changes: dict[str, float], *, steps: int, **settings: int) -> list[str]:
    """The warnings of a run that logs every 50 steps."""
    watch = LearningWatch(**settings)
    caplog.clear()
    for step in range(50, steps + 1, 50):
        watch.update({"step": step, "epoch": 0, "lr": 1e-4, "loss": 3.0, **HEALTHY, **changes})
    return [record.message for record in caplog.records]


@pytest.mark.parametrize("pattern", SYMPTOMS)
def test_a_symptom_is_warned_of_once(pattern: str, caplog: pytest.LogCaptureFixture) -> None:
    import re

    (message,) = watched(caplog, SYMPTOMS[pattern], steps=2000)
    assert re.search(pattern, message)
    window = 300 if "itc" in pattern or "pair" in pattern else 100
    assert f"step {window}: over the last {window} steps" in message
    assert watched(caplog, SYMPTOMS[pattern], steps=window - 50) == []
    assert watched(caplog, SYMPTOMS[pattern], steps=1000, warmup_steps=1000) == []
    assert len(watched(caplog, SYMPTOMS[pattern], steps=1500, warmup_steps=1000)) == 1


def test_healthy_and_other_runs_have_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert watched(caplog, {}, steps=2000) == []
    assert watched(caplog, {"loss_itm": 0.6365}, steps=2000) == []  # as low, but it tells pairs apart
    watch = LearningWatch()
    for step in range(50, 1000, 50):
        watch.update({"step": step, "epoch": 0, "lr": 1e-4, "loss": 3.0})  # captioning: none of the numbers
    assert caplog.records == []


def test_a_window_is_a_mean_over_steps(caplog: pytest.LogCaptureFixture) -> None:
    """90 steps at 0.98 and 10 at 1.0 are 0.982; rows of unequal lengths count by their steps."""
    watch = LearningWatch()
    watch.update({"step": 90, **HEALTHY, "cos_image": 0.98})
    watch.update({"step": 100, **HEALTHY, "cos_image": 1.0})
    assert caplog.records == []
    watch.update({"step": 110, **HEALTHY, "cos_image": 0.98})
    watch.update({"step": 200, **HEALTHY, "cos_image": 1.0})
    assert "mean cosine of two images 0.9980" in caplog.text


@pytest.mark.parametrize("pattern", SYMPTOMS)
def test_a_run_that_is_resumed_often_is_warned_all_the_same(pattern: str, caplog: pytest.LogCaptureFixture) -> None:
    (whole,) = watched(caplog, SYMPTOMS[pattern], steps=2000)
    state, messages = None, []
    for step in range(50, 2001, 50):
        watch = LearningWatch()
        if state is not None:
            watch.load_state_dict(state)
        caplog.clear()
        watch.update({"step": step, "epoch": 0, "lr": 1e-4, "loss": 3.0, **HEALTHY, **SYMPTOMS[pattern]})
        messages += [record.message for record in caplog.records]
        state = watch.state_dict()
    assert messages == [whole]


@pytest.mark.usefixtures("shapes_data")
def test_a_run_logs_the_numbers(tmp_path: Path) -> None:
    """In every row of log.txt, for contrast within the batch, and the accuracies of its validation."""
    assert cli_helpers.train(cli_helpers.project(tmp_path, "pretrain"), "model.queue_size=0", "run.test_splits=[]") == 0
    rows = cli_helpers.steps(tmp_path / "output" / "job")
    assert len(rows) == 6
    for row in rows:
        assert set(METRICS) <= row.keys()
        assert 0 <= row["acc_itc"] <= 1
        assert row["chance_itc"] == 0.25
        assert row["loss"] == pytest.approx(row["loss_itc"] + row["loss_itm"] + row["loss_lm"], rel=1e-5)
    (metrics, *_) = [row["metrics"] for row in cli_helpers.log(tmp_path / "output" / "job") if "metrics" in row]
    assert {"loss", "acc_itc", "chance_itc", "acc_itm"} <= metrics.keys()
