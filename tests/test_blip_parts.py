"""BLIP's parts trained or not: other image encoders, frozen parts, adapters, and images classified without a text."""

from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import timm
import torch
import torch.nn.functional as F

from lavis_lite.common.errors import InputError
from lavis_lite.convert.__main__ import run
from lavis_lite.models import from_pretrained, load_model

SIGLIP = {"width": 32, "depth": 2, "num_heads": 2}
OTHER = {"vit_type": "vit_base_patch16_siglip_224", "vit": SIGLIP}
"""A ViT of timm without a class token, at the tests' size."""
LORA = {"r": 2, "target_modules": ["query", "value"]}
VIT_LORA = {"r": 2, "target_modules": ["qkv"]}


def batch(size: int = 48) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    samples = {"image": torch.randn(2, 3, size, size, generator=generator), "image_id": torch.tensor([0, 1])}
    samples |= {"text_input": ["a red circle", "two blue squares"], "label": torch.tensor([1, 0])}
    return samples | {"answer": ["red", "two"], "weight": torch.ones(2), "n_answers": torch.tensor([1, 1])}


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# Image encoders of timm


@torch.no_grad()
def test_an_encoder_of_timm_gives_timms_tokens_and_their_mean_is_the_feature() -> None:
    model = cli_helpers.build("blip_retrieval", **OTHER).eval()
    plain = timm.create_model(
        "vit_base_patch16_siglip_224", embed_dim=32, depth=2, num_heads=2, img_size=48, num_classes=0
    ).eval()
    state = {name: tensor for name, tensor in model.visual_encoder.state_dict().items()}
    plain.load_state_dict(state, strict=False)
    expected = plain.forward_features(batch()["image"])
    tokens, feature = model.image_features(batch()["image"])
    torch.testing.assert_close(tokens, expected)
    torch.testing.assert_close(feature, F.normalize(model.vision_proj(expected.mean(dim=1)), dim=-1))
    assert not model.visual_encoder.has_class_token
    assert cli_helpers.build(
        "blip_retrieval", vit_type="vit_tiny_patch16_224", vit=SIGLIP
    ).visual_encoder.has_class_token


@pytest.mark.parametrize("arch", ["blip_caption", "blip_retrieval", "blip_vqa", "blip_classification", "blip_pretrain"])
def test_models_train_with_an_encoder_of_timm(arch: str) -> None:
    model = cli_helpers.build(arch, **OTHER)
    model(batch())["loss"].backward()
    assert model.visual_encoder.pos_embed.grad.abs().sum() > 0


def test_weights_of_timm_initialise_the_encoder(tmp_path: Path) -> None:
    first = cli_helpers.build("blip_caption", **OTHER)
    torch.save(
        {f"{name}": tensor + 1 for name, tensor in first.visual_encoder.state_dict().items()}, tmp_path / "v.pth"
    )
    second = cli_helpers.build("blip_caption", **OTHER, init_vit=str(tmp_path / "v.pth"))
    for name, tensor in first.visual_encoder.state_dict().items():
        assert torch.equal(second.visual_encoder.state_dict()[name], tensor + 1)


def test_a_file_of_another_size_is_resized(tmp_path: Path) -> None:
    first = cli_helpers.build("blip_retrieval", **OTHER)
    torch.save({"model": first.state_dict()}, tmp_path / "model.pth")
    second = cli_helpers.build("blip_retrieval", **OTHER, image_size=64, checkpoint=str(tmp_path / "model.pth"))
    assert second.visual_encoder.pos_embed.shape == (1, 16, 32)
    assert torch.equal(second.visual_encoder.pos_embed, second.visual_encoder_m.pos_embed)


