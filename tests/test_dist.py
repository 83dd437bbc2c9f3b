"""Collectives: identities in a world of one; two gloo processes against one process and hand arithmetic."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from ports import free_port
from torch import nn

from lavis_lite.common import dist


def launch(body: Callable[[Path], None], folder: Path, *, world: int) -> None:
    """Runs `body(folder)` in `world` gloo processes under torchrun's environment; any failure fails the test."""
    warm.spawn(_enter, body, folder, world, free_port(), world=world)


def _enter(rank: int, body: Callable[[Path], None], folder: Path, world: int, port: int) -> None:
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    assert dist.init("cpu") == torch.device("cpu")
    try:
        body(folder)
    finally:
        dist.shutdown()


def test_world_of_one_needs_no_process_group() -> None:
    dist.init("cpu")
    assert not torch.distributed.is_initialized()
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    tensor = torch.ones(2, requires_grad=True)
    assert not dist.all_gather(tensor).requires_grad
    dist.all_gather_with_grad(tensor).sum().backward()
    assert torch.equal(tensor.grad, torch.ones(2))
    assert dist.gather_objects([1, 2]) == [1, 2]
    assert dist.broadcast_object("x") == "x"
    with dist.main_first():
        dist.barrier()
    dist.shutdown()


def test_absent_gpu_is_named() -> None:
    with pytest.raises(ValueError, match="device=cpu"):
        dist.resolve_device("cuda:99")


def contrastive(rows: torch.Tensor, pool: torch.Tensor, *, first: int) -> torch.Tensor:
    """A loss whose rows are this rank's and whose negatives are everybody's."""
    return nn.functional.cross_entropy(rows @ pool.t(), torch.arange(first, first + len(rows)))


def body_gradients(folder: Path) -> None:
    """Saves the DDP-averaged gradient of a contrastive loss over gathered features."""
    inputs = torch.load(folder / "inputs.pt")
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 3))
    size = len(inputs) // dist.world_size()
    mine = inputs[dist.rank() * size :][:size]
    features = model(mine)
    pool = dist.all_gather_with_grad(features)
    assert torch.equal(pool, dist.all_gather(features))
    assert torch.equal(pool[dist.rank() * size :][:size], features)
    contrastive(features, pool, first=dist.rank() * size).backward()
    torch.save([p.grad for p in model.parameters()], folder / f"grad{dist.rank()}.pt")


@pytest.mark.slow
def test_gathered_gradient_equals_one_process(tmp_path: Path) -> None:
    torch.manual_seed(1)
    inputs = torch.randn(6, 4)
    torch.save(inputs, tmp_path / "inputs.pt")
    launch(body_gradients, tmp_path, world=2)
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    features = model(inputs)
    contrastive(features, features, first=0).backward()
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"grad{rank}.pt"), [p.grad for p in model.parameters()])


def body_objects(folder: Path) -> None:
    """Checks every other collective on two ranks."""
    rank = dist.rank()
    assert (dist.world_size(), dist.is_main()) == (2, rank == 0)
    assert dist.gather_objects([] if rank == 0 else [{"id": "é"}]) == [{"id": "é"}]
    assert dist.gather_objects([]) == []
    assert dist.gather_objects([f"{rank}a", f"{rank}b"]) == ["0a", "0b", "1a", "1b"]
    assert dist.broadcast_object({"rank": rank}) == {"rank": 0}
    mean = dist.all_reduce_mean(torch.tensor([1.0, 3.0]) * (rank + 1))
    assert mean.tolist() == [1.5, 4.5]
    model = nn.Linear(2, 1)
    model.register_buffer("queue", torch.full((2,), float(rank + 5)))
    parallel, _ = dist.data_parallel(model)
    assert dict(parallel.named_buffers())["module.queue"].tolist() == [5.0, 5.0]
    gathered = dist.all_gather(torch.tensor([[rank, rank]]).t())  # not contiguous
    assert gathered.flatten().tolist() == [0, 0, 1, 1]
    check_main_first(folder)


def check_main_first(folder: Path) -> None:
    """Rank 0's body comes first; its failure is everybody's."""
    with dist.main_first():
        if dist.is_main():
            (folder / "made").touch()
        assert (folder / "made").exists()
    expected: Any = OSError if dist.is_main() else RuntimeError
    with pytest.raises(expected, match="no space"), dist.main_first():
        fail_on_main()
    dist.barrier()


def fail_on_main() -> None:
    """Stands for a download that fails."""
    if dist.is_main():
        raise OSError("no space")


@pytest.mark.slow
def test_objects_and_main_first(tmp_path: Path) -> None:
    launch(body_objects, tmp_path, world=2)


def own_threads() -> list[str]:
    """Names of this process's native threads."""
    return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))


def body_train(folder: Path) -> None:
    model, _ = dist.data_parallel(nn.Linear(2, 1))
    model.cycle = model  # as runner, task and model refer to one another
    model(torch.ones(3, 2)).sum().backward()
    assert any("gloo" in name for name in own_threads())


def _train_and_leave(rank: int, folder: Path, port: int) -> None:
    _enter(rank, body_train, folder, 2, port)
    assert not any("gloo" in name for name in own_threads()), own_threads()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's list of threads")
def test_shutdown_ends_the_groups_threads(tmp_path: Path) -> None:
    """A thread of gloo that frees a tensor while Python ends aborts the process, although the job is done."""
    warm.spawn(_train_and_leave, tmp_path, free_port(), world=2)


def test_on_main_inside_on_main_is_an_error_where_there_are_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dist.on_main(lambda: dist.on_main(lambda: 3)) == 3
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "broadcast_object", lambda value: value)
    with pytest.raises(RuntimeError, match="on_main inside on_main"):
        dist.on_main(lambda: dist.on_main(lambda: 3))
    assert dist.on_main(lambda: 3) == 3
