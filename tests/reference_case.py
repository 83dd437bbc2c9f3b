"""A recorded case of the original implementation, and how near a result must come to it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lavis_lite.common.registry import registry

REFERENCE = Path(os.environ.get("LAVIS_LITE_REFERENCE_DIR", Path(__file__).parent / "reference"))


class Case:
    """One recorded case, of the reference folder or of another one with `cases`."""

    def __init__(self, name: str, root: Path = REFERENCE, device: str = "cpu") -> None:
        folder = root / "cases" / name
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.inputs = load_file(folder / "inputs.safetensors", device=device)
        self.outputs = load_file(folder / "outputs.safetensors", device=device)
        self.facts: dict[str, Any] = json.loads((folder / "outputs.json").read_text())
        self.weights = load_file(folder / "weights.safetensors", device=device)

    def sizes(self) -> dict[str, Any]:
        """Constructor arguments of the image encoder, the text transformer and the tokenizer."""
        return self.image_and_tokenizer() | {
            "vit_layer_norm_epsilon": self.config["_explicit"]["vit"]["norm_eps"],
            "med": self.text_transformer("med"),
        }

    def image_and_tokenizer(self) -> dict[str, Any]:
        """Arguments that every family's models take."""
        vit, explicit = self.config["vit"], self.config["_explicit"]
        return {
            "image_size": vit["img"],
            "vit": {
                "patch_size": vit["patch"],
                "width": vit["width"],
                "depth": vit["depth"],
                "num_heads": vit["heads"],
                "mlp_ratio": explicit["vit"]["mlp_ratio"],
            },
            "tokenizer": str(REFERENCE / explicit["tokenizer"]["folder"]),
        }

    def text_transformer(self, name: str) -> dict[str, Any]:
        """Sizes of the text transformer that the case calls `name`."""
        sizes, explicit = self.config[name], self.config["_explicit"][name]
        return {
            "hidden_size": sizes["hidden"],
            "num_layers": sizes["layers"],
            "num_heads": sizes["heads"],
            "intermediate_size": sizes["inter"],
            "vocab_size": explicit["vocab_size"],
            "max_positions": explicit["max_position_embeddings"],
            "layer_norm_eps": explicit["layer_norm_eps"],
        }

    def model(self, arch: str, *settings: str, **more: Any) -> Any:
        """The registered model in evaluation mode with the case's weights; `settings` come from the config."""
        arguments = self.sizes() | {name: self.config[name] for name in settings} | more
        model = registry.get_model_class(arch)(**arguments).eval()
        model.load_state_dict(self.weights)
        return model


def close(actual: Tensor | float, expected: Tensor | float, tolerance: float = 1e-4) -> None:
    """Within the tolerance relative to the largest expected value."""
    actual, expected = (torch.as_tensor(value).detach().double().cpu() for value in (actual, expected))
    assert actual.shape == expected.shape
    scale = max(float(expected.abs().max()), 1e-3)
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * scale)


def close_gradients(model: nn.Module, expected: dict[str, float | None]) -> None:
    """Gradient norms of every trainable parameter within 1e-3."""
    actual = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert actual.keys() <= expected.keys()
    total = sum(value**2 for value in expected.values() if value) ** 0.5
    for name, gradient in actual.items():
        norm = 0.0 if gradient is None else float(gradient.norm())
        assert norm == pytest.approx(expected[name] or 0.0, rel=1e-3, abs=1e-6 * total), name


def up_to_end(ids: list[int], end: int) -> list[int]:
    """Ids up to and with the first end token."""
    return ids[: ids.index(end) + 1] if end in ids else ids


def blip2_sizes(case: Case) -> dict[str, Any]:
    """Constructor arguments of the image encoder, the Q-Former and the tokenizer."""
    explicit, shared = case.config["_explicit"], case.image_and_tokenizer()
    return shared | {
        **{name: case.config[name] for name in ("vit_model", "freeze_vit", "num_query_token")},
        "cross_attention_freq": explicit["qformer"]["cross_attention_freq"],
        "vit": shared["vit"] | {"norm_eps": explicit["vit"]["norm_eps"]},
        "vit_weights": "random",
        "qformer": case.text_transformer("qformer"),
    }
