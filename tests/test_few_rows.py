"""Linear layers of few rows, computed by columns, against torch's own."""

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_lite.models import load_model
from lavis_lite.nn import decoding, few_rows
from lavis_lite.nn.few_rows import LEAST_ROWS, MOST_ROWS, FewRows

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch is built without MKL")


@pytest.fixture
def by_columns(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the inputs that were computed by columns."""
    shapes: list[torch.Size] = []
    own = few_rows._by_columns

    def noted(x: Tensor, *parameters: Tensor) -> Tensor:
        shapes.append(x.shape)
        return own(x, *parameters)

    monkeypatch.setattr(few_rows, "_by_columns", noted)
    return shapes


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(LEAST_ROWS, 5), (10, 1, 5), (2, 3, 2, 5), (MOST_ROWS, 5)])
def test_the_product_is_the_same(shape: tuple[int, ...], has_bias: bool, by_columns: list[torch.Size]) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(3, 5), torch.randn(3) if has_bias else None
    with torch.no_grad(), FewRows():
        found = F.linear(x, weight, bias)
        layer = torch.nn.Linear(5, 3, bias=has_bias)
        layer(x.transpose(0, -2))  # not contiguous
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    assert by_columns == [x.shape, x.transpose(0, -2).shape]


@pytest.mark.parametrize("shape", [(LEAST_ROWS - 1, 5), (MOST_ROWS + 1, 5), (5,), (0, 5)])
def test_other_numbers_of_rows_stay(shape: tuple[int, ...], by_columns: list[torch.Size]) -> None:
    x, weight = torch.randn(shape), torch.randn(3, 5)
    with torch.no_grad(), FewRows():
        assert torch.equal(F.linear(x, weight), F.linear(x, weight, None))
    assert by_columns == []


def test_gradients_other_types_and_autocast_stay(by_columns: list[torch.Size]) -> None:
    x, weight = torch.randn(10, 5), torch.randn(3, 5, requires_grad=True)
    with FewRows():
        F.linear(x, weight).sum().backward()
        with torch.no_grad():
            assert F.linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
            with torch.autocast("cpu", torch.bfloat16):
                assert F.linear(x, weight).dtype == torch.bfloat16
    assert weight.grad is not None
    assert by_columns == []


@pytest.mark.parametrize("arch", ["blip_caption", "blip2_opt"])
def test_captions_stay(arch: str, by_columns: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = load_model(arch, "tiny", is_eval=True)
    samples = {"image": torch.randn(3, 3, 48, 48)}
    settings: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 8, "return_scores": True}
    found = model.generate(samples, **settings)
    assert len(by_columns) > 10
    monkeypatch.setattr(decoding, "FewRows", contextlib.nullcontext)
    expected = model.generate(samples, **settings)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-5)
