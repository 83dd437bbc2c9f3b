"""Rows fetched from other ranks, and BLIP-2's first stage: two gloo processes against one with the joined batch.

Given the same negatives, two ranks of two samples have the losses and the gradients of one process with four. The texts
of both ranks have different lengths, but as many words together: generation is averaged over words.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_blip2 import SIZES, build, images
from test_dist import launch

from lavis_lite.common import dist
from lavis_lite.common.registry import registry
from lavis_lite.nn.losses import matching_loss

pytestmark = pytest.mark.slow  # every test waits for a job of two processes
TEXTS = ["a red square", "the black cat is sitting", "a red circle is", "a red circle is"]
NEGATIVES = torch.tensor([2, 3, 3, 0]), torch.tensor([3, 2, 0, 1])
IDS = torch.tensor([5, 6, 5, 7])
VARIANTS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "trained": {"freeze_vit": False},
    "whole_gradient": {"freeze_vit": False, "gather_with_grad": True},
    "image_ids": {"freeze_vit": False},
}
CONTRASTIVE = ("blip_pretrain", "blip_retrieval")
UNEVEN = {"sizes": (3, 1), "index": ([3, 0, 3], [1, 3, 2, 2, 0])}
EMPTY = {"sizes": (0, 2), "index": ([1, 0], [])}


def rows_of(case: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """All ranks' rows (N,2,3), and by rank its own and the wanted ones."""
    rows = torch.arange(6.0 * sum(case["sizes"])).reshape(-1, 2, 3).to(dtype)
    return rows, list(rows.split(case["sizes"])), [torch.tensor(i, dtype=torch.long) for i in case["index"]]


def check_rows(rank: int) -> None:
    """Forward and backward by hand, for even and uneven shares and every type that travels."""
    even = {"sizes": (2, 2), "index": ([3, 1], [0, 0])}
    for case in (even, UNEVEN, EMPTY):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool):
            rows, own, index = rows_of(case, dtype)
            assert torch.equal(dist.gather_rows(own[rank], index[rank]), rows[index[rank]])
            assert torch.equal(dist.gather_rows(own[rank][:, 0, 1], index[rank]), rows[index[rank]][:, 0, 1])
        rows, own, index = rows_of(case, torch.float32)
        local = own[rank].transpose(1, 2).contiguous().requires_grad_().transpose(1, 2)  # not contiguous
        local.retain_grad()
        fetched = dist.gather_rows(local, index[rank])
        (fetched * weights(len(fetched), rank)).sum().backward()
        expected = torch.zeros_like(rows)
        for r, wanted in enumerate(index):
            expected.index_add_(0, wanted, weights(len(wanted), r).expand(-1, 2, 3))
        torch.testing.assert_close(local.grad, expected.split(case["sizes"])[rank])
    assert not dist.gather_rows(own[rank], index[rank]).requires_grad
    for wrong in (2, -1):
        with pytest.raises(IndexError, match="the ranks have 2 together"):
            dist.gather_rows(own[rank], torch.tensor([wrong] if rank else [0]))


def weights(count: int, rank: int) -> torch.Tensor:
    """What each wanted row counts in the loss, another on each rank."""
    return (torch.arange(count) + 1.0 + 10 * rank)[:, None, None]


def check_alone(rank: int) -> None:
    """One rank has more to do than the other, and nobody waits."""
    model = build("blip2")
    for _ in range(2 - rank):
        with dist.single_process(), torch.no_grad():
            assert (dist.rank(), dist.world_size()) == (0, 1)
            losses = model(samples(slice(0, 2 + rank)))
    assert dist.world_size() == 2
    torch.save(losses["loss_itc"], f"alone{rank}.pt")


def samples(rows: slice) -> dict[str, Any]:
    return {"image": images(4)[rows], "text_input": TEXTS[rows]}


def stage1(name: str) -> Any:
    """The model of a variant, without dropout, in training."""
    qformer = {**SIZES["qformer"], "hidden_dropout": 0.0, "attention_dropout": 0.0}
    return build(**VARIANTS[name], qformer=qformer).train()


def stage1_step(model: Any, parallel: Any, name: str, rows: slice) -> dict[str, Any]:
    """Losses and gradients of one step with the given negatives."""
    batch = samples(rows) | ({"image_id": IDS[rows]} if name == "image_ids" else {})
    model.draw_negatives = lambda *arguments, **settings: tuple(n[rows] for n in NEGATIVES)
    output = parallel(batch)
    output["loss"].backward()
    return {
        **{key: dist.all_reduce_mean(value) for key, value in output.items() if not key.startswith("cos_")},
        **{key: p.grad for key, p in model.named_parameters() if p.grad is not None},
    }


