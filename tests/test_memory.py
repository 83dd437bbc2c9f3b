"""The dry run's memory: counts on the meta device equal those of real tensors; parts by hand; the warning."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import build, project, section
from torch import nn
from torch.nn import functional as F

from lavis_lite.cli import memory
from lavis_lite.cli.dry_run import build_without_weights
from lavis_lite.cli.main import train_main
from lavis_lite.common.config.agreement import model_setting
from lavis_lite.common.config.config import Config
from lavis_lite.common.config.sections import MODEL_KEYS
from lavis_lite.common.registry import registry
from lavis_lite.models.base import build_model


class TwoLayers(nn.Module):
    """3 -> 5 -> 1 with a ReLU; the first layer is frozen if asked for."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 1)
        self.first.requires_grad_(not frozen)

    def forward(self, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"loss": self.second(F.relu(self.first(samples["image"]))).mean()}


def test_the_parts_of_a_small_network() -> None:
    with torch.device("meta"):
        model, batch = TwoLayers(), {"image": torch.empty(1, 3)}
    found = memory.training_memory(model, batch, batch_size=10, dtype=torch.float32)
    assert found.weights == 4 * (15 + 5 + 5 + 1)
    assert (found.gradients, found.optimizer) == (found.weights, 2 * found.weights)
    assert found.activations == 10 * 4 * (3 + 5)  # the input, and the ReLU's output, which both layers keep
    with torch.device("meta"):
        frozen = memory.training_memory(TwoLayers(frozen=True), batch, batch_size=10, dtype=torch.float32)
    assert (frozen.gradients, frozen.activations) == (4 * 6, 10 * 4 * 5)


@pytest.mark.parametrize("arch", ["blip2_opt", "blip2_t5", "blip2_t5_instruct"])
def test_meta_counts_what_a_language_model_keeps(arch: str) -> None:
    size = model_setting(section(arch), "image_size")
    batch: dict[str, Any] = {"image": torch.zeros(2, 3, size, size), "text_input": ["what is it?", "who?"]}
    batch["text_output"] = ["a circle", "a red square"]
    expected = memory.saved_bytes(build(arch), batch, dtype=torch.float32)
    batch["image"] = batch["image"].to("meta")
    assert memory.saved_bytes(build_without_weights(section(arch)), batch, dtype=torch.float32) == expected


@pytest.mark.parametrize("name", ["caption", "pretrain", "retrieval", "vqa_rank"])
def test_meta_counts_what_real_tensors_keep(tmp_path: Path, name: str) -> None:
    cfg = Config.from_file(project(tmp_path, name))
    model, size = build_without_weights(cfg.model), model_setting(cfg.model, "image_size")
    batch: dict[str, Any] = {"image": torch.zeros(2, 3, size, size), "text_input": ["a red circle"] * 2}
    batch["image_id"] = torch.tensor([1, 2])
    batch |= {"answer": ["red", "two", "a"], "weight": torch.ones(3), "n_answers": torch.tensor([2, 1])}
    real = build_model(registry.get_model_class(cfg.model["arch"]), _arguments(cfg))
    meta = {key: value.to("meta") if torch.is_tensor(value) else value for key, value in batch.items()}
    expected = memory.saved_bytes(real, batch, dtype=torch.float32)
    assert memory.saved_bytes(model, meta, dtype=torch.float32) == pytest.approx(expected, rel=0.15)


def _arguments(cfg: Config) -> dict[str, Any]:
    return {key: value for key, value in cfg.model.items() if key not in MODEL_KEYS}


@pytest.mark.parametrize("arch", ["blip2", "blip2_opt", "blip2_t5", "blip2_vicuna_instruct"])
def test_blip2_is_counted(arch: str) -> None:
    cfg = section(arch)
    size = model_setting(cfg, "image_size")
    image = torch.zeros(1, 3, size, size, device="meta")
    batch = {"image": image, "text_input": ["what?"], "text_output": ["a circle"]}
    model = build_without_weights(cfg)
    assert memory.training_memory(model, batch, batch_size=4, dtype=torch.bfloat16).activations


def test_the_dry_run_prints_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_capacity", lambda device: 1000)
    with pytest.raises(SystemExit) as ended:
        train_main(["--cfg-path", str(project(tmp_path, "caption")), "--dry-run"])
    assert ended.value.code == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory ")]
    assert "activations about" in lines[0]
    assert "run.batch_size_train" in lines[1]
