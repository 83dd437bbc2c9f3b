"""Image encoders against the manifests, against transformers' and timm's own classes, and by hand."""

import copy
import gzip
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from lavis_lite.common.sources.weights import open_state
from lavis_lite.nn.encoders import ENCODERS, PUBLISHED, build_encoder
from lavis_lite.nn.vision import BlipViT

REFERENCE = Path(os.environ.get("LAVIS_LITE_REFERENCE_DIR", Path(__file__).parent / "reference"))
TIMM = "vit_tiny_patch16_224"
TIMM_SIZES = {"width": 32, "depth": 2, "num_heads": 2}
SWIN = "swin_tiny_patch4_window7_224"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """In evaluation mode with random biases and norms too, which start as zeros and ones."""
    for number, parameter in enumerate(module.parameters()):
        parameter.data = parameter.data + 0.05 * draw(*parameter.shape, seed=number)
    return module.eval()


@pytest.mark.parametrize(
    ("name", "image_size", "manifest", "width", "depth"),
    [
        ("eva_clip_g", 224, "blip2__pretrain", 1408, 39),
        ("eva_clip_g", 364, "blip2__coco", 1408, 39),
        ("clip_L", 224, "blip2__pretrain_vitL", 1024, 23),
    ],
)
def test_full_size_has_the_original_names(name: str, image_size: int, manifest: str, width: int, depth: int) -> None:
    keys = json.loads(gzip.decompress((REFERENCE / "manifests" / f"{manifest}.json.gz").read_bytes()))["keys"]
    prefix = "visual_encoder."
    expected = {key.removeprefix(prefix): shape for key, (shape, _) in keys.items() if key.startswith(prefix)}
    with torch.device("meta"):
        encoder = build_encoder(name, image_size=image_size)
    assert {key: list(tensor.shape) for key, tensor in encoder.state_dict().items()} == expected
    assert {key for key, _ in encoder.named_parameters()} == expected.keys()
    assert (encoder.width, encoder.depth, encoder.image_size) == (width, depth, image_size)


def openai_file(model: CLIPVisionModel) -> dict[str, Tensor]:
    """transformers' CLIP under OpenAI's names, as in a whole CLIP file with its text encoder."""
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("vision_model.")
        for theirs, ours in {
            "embeddings.patch_embedding": "conv1",
            "embeddings.position_embedding.weight": "positional_embedding",
            "embeddings.class_embedding": "class_embedding",
            "pre_layrnorm": "ln_pre",
            "post_layernorm": "ln_post",
            "encoder.layers.": "transformer.resblocks.",
            "self_attn.": "attn.",
            "layer_norm1": "ln_1",
            "layer_norm2": "ln_2",
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
        }.items():
            name = name.replace(theirs, ours)
        state[f"visual.{name}"] = tensor
    for part in ("weight", "bias"):
        for layer in range(model.config.num_hidden_layers):
            stem = f"visual.transformer.resblocks.{layer}.attn."
            qkv = [state.pop(f"{stem}{letter}_proj.{part}") for letter in "qkv"]
            state[f"{stem}in_proj_{part}"] = torch.cat(qkv)
    state["visual.proj"] = draw(64, 8)
    return state | {"positional_embedding": draw(77, 8), "transformer.resblocks.0.ln_1.bias": draw(8)}