def blip_step(rows: slice) -> dict[str, Any]:
    """BLIP's matching loss with negatives of all ranks, and its gradients averaged over the ranks."""
    torch.manual_seed(3)
    sizes = {"vit": {**SIZES["vit"], "width": 16}, "med": dict(SIZES["qformer"])}
    model = registry.get_model_class("blip_retrieval")(
        image_size=16, queue_size=8, tokenizer=SIZES["tokenizer"], negative_all_rank=True, **sizes
    ).eval()
    batch = samples(rows)
    tokens = model.encode_image(batch["image"])
    ids, mask = model.tokenize(batch["text_input"])
    negatives = tuple(n[rows] for n in NEGATIVES)
    context = model.text_encoder.project_kv(tokens)
    loss = matching_loss(model.pair_logits(tokens, (ids, mask), negatives, context), len(ids))
    loss.backward()
    gradients = {key: dist.all_reduce_mean(p.grad) for key, p in model.named_parameters() if p.grad is not None}
    return {"loss": dist.all_reduce_mean(loss), **gradients}


def contrast_step(arch: str, rows: slice) -> dict[str, Any]:
    """BLIP's whole step with contrast within the batch, as `stage1_step`."""
    torch.manual_seed(3)
    sizes = {"vit": {**SIZES["vit"], "width": 16}, "med": dict(SIZES["qformer"])}
    model = registry.get_model_class(arch)(
        image_size=16, queue_size=0, tokenizer=SIZES["tokenizer"], negative_all_rank=True, momentum=0.9, **sizes
    ).eval()
    return stage1_step(model, dist.data_parallel(model)[0], "image_ids", rows)


def body(folder: Path) -> None:
    """Each rank's part of everything, in one launch, because starting is what takes time."""
    import os

    os.chdir(folder)
    rank = dist.rank()
    rows = slice(2 * rank, 2 * rank + 2)
    check_rows(rank)
    check_alone(rank)
    for name in VARIANTS:
        model = stage1(name)
        parallel, _ = dist.data_parallel(model)
        torch.save(stage1_step(model, parallel, name, rows), f"{name}{rank}.pt")
    torch.save(blip_step(rows), f"blip{rank}.pt")
    for arch in CONTRASTIVE:
        torch.save(contrast_step(arch, rows), f"{arch}{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks left; a failure in one of their checks fails here."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(body, folder, world=2)
    return folder


def assert_same_step(folder: Path, name: str, expected: dict[str, torch.Tensor]) -> None:
    """Both ranks have these losses and gradients (to 1e-4 of the largest, as keys' biases have none but rounding)."""
    largest = max(float(value.abs().max()) for value in expected.values())
    for rank in (0, 1):
        actual = torch.load(folder / f"{name}{rank}.pt")
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                actual[key], value, rtol=1e-4, atol=1e-6 * largest, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_do_what_one_does_with_the_joined_batch(folder: Path, name: str) -> None:
    model = stage1(name)
    expected = stage1_step(model, model, name, slice(0, 4))
    assert any(key.startswith("visual_encoder.") for key in expected) == (name != "frozen")
    assert expected["ln_vision.weight"].abs().max() > 1e-4
    assert_same_step(folder, name, {key: value.detach() for key, value in expected.items()})


def test_blip_matches_with_negatives_of_all_ranks(folder: Path) -> None:
    expected = blip_step(slice(0, 4))
    assert any(key.startswith("visual_encoder.") for key in expected)
    assert_same_step(folder, "blip", expected)


@pytest.mark.parametrize("arch", CONTRASTIVE)
def test_contrast_within_the_batch_is_with_all_ranks(folder: Path, arch: str) -> None:
    """Loss, accuracy and gradients of two ranks are those of one process; two of the four samples are of one image."""
    expected = contrast_step(arch, slice(0, 4))
    assert expected["chance_itc"] == pytest.approx(6 / 16 if arch == "blip_retrieval" else 4 / 16)
    assert any(key.startswith("visual_encoder.") for key in expected)
    assert_same_step(folder, arch, {key: value.detach() for key, value in expected.items()})


def test_alone_ranks_need_not_keep_step(folder: Path) -> None:
    model = build("blip2")
    with torch.no_grad():
        for rank in (0, 1):
            expected = model(samples(slice(0, 2 + rank)))["loss_itc"]
            torch.testing.assert_close(torch.load(folder / f"alone{rank}.pt"), expected)


def test_one_process_only_picks_rows() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    index = torch.tensor([2, 0, 2])
    assert torch.equal(dist.gather_rows(rows, index), rows[index])
    dist.gather_rows(rows, index).sum().backward()
    assert rows.grad[:, 0].tolist() == [1.0, 0.0, 2.0]
    with dist.single_process():
        assert (dist.rank(), dist.world_size()) == (0, 1)