def test_statistics_are_the_encoders_own() -> None:
    model_class = type(cli_helpers.build("blip_caption"))
    assert model_class.image_statistics({"vit_type": "vit_base_patch16_siglip_224"}) == {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    assert model_class.image_statistics({"vit_type": "base"}) is None


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"vit_type": "vit_base_patch16_siglipp"}, r"model\.vit_type.*siglipp"),
        ({**OTHER, "vit_ckpt_layer": 2}, r"model\.vit_ckpt_layer"),
        ({"freeze_vit": True, "vit_lora": VIT_LORA}, r"model\.freeze_vit.*vit_lora"),
        ({"vit_lora": {"r": 2, "target_modules": ["nothing"]}}, r"model\.vit_lora.*qkv"),
        ({"text_lora": {"r": 0, "target_modules": ["query"]}}, r"model\.text_lora\.r.*0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        cli_helpers.build("blip_caption", **settings)


# Frozen parts


def test_a_frozen_image_encoder_is_not_trained_and_its_mode_stays() -> None:
    model = cli_helpers.build("blip_retrieval", freeze_vit=True, vit_drop_path_rate=0.5).train()
    assert not [name for name in trained(model) if name.startswith("visual_encoder.")]
    assert model.training
    assert not model.visual_encoder.training
    model(batch())["loss"].backward()
    assert model.visual_encoder.pos_embed.grad is None
    assert model.vision_proj.weight.grad.abs().sum() > 0
    assert torch.equal(model.encode_image(batch()["image"]), model.encode_image(batch()["image"]))


@pytest.mark.parametrize("arch", ["blip_vqa", "blip_pretrain", "blip_classification"])
def test_a_frozen_text_transformer_still_passes_gradients_to_the_image_encoder(arch: str) -> None:
    model = cli_helpers.build(arch, freeze_text=True).train()
    assert not [name for name in trained(model) if name.startswith(("text_encoder.", "text_decoder."))]
    assert not model.text_encoder.training
    model(batch())["loss"].backward()
    assert model.visual_encoder.pos_embed.grad.abs().sum() > 0
    assert model.text_encoder.embeddings.word_embeddings.weight.grad is None


# Adapters


@pytest.mark.parametrize("arch", ["blip_retrieval", "blip_vqa", "blip_pretrain", "blip_nlvr", "blip_classification"])
def test_adapters_alone_are_trained_and_begin_without_effect(arch: str, tmp_path: Path) -> None:
    plain = cli_helpers.build(arch).eval()
    torch.save({"model": plain.state_dict()}, tmp_path / "model.pth")
    settings = {"text_lora": LORA, "vit_lora": VIT_LORA, "pretrained": str(tmp_path / "model.pth")}
    model = cli_helpers.build(arch, **settings).eval()
    image = batch()["image"]
    assert torch.equal(model.encode_image(image), plain.encode_image(image))
    ids, mask = plain.tokenize(batch()["text_input"])
    assert torch.equal(model.text_encoder(ids, mask)[0], plain.text_encoder(ids, mask)[0])
    inside = {name for name in trained(model) if name.startswith(("visual_encoder.", "text_encoder.", "text_decoder."))}
    assert inside
    assert all(".lora_" in name for name in inside)
    assert {name for name in trained(model) if ".lora_" not in name} == {
        name for name in trained(plain) if not name.startswith(("visual_encoder.", "text_encoder.", "text_decoder."))
    }


SETTINGS: list[dict[str, Any]] = [
    {"freeze_vit": True},
    {"text_lora": LORA, "vit_lora": VIT_LORA},
    {"freeze_text": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_training_resumes_exactly_and_moves_only_what_is_trained(settings: dict[str, Any], tmp_path: Path) -> None:
    start = cli_helpers.build("blip_retrieval", **cli_helpers.MOMENTUM)
    torch.save({"model": start.state_dict()}, tmp_path / "start.pth")
    often = {"keep_checkpoints": 9, "checkpoint_every": 2}
    changes = {"model": {**settings, "pretrained": str(tmp_path / "start.pth")}, "run": often}
    path = cli_helpers.project(tmp_path, "retrieval", changes, cli_helpers.NO_DROPOUT)
    assert cli_helpers.train(path, job="whole") == 0
    job = tmp_path / "output/whole"
    middle = job / "checkpoint_4.pth"
    assert cli_helpers.train(path, f"run.resume_ckpt_path={middle}", job="again") == 0
    whole = cli_helpers.weights(job / "checkpoint_last.pth")
    cli_helpers.assert_same_state(whole, cli_helpers.weights(tmp_path / "output/again/checkpoint_last.pth"))
    moved = {name for name, tensor in whole.items() if not torch.equal(tensor, original(start, name, tensor))}
    frozen = ("visual_encoder.",) if "freeze_vit" in settings else ()
    frozen += ("text_encoder.",) if "freeze_text" in settings else ()
    assert not [name for name in moved if name.startswith(frozen or ("none",))]
    assert not [name for name in moved if ".base_layer." in name]
    assert "temp" in moved
    assert cli_helpers.evaluate(path, weights=job / "checkpoint_best.pth") == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lavis", "hf", "lavis of timm"])
def test_a_trained_model_is_written_with_its_adapters_merged(kind: str, tmp_path: Path) -> None:
    own = (
        {**OTHER, "vit_lora": {"r": 2, "target_modules": ["qkv", "proj"]}} if "timm" in kind else {"vit_lora": VIT_LORA}
    )
    path = cli_helpers.project(tmp_path, "caption", {"model": {**own, "text_lora": LORA}}, cli_helpers.NO_DROPOUT)
    assert cli_helpers.train(path, "run.init_lr=0.01", job="job") == 0
    source = tmp_path / "output/job/checkpoint_last.pth"
    model = from_pretrained(source, is_eval=True)
    assert any(name.endswith("lora_B.default.weight") and part.abs().sum() for name, part in model.named_parameters())
    if kind == "hf":
        target = tmp_path / "folder"
        assert run(["to-hf", "blip_caption", "tiny", str(target), "--checkpoint", str(source)]) == 0
    else:
        target = tmp_path / "merged.pth"
        assert run(["to-lavis", str(source), str(target)]) == 0
    again = from_pretrained(target, is_eval=True)
    assert not [name for name in again.state_dict() if "lora" in name]
    samples = {"image": batch()["image"], "text_input": ["a red circle", "two blue squares"]}
    with torch.no_grad():
        assert torch.allclose(again(samples)["loss"], model(samples)["loss"], atol=1e-5)


def original(model: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that a trained one began as; of an adapter another."""
    return model.state_dict().get(name.replace(".base_layer", ""), torch.empty(0))


# Images without texts


def test_an_image_is_classified_by_its_class_token() -> None:
    model = load_model("blip_image_classification", "tiny", is_eval=True)
    assert not [name for name, _ in model.named_parameters() if "text" in name]
    image = batch()["image"]
    logits = model.cls_head(model.visual_encoder(image)[:, 0])
    found = model.predict(batch())
    assert torch.equal(found["predictions"], logits)
    loss = F.cross_entropy(logits, batch()["label"])
    assert float(model(batch())["loss"]) == pytest.approx(float(loss))
