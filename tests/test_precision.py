"""How float32 matrix products are computed on CPUs, and which CPUs gain by bf16."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lavis_lite.common import precision

AMD = "vendor_id\t: AuthenticAMD\nflags\t: fma avx2 avx512f avx512_bf16"
INTEL = "vendor_id\t: GenuineIntel\nflags\t: fma avx2 avx512f amx_bf16"


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """torch's setting, left as it was, with AVX-512 whatever this machine has."""
    precision.use_faster_products.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    found = torch.backends.mkldnn.matmul
    before = found.fp32_precision
    yield found
    found.fp32_precision = before
    precision.use_faster_products.cache_clear()


def on(monkeypatch: pytest.MonkeyPatch, cpu: str) -> None:
    monkeypatch.setattr(precision, "cpu_description", lambda: cpu)


def test_amd_uses_onednn_where_its_error_is_that_of_float32(monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    on(monkeypatch, AMD)
    monkeypatch.setattr(precision, "product_error", lambda: 3.7e-7)
    assert precision.use_faster_products()
    assert settings.fp32_precision == "bf16"


@pytest.mark.parametrize(("cpu", "error"), [(AMD, 2.4e-3), (INTEL, 3.7e-7), ("", 3.7e-7)])
def test_the_setting_stays_elsewhere(monkeypatch: pytest.MonkeyPatch, settings: Any, cpu: str, error: float) -> None:
    on(monkeypatch, cpu)
    monkeypatch.setattr(precision, "product_error", lambda: error)
    before = settings.fp32_precision
    assert not precision.use_faster_products()
    assert settings.fp32_precision == before


def test_the_error_of_a_product_is_measured() -> None:
    assert 1e-8 < precision.product_error() < precision.LARGEST_ERROR


@pytest.mark.parametrize(("seconds", "expected"), [(0.4, True), (0.9, False), (2.0, False)])
def test_bf16_is_fast_where_its_products_take_less_time(
    monkeypatch: pytest.MonkeyPatch, seconds: float, expected: bool
) -> None:
    """An Intel CPU with avx512_bf16 and without AMX takes twice the time of float32."""
    monkeypatch.setattr(precision, "_time_of_product", lambda factor: seconds if factor.element_size() == 2 else 1.0)
    precision.bf16_gain.cache_clear()
    assert precision.has_fast_bf16() is expected
    assert precision.bf16_gain() == pytest.approx(1 / seconds)
    precision.bf16_gain.cache_clear()


def test_the_gain_of_bf16_is_measured() -> None:
    precision.bf16_gain.cache_clear()
    assert 0 < precision.bf16_gain() < 100
