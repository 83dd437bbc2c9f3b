"""Running means of a log, and draws by weight."""

import pytest
import torch

from lavis_lite.common.logger import MetricLogger, row_of
from lavis_lite.nn.sampling import draw

NAMES = ("loss", "loss_itc", "temp")


def steps(count: int, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Scalars of several types, one with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(count, 3, generator=generator)
    types = (torch.float32, torch.float64, torch.bfloat16)
    cast = [[value.to(dtype) for value, dtype in zip(row, types, strict=True)] for row in rows]
    return [{name: value.requires_grad_() for name, value in zip(NAMES, row, strict=True)} for row in cast]


def sums(rows: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """The means, by Python's floats in the order of the steps."""
    return {name: sum(float(row[name].detach()) for row in rows) / len(rows) for name in NAMES}


def test_means_are_those_of_each_value_alone() -> None:
    metrics, rows = MetricLogger(), steps(7)
    for row in rows:
        metrics.update(**row)
        metrics.update(grad_norm=torch.tensor(2.0))
    assert metrics.drain() == {**sums(rows), "grad_norm": 2.0}
    assert metrics.drain() == {}
    metrics.update(loss=3)
    assert metrics.drain() == {"loss": 3.0}


def test_a_row_is_one_vector_without_a_gradient() -> None:
    row = row_of({**steps(1)[0], "more": 5})
    assert row.dtype == torch.float64
    assert row.shape == (4,)
    assert not row.requires_grad
    assert float(row[3]) == 5.0


def test_a_resumed_mean_is_exact() -> None:
    rows = steps(9)
    for cut in (0, 4, 9):
        first, second = MetricLogger(), MetricLogger()
        for row in rows[:cut]:
            first.update(**row)
        second.load_state_dict(first.state_dict())
        assert second.state_dict() == first.state_dict()
        for row in rows[cut:]:
            second.update(**row)
        assert second.drain() == sums(rows)


def test_a_value_that_is_missing_in_a_step_has_its_own_count() -> None:
    metrics = MetricLogger()
    metrics.update(loss=1.0, cos_image=0.5)
    metrics.update(loss=2.0)  # the last batch, of one image
    assert metrics.drain() == {"loss": 1.5, "cos_image": 0.5}
    metrics.load_state_dict({"loss": (3.0, 2), "old": (4.0, 2)})
    metrics.update(loss=6.0)
    assert metrics.drain() == {"loss": 3.0, "old": 2.0}


@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (8, 1000), (2, 30524)])
def test_draws_are_those_of_multinomial(shape: tuple[int, int]) -> None:
    """Torch's own draw is the reference: the same columns, and the same state of the generator after it."""
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    weights[:, 1::3] = 0.0
    for seed in range(10):
        torch.manual_seed(seed)
        expected, state = torch.multinomial(weights, 1).squeeze(1), torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(draw(weights), expected)
        assert torch.equal(torch.get_rng_state(), state)
