"""Grad-CAM: gradients against finite differences, LAVIS's interface, and the maps of each family."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lavis_lite.cli.app import app
from lavis_lite.common.errors import InputError
from lavis_lite.models import load_model
from lavis_lite.models.explain import attention_layers, explain
from lavis_lite.nn.attention_maps import as_grid, grad_cam, recorded_attention

TEXTS = ["a red circle", "two large blue squares"]


def tiny(arch: str) -> Any:
    torch.manual_seed(0)
    return load_model(arch, "tiny", is_eval=True)


def images_for(model: Any, count: int = 1) -> torch.Tensor:
    size = model.visual_encoder.config.image_size if "config" in vars(model.visual_encoder) else 48
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_recorded_attention_changes_nothing_and_is_removed() -> None:
    model = tiny("blip_image_text_matching")
    samples = {"image": images_for(model, 2), "text_input": TEXTS}
    layer = attention_layers(model)[1]
    expected = model(samples, match_head="itm")
    with recorded_attention(layer) as record:
        found = model(samples, match_head="itm")
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(record[0].sum(dim=-1), torch.ones(record[0].shape[:-1]))
    assert "forward" not in vars(layer)
    assert torch.equal(model(samples, match_head="itm"), expected)


def test_the_gradient_is_that_of_finite_differences() -> None:
    """The logit's derivative by one attention probability: the layer's output moves by that value row."""
    model = tiny("blip_image_text_matching").double()
    samples = {"image": images_for(model).double(), "text_input": TEXTS[:1]}
    layer = attention_layers(model)[0]
    with recorded_attention(layer) as record, torch.enable_grad():
        score = model(samples, match_head="itm")[:, 1].sum()
        (gradient,) = torch.autograd.grad(score, record[-1])
    head, token, patch, step = 1, 2, 5, 2e-2  # the head computes in float32
    plain = layer.forward
    width = layer.query.out_features // layer.num_heads

    def moved_by(amount: float) -> float:
        def forward(x: Any, key_value: Any, mask: Any, **_: Any) -> Any:
            out = plain(x, key_value, mask).clone()
            out[0, token, head * width : (head + 1) * width] += amount * key_value[1][0, head, patch]
            return out

        layer.forward = forward
        with torch.no_grad():
            return float(model(samples, match_head="itm")[0, 1])

    numeric = (moved_by(step) - moved_by(-step)) / (2 * step)
    assert float(gradient[0, head, token, patch]) == pytest.approx(numeric, rel=2e-3)


def test_grids_have_no_class_token() -> None:
    values = torch.arange(10.0).reshape(1, 1, 10)
    assert torch.equal(as_grid(values)[0, 0], torch.arange(1.0, 10).reshape(3, 3))
    assert torch.equal(as_grid(values[..., :9])[0, 0], torch.arange(9.0).reshape(3, 3))
    with pytest.raises(ValueError, match="8 image tokens"):
        as_grid(values[..., :8])


def test_negative_gradients_do_not_count() -> None:
    probabilities = torch.tensor([[[[0.25, 0.75]], [[0.5, 0.5]]]])
    gradient = torch.tensor([[[[2.0, -1.0]], [[4.0, 1.0]]]])
    assert torch.equal(grad_cam(probabilities, gradient), torch.tensor([[[1.25, 0.25]]]))


def test_compute_gradcam_has_the_rows_of_lavis() -> None:
    from lavis_lite.models.blip_models.blip_image_text_matching import compute_gradcam

    model = tiny("blip_image_text_matching")
    image = images_for(model, 2)
    ids, mask = model.tokenize(TEXTS, max_length=model.max_txt_len)
    found, logits = compute_gradcam(
        model, image, TEXTS, SimpleNamespace(input_ids=ids, attention_mask=mask), block_num=1
    )
    assert torch.allclose(logits, model({"image": image, "text_input": TEXTS}, match_head="itm"), atol=1e-6)
    for row, (own, text) in enumerate(zip(found, TEXTS, strict=True)):
        length = int(mask[row].sum()) - 2
        maps = explain(model, {"image": image[row : row + 1]}, text=text, layer=1)[1]
        assert len(own) == 2 + ids.shape[1] - 1
        assert maps.labels == ["[ENC]", *model.tokenizer.tokenize(text)]
        assert len(maps.labels) == 1 + length
        assert np.allclose(own[0].numpy(), maps.maps[0], atol=1e-6)
        assert np.allclose(own[2 : 2 + length].numpy(), maps.maps[1:], atol=1e-6)
        assert np.allclose(own[1].numpy(), maps.mean, atol=1e-6)
        assert float(own[2 + length + 1 :].abs().sum()) == 0


@pytest.mark.parametrize(
    "arch", ["blip_caption", "blip_vqa", "blip2", "blip2_opt", "blip2_t5_instruct", "blip_retrieval"]
)
def test_each_family_has_maps_of_its_words_or_queries(arch: str) -> None:
    model = tiny(arch)
    samples: dict[str, Any] = {"image": images_for(model)}
    if arch in ("blip_vqa", "blip2_opt", "blip2_t5_instruct"):
        samples["text_input"] = ["what color is it?"]
    needs_text = arch in ("blip2", "blip_retrieval")
    text, maps = explain(model, samples, text="a red circle" if needs_text else None)
    rows = {"blip_vqa": model.tokenizer.tokenize("what color is it?")} if arch == "blip_vqa" else {}
    rows |= {
        "blip_caption": model.tokenizer.tokenize(text),
        "blip_retrieval": ["[ENC]", *model.tokenizer.tokenize(text)],
    }
    num_queries = model.query_tokens.shape[1] if "query_tokens" in dict(model.named_parameters()) else 0
    assert maps.labels == rows.get(arch, [f"query {number + 1}" for number in range(num_queries)])
    assert maps.maps.shape[0] == len(maps.labels)
    assert maps.maps.shape[1] == maps.maps.shape[2]
    assert (maps.maps >= 0).all()
    assert maps.maps.max() > 0
    with pytest.raises(InputError, match="layer"):
        explain(model, samples, text="a red circle", layer=99)


def test_a_model_without_cross_attention_and_a_missing_text_are_refused() -> None:
    with pytest.raises(InputError, match="BlipNLVR"):
        explain(tiny("blip_nlvr"), {"image": torch.randn(1, 3, 48, 48)})
    model = tiny("blip_image_text_matching")
    with pytest.raises(InputError, match="text"):
        explain(model, {"image": images_for(model)})


@pytest.mark.parametrize("name", ["explained.png", "explained.html", "maps.npz"])
def test_the_command_writes_overlays_or_maps(name: str, tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "photo.png")
    out = tmp_path / name
    command = ["explain", str(tmp_path / "photo.png"), "--model", "blip_image_text_matching/tiny", "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, "--text", "a red circle", "--out", str(out)])
    assert result.exit_code == 0, result.output
    if name.endswith("png"):
        assert Image.open(out).width > 500
    elif name.endswith("html"):
        page = out.read_text()
        assert page.count("<img") == 6
        assert 'alt="red, share of the largest: ' in page
        assert "prefers-color-scheme: dark" in page  # the style that all pages share
    else:
        content = np.load(out)
        assert content["maps"].shape[0] == len(content["labels"]) == 4