@pytest.mark.parametrize("bare", [False, True])
def test_clip_gives_the_second_last_layer_of_an_openai_file(bare: bool) -> None:
    """Against transformers' CLIP of three layers: ours has two, and their weights come from OpenAI's names."""
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, image_size=48, patch_size=12
    )
    theirs = randomised(CLIPVisionModel(config))
    state = openai_file(theirs)
    if bare:
        state = {name.removeprefix("visual."): tensor for name, tensor in state.items() if name.startswith("visual.")}
    ours = build_encoder("clip_tiny", image_size=48).eval()
    ours.load_state_dict(ours.adapt_state_dict(state))
    image = draw(2, 3, 48, 48)
    expected = theirs(image, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(ours(image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "visual."])
def test_eva_gives_the_second_last_layer_of_a_whole_file(prefix: str) -> None:
    """Against timm's EVA-CLIP of three blocks with final norm and head."""
    sizes = {"img_size": 48, "patch_size": 12, "embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 4.0}
    theirs = randomised(timm.create_model("eva_giant_patch14_clip_224", num_classes=10, **sizes))
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    ours = build_encoder("eva_tiny", image_size=48).eval()
    ours.load_state_dict(ours.adapt_state_dict(state))
    image = draw(2, 3, 48, 48)
    ((patches, cls),) = theirs.forward_intermediates(
        image, indices=[1], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    torch.testing.assert_close(ours(image), torch.cat([cls, patches], dim=1), rtol=1e-4, atol=1e-5)


def test_blocks_that_do_not_fit_stay_in_the_state() -> None:
    """Only one block too many is the dropped one; a file of another depth must fail to load, not be cut."""
    deep = build_encoder("eva_tiny", image_size=48, sizes={"depth": 4})
    ours = build_encoder("eva_tiny", image_size=48)
    assert ours.adapt_state_dict(deep.state_dict()).keys() == deep.state_dict().keys()


def test_own_state_dict_is_not_changed() -> None:
    for name in ("eva_tiny", "clip_tiny", "blip_tiny", TIMM):
        encoder = build_encoder(name, image_size=48, sizes={"patch_size": 12, "width": 64, "depth": 2, "num_heads": 4})
        state = encoder.state_dict()
        adapted = encoder.adapt_state_dict(state)
        assert adapted.keys() == state.keys()
        assert all(adapted[key] is state[key] for key in state if "pos" not in key)
        assert all(torch.equal(adapted[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("name", "align_corners"), [("eva_tiny", False), ("clip_tiny", True), ("blip_tiny", False), (TIMM, None)]
)
def test_positions_are_resized_in_float32_and_keep_their_type(name: str, align_corners: bool | None) -> None:
    small, big = (build_encoder(name, image_size=size, sizes={"patch_size": 12}) for size in (48, 96))
    key = "positional_embedding" if name == "clip_tiny" else "pos_embed"
    state = {n: tensor.half() for n, tensor in small.state_dict().items()}
    resized = big.adapt_state_dict(state)[key]
    old = state[key].reshape(17, -1)
    grid = old[1:].float().reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    antialias = align_corners is None
    grid = F.interpolate(grid, size=(8, 8), mode="bicubic", align_corners=align_corners, antialias=antialias)
    expected = torch.cat([old[:1], grid[0].flatten(1).T.half()]).reshape(big.state_dict()[key].shape)
    assert resized.dtype == torch.float16
    assert torch.equal(resized, expected)
    big.load_state_dict(big.adapt_state_dict(small.state_dict()))


@pytest.mark.parametrize(
    ("name", "sizes", "told"),
    [
        ("eva_tiny", (48, 96), "position embeddings are resized from 4 x 4 to 8 x 8 patches"),
        ("clip_tiny", (48, 96), "position embeddings are resized from 4 x 4 to 8 x 8 patches"),
        (TIMM, (48, 96), "Resized position embedding: (4, 4) to (8, 8)."),  # timm's own
        (SWIN, (224, 64), "8 tables of relative positions are resized from 169 to 49 distances, 169 to 9 distances"),
    ],
)
def test_resizing_is_logged_once(
    name: str, sizes: tuple[int, int], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    small, big = (
        build_encoder(name, image_size=size, sizes={} if name == SWIN else {"patch_size": 12}) for size in sizes
    )
    caplog.set_level(logging.INFO)
    caplog.clear()
    big.adapt_state_dict(small.state_dict())
    assert [record.getMessage() for record in caplog.records] == [told]
    big.adapt_state_dict(big.state_dict())
    assert len(caplog.records) == 1


@pytest.mark.parametrize("name", ["eva_tiny", "clip_tiny", "blip_tiny", TIMM, SWIN])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    size, sizes = (64, {"width": 24}) if name == SWIN else (48, {"patch_size": 12})
    image = draw(2, 3, size, size)
    found = []
    for grad_checkpoint in (False, True):
        torch.manual_seed(0)
        settings = {"drop_path_rate": 0.5, "grad_checkpoint": grad_checkpoint, "sizes": sizes}
        encoder = build_encoder(name, image_size=size, **settings).train()
        torch.manual_seed(1)
        tokens = encoder(image)
        tokens.square().sum().backward()
        found.append((tokens, {key: p.grad for key, p in encoder.named_parameters()}))
    torch.testing.assert_close(found[0], found[1])
    assert all(gradient is not None for gradient in found[0][1].values())


def test_checkpointing_wraps_every_block() -> None:
    for name in ("eva_tiny", "clip_tiny", "blip_tiny", TIMM):
        encoder = build_encoder(name, image_size=48, grad_checkpoint=True, sizes={"patch_size": 12})
        assert all("forward" in vars(block) for block in encoder.blocks)


@pytest.mark.parametrize("image_size", [32, 64])
def test_timm_encoder_is_timm_s_model_without_its_head(image_size: int) -> None:
    """Same names and the same tokens as timm's own model, whose weights come in timm's own layout."""
    theirs = randomised(timm.create_model(TIMM, img_size=image_size, embed_dim=32, depth=2, num_heads=2))
    ours = build_encoder(TIMM, image_size=image_size, sizes=TIMM_SIZES).eval()
    ours.load_state_dict(ours.adapt_state_dict(theirs.state_dict()))
    heads = {"head.weight", "head.bias"}
    assert ours.state_dict().keys() == theirs.state_dict().keys() - heads
    assert dict(ours.named_parameters()).keys() == ours.state_dict().keys()
    assert (ours.width, ours.depth, ours.image_size) == (32, 2, image_size)
    image = draw(2, 3, image_size, image_size)
    tokens = ours(image)
    assert tokens.shape == (2, 1 + (image_size // 16) ** 2, 32)
    assert torch.equal(tokens, theirs.forward_features(image))


@pytest.mark.parametrize(("name", "sizes", "width"), [(SWIN, {"width": 24}, 192), ("resnet18", {}, 512)])
def test_feature_maps_become_tokens(name: str, sizes: dict[str, Any], width: int) -> None:
    """Row by row: the third of 2 x 2 tokens is the first of the second row. Swin's maps have the width last."""
    encoder = build_encoder(name, image_size=64, sizes=sizes).eval()
    image = draw(2, 3, 64, 64)
    tokens, last = encoder(image), encoder.forward_features(image)
    assert tokens.shape == (2, 4, width)
    assert encoder.width == width
    assert torch.equal(tokens[:, 2], last[:, 1, 0] if name == SWIN else last[:, :, 1, 0])


def test_relative_positions_are_resized_by_timm() -> None:
    """Swin's windows shrink with the image; its own checkpoint has no head, by which timm knows layouts."""
    big, small = (build_encoder(SWIN, image_size=size, sizes={"width": 24}) for size in (224, 64))
    name = "layers.3.blocks.0.attn.relative_position_bias_table"
    assert big.state_dict()[name].shape != small.state_dict()[name].shape
    small.load_state_dict(small.adapt_state_dict(big.state_dict()))


def test_a_model_that_gives_no_tokens_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build_encoder(TIMM, image_size=32, sizes=TIMM_SIZES)
    monkeypatch.setattr(type(encoder), "forward_features", lambda self, image: image.mean(dim=(2, 3)))
    with pytest.raises(ValueError, match=r"model\.vit_model: .*VisionTransformer .*width 32"):
        encoder(draw(1, 3, 32, 32))


def test_layers_that_timm_does_not_number_have_no_decay() -> None:
    encoder = build_encoder("pit_ti_224", image_size=224)
    assert encoder.layer_scale("cls_token", 1.0) == 1.0
    with pytest.raises(ValueError, match=r"run\.lr_layer_decay: .*PoolingVisionTransformer"):
        encoder.layer_scale("cls_token", 0.9)


def test_a_pooling_head_of_timm_is_left_out() -> None:
    """SigLIP's attention pooling would get no gradient."""
    encoder = build_encoder("vit_base_patch16_siglip_224", image_size=32, sizes=TIMM_SIZES)
    assert not any(name.startswith(("attn_pool", "fc_norm", "head")) for name in encoder.state_dict())
    encoder(draw(1, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_published_timm_weights_are_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched here: timm is asked for its pretrained model of 224 pixels, which then fits 64."""
    create, asked = timm.create_model, []

    def recorded(name: str, *, pretrained: bool, **settings: Any) -> torch.nn.Module:
        asked.append((name, pretrained))
        return create(name, pretrained=False, **settings)

    monkeypatch.setattr(timm, "create_model", recorded)
    monkeypatch.setattr("lavis_lite.common.sources.reach.hub_problem", lambda: None)
    encoder = build_encoder(TIMM, image_size=64)
    encoder.load_state_dict(encoder.adapt_state_dict(dict(open_state(f"timm:{TIMM}.augreg_in21k"))))
    assert asked == [(TIMM, False), (f"{TIMM}.augreg_in21k", True)]
    with pytest.raises(ValueError, match="vit_base_patch32_plus_256"):
        open_state("timm:vit_base_patch32_plus_256")


def test_layer_scales_by_hand() -> None:
    """Depth 2, decay 0.5: embeddings 1/8, first block 1/4, last block 1/2."""
    expected = {
        "eva_tiny": {"cls_token": 0.125, "pos_embed": 0.125, "patch_embed.proj.bias": 0.125},
        "clip_tiny": {"class_embedding": 0.125, "positional_embedding": 0.125, "conv1.weight": 0.125},
        TIMM: {"cls_token": 0.125, "patch_embed.proj.bias": 0.125},
    }
    expected["eva_tiny"] |= {"blocks.0.attn.q_bias": 0.25, "blocks.1.mlp.fc2.bias": 0.5}
    expected["clip_tiny"] |= {"ln_pre.bias": 0.125}
    expected["clip_tiny"] |= {"transformer.resblocks.0.ln_1.bias": 0.25, "transformer.resblocks.1.ln_2.bias": 0.5}
    expected[TIMM] |= {"blocks.0.norm1.bias": 0.25, "blocks.1.norm1.bias": 0.5}
    for name, scales in expected.items():
        encoder = build_encoder(name, image_size=48, sizes={"depth": 2, "patch_size": 12})
        assert {key: encoder.layer_scale(key, 0.5) for key in scales} == scales
        assert all(0.125 <= encoder.layer_scale(key, 0.5) <= 0.5 for key, _ in encoder.named_parameters())
    blip = build_encoder("blip_tiny", image_size=48)
    assert [blip.layer_scale(key, 0.5) for key in ("blocks.2.norm1.bias", "norm.bias")] == [0.5, 1.0]


@pytest.mark.parametrize("name", ["eva_tiny", "clip_tiny", "blip_tiny", TIMM])
def test_drop_path_grows_with_depth(name: str) -> None:
    encoder = build_encoder(name, image_size=48, drop_path_rate=0.2, sizes={"depth": 3, "patch_size": 12})
    part = "drop_path" if name == "clip_tiny" else "drop_path1"
    rates = [getattr(getattr(block, part), "drop_prob", 0.0) for block in encoder.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_low_precision() -> None:
    for name in ("eva_tiny", "clip_tiny", "blip_tiny", TIMM):
        encoder = build_encoder(name, image_size=48, sizes={"patch_size": 12}).eval()
        image = draw(1, 3, 48, 48)
        expected = encoder(image)
        found = encoder.to(torch.bfloat16)(image.bfloat16())
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


def test_names() -> None:
    assert ENCODERS.keys() >= {"eva_clip_g", "clip_L", "eva_tiny", "clip_tiny", "blip_tiny", "blip_base", "blip_large"}
    assert PUBLISHED.keys() <= ENCODERS.keys()
    assert type(build_encoder("blip_tiny", image_size=48)) is BlipViT


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("eva_clip_G", {}, "'eva_clip_G'.* 'eva_clip_g'"),
        ("vit_base_patch14_dino2", {}, "'vit_base_patch14_dinov2'"),
        (f"{TIMM}.augreg_in21", {}, f"'{TIMM}.augreg_in21k'"),
        ("eva_tiny", {"sizes": {"widht": 3}}, r"model\.vit: .*widht.* width"),
        ("eva_tiny", {"image_size": 50}, r"model\.vit\.patch_size: .*50.*12"),
        ("clip_tiny", {"image_size": 48, "sizes": {"width": 66}}, r"model\.vit\.num_heads: .*66.*4"),
        (TIMM, {"sizes": {"width": 66, "num_heads": 4}}, rf"model\.vit: .*{TIMM}.*66"),
        ("resnet18", {"sizes": {"width": 64}}, r"model\.vit: .*resnet18 .*'embed_dim': 64"),
    ],
)
def test_names_and_sizes_that_do_not_fit_are_errors(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_encoder(name, **settings)


@pytest.mark.parametrize("name", ["eva_tiny", "blip_tiny", TIMM])
def test_the_timm_model_follows_its_wrapper(name: str) -> None:
    """Mode, type and device of both are the same, also of a copy, and parameters that are replaced."""
    encoder = build_encoder(name, image_size=48, sizes={"patch_size": 12})
    for wrapper in (encoder, copy.deepcopy(encoder)):
        wrapper.train()
        assert wrapper.model.training
        wrapper.eval()
        assert not wrapper.model.training
        wrapper.to(torch.bfloat16).load_state_dict(encoder.state_dict(), assign=True)
        wrapper.pos_embed = torch.nn.Parameter(wrapper.pos_embed + 1)
        own, inner = dict(wrapper.named_parameters()), dict(wrapper.model.named_parameters())
        assert own.keys() == inner.keys()
        assert all(own[key] is inner[key] for key in own)


@pytest.mark.parametrize("name", ["eva_tiny", "clip_tiny", "blip_tiny", TIMM])
def test_an_image_of_another_size_is_an_error(name: str) -> None:
    encoder = build_encoder(name, image_size=48, sizes={"patch_size": 12})
    with pytest.raises(ValueError, match=r"image: .*\(1, 3, 96, 96\).*\(B, 3, 48, 48\)"):
        encoder(torch.zeros(1, 3, 96, 96))
