"""benchmarks/scaling.py: its formulas give the bytes that two processes send; the page's table is the script's."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import warm

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scaling() -> Iterator[ModuleType]:
    """The script, imported as it is run: with its folder on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("scaling")


def test_what_is_sent_is_what_the_formula_says(scaling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling.mp, "spawn", lambda own, args, nprocs: warm.spawn(own, *args, world=nprocs))
    (weak, strong) = scaling.measured_rows([2], batch=4, num_steps=1)
    for row, batch in ((weak, 4), (strong, 2)):
        formula, counted = row["formula"], row["counted"]
        assert row["batch"] == batch
        assert counted["gradients"] == formula["gradients"]
        assert counted["features"] == formula["features"]
        texts = 64 * batch * 8  # ids, masks and the numbers of rows
        assert counted["exchanged"] <= 2 * formula["negatives"] + texts  # all negatives may be the other process's
    assert weak["formula"]["features"] == 2 * strong["formula"]["features"] == 4 * 4 * (32 + 1) * 256
    assert weak["formula"]["gradients"] == strong["formula"]["gradients"]


def test_the_table_of_the_page(scaling: ModuleType) -> None:
    """And its hand arithmetic: bytes of gradients of two GPUs are those of the trained parameters in fp32."""
    page = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    assert "\n".join(scaling.arithmetic_table()) in page
    model = scaling.stages()["stage 1"].model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert scaling.traffic(model, batch=1, world=2).gradients == 4 * trained
    assert scaling.traffic(model, batch=10, world=11).features == 10 * 10 * 33 * 256 * 4
    assert scaling.traffic(model, batch=10, world=2, token_bytes=2).negatives == 10 * 257 * 1408 * 2
