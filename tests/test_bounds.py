"""Numbers that make no sense are refused by a line that names the key, before torch meets them."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lavis_lite.cli.dry_run import build_without_weights
from lavis_lite.cli.main import main
from lavis_lite.common.config.config import parser
from lavis_lite.common.config.files import Layer
from lavis_lite.common.config.schema import Checker
from lavis_lite.common.config.sections import model_arguments
from lavis_lite.common.config.zoo import model_zoo
from lavis_lite.common.errors import InputError, UserError
from lavis_lite.common.registry import registry
from lavis_lite.common.video_io import check_num_frames
from lavis_lite.models import load_model
from lavis_lite.models.base import BaseModel
from lavis_lite.models.reranking import similarity_matrices
from lavis_lite.nn.attention import BertConfig
from lavis_lite.nn.encoders import build_encoder
from lavis_lite.nn.qformer import QFormerConfig
from lavis_lite.nn.vision import SIZE_BOUNDS, ViTConfig
from lavis_lite.processors import load_processor
from lavis_lite.tasks.retrieval import RetrievalTask

NONSENSE = (-1, 0, 1, 10**9, 1e15, 1e308, -1e308, float("nan"), "text", [], {}, None, True)
LLM_SIZES = {
    "opt": ("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim", "dropout", "max_position_embeddings"),
    "t5": ("d_model", "num_layers", "num_heads", "d_kv", "d_ff", "vocab_size", "dropout_rate"),
    "vicuna": ("hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size", "rms_norm_eps"),
}


def tiny_types() -> list[str]:
    return [arch for arch in model_zoo.names() if "tiny" in model_zoo.types(arch)]


@cache
def section_of(arch: str) -> dict[str, Any]:
    """The tiny type with one layer in each part, which is built faster."""
    section = yaml.safe_load(model_zoo.path(arch, "tiny").read_text())["model"]
    for part in ("med", "qformer"):
        if part in section:
            section[part]["num_layers"] = 1
    return section | {"vit": {"depth": 1}}


def defining_class(arch: str, key: str) -> str:
    """The class whose constructor takes the key: what it does with it is the same in all that derive from it."""
    owners = (c for c in registry.get_model_class(arch).__mro__ if "__init__" in vars(c))
    return next(c.__name__ for c in owners if key in inspect.signature(c.__init__).parameters)


def keys_of(arch: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The keys of a `model` section, and of the sizes in it, each with where it is read."""
    own = list(inspect.signature(registry.get_model_class(arch)).parameters)
    for key in own:
        yield defining_class(arch, key), (key,)
    if "med" in own:
        yield from (("med", ("med", field.name)) for field in fields(BertConfig))
        yield from (("vit", ("vit", field.name)) for field in fields(ViTConfig))
    else:
        yield from (("qformer", ("qformer", field.name)) for field in fields(QFormerConfig))
        yield from (("encoder", ("vit", key)) for key in SIZE_BOUNDS)
    family = arch.split("_")[1] if "_" in arch else ""
    yield from ((family, ("llm", key)) for key in LLM_SIZES.get(family, ()) if "llm" in own)


def build(section: dict[str, Any]) -> BaseModel:
    """As a dry run does."""
    return build_without_weights(model_arguments(section, Checker([Layer("a.yaml", {"model": section})])))


def with_value(arch: str, path: tuple[str, ...], value: Any) -> dict[str, Any]:
    section = section_of(arch)
    if len(path) == 1:
        return section | {path[0]: value}
    return section | {path[0]: (section.get(path[0]) or {}) | {path[1]: value}}


def says(message: str, expected: str) -> bool:
    """Whether a message has the expected key and values, which ` ... ` separates, in this order."""
    return re.search(".*".join(map(re.escape, expected.split(" ... "))), message) is not None


@pytest.mark.slow
def test_every_key_of_every_tiny_type_takes_nonsense_or_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that several architectures inherit gets all values in one of them, and one value in each of the others; a
    size of their common parts gets its values in one of them.
    """
    monkeypatch.setenv("LAVIS_LITE_OFFLINE", "1")  # "text" may be a hub id
    seen, turn, num_refused, num_built = set(), count(), 0, 0
    for arch in tiny_types():
        for owner, path in keys_of(arch):
            is_known = (owner, path) in seen
            if is_known and len(path) > 1:
                continue
            values = [NONSENSE[next(turn) % len(NONSENSE)]] if is_known else NONSENSE
            seen.add((owner, path))
            for value in values:
                try:
                    model = build(with_value(arch, path, value))
                except UserError:
                    num_refused += 1
                except Exception as error:
                    pytest.fail(f"{arch}: {'.'.join(path)}={value!r}: {type(error).__name__}: {error}")
                else:
                    assert next(model.parameters()).is_meta
                    num_built += 1
    assert num_refused > 500
    assert num_built > 100


@pytest.mark.parametrize(
    ("arch", "settings", "message"),
    [
        ("blip_caption", {"image_size": 1e15}, "model.image_size: ... 1 to 4,096 ... got "),
        ("blip_caption", {"image_size": 4}, "model.vit.patch_size: image_size 4 is not a multiple of patch_size 8"),
        ("blip_caption", {"max_txt_len": 0}, "model.max_txt_len: ... 3 to 100,000 ... got 0"),
        ("blip_caption", {"vit": {"depth": -1}}, "model.vit.depth: ... 1 to 512 ... got -1"),
        (
            "blip_caption",
            {"vit": {"mlp_ratio": "4"}},
            "model.vit.mlp_ratio: ... 0.01 to 100.0 ... got '4'",
        ),
        ("blip_caption", {"vit": {"num_checkpointed": 1}}, "model.vit.num_checkpointed: set model.vit_grad_ckpt and "),
        ("blip_caption", {"med": {"num_heads": 0}}, "model.med.num_heads: ... 1 to "),
        (
            "blip_caption",
            {"med": {"num_heads": 5}},
            "model.med.num_heads: hidden_size 768 is not a multiple of num_hea",
        ),
        (
            "blip_caption",
            {"med": {"hidden_dropout": 1.5}},
            "model.med.hidden_dropout: ... 0.0 to 1.0",
        ),
        ("blip_caption", {"med": {"vocab_size": 5}}, "model.med.vocab_size: ... "),
        ("blip_nlvr", {"num_classes": -1}, "model.num_classes: ... 1 to 65,536 ... got -1"),
        (
            "blip_classification",
            {"num_classes": 3, "alpha": 2.0},
            "model.alpha: ... 0.0 to 1.0 ... got 2",
        ),
        ("blip_retrieval", {"queue_size": -1}, "model.queue_size: ... 0 to 10,000,000 ... got -1"),
        ("blip_retrieval", {"queue_size": 10**15}, "model.queue_size: ... 0 to "),
        ("blip_retrieval", {"momentum": 1.5}, "model.momentum: ... 0.0 to 1.0 ... got 1.5"),
        ("blip_retrieval", {"embed_dim": -1}, "model.embed_dim: ... 1 to 65,536 ... got -1"),
        (
            "blip2",
            {"cross_attention_freq": 0},
            "model.cross_attention_freq: ... 1 to 512 ... got 0",
        ),
        (
            "blip2",
            {"qformer": {"num_layers": -1}},
            "model.qformer.num_layers: ... 1 to 512 ... got ",
        ),
        ("blip2", {"num_query_token": 0}, "model.num_query_token: ... 1 to 100,000 ... got 0"),
        ("blip2", {"embed_dim": 1e308}, "model.embed_dim: ... 1 to 65,536 ... got 1e+308"),
        (
            "blip2_opt",
            {"llm": {"num_hidden_layers": -1}},
            "model.llm.num_hidden_layers: ... 1 to ",
        ),
        ("blip2_opt", {"llm": {"dropout": 2.0}}, "model.llm.dropout: ... 0.0 to 1.0 ... got 2.0"),
        (
            "blip2_opt",
            {"llm": {"num_attention_heads": 5}},
            "model.llm: the language model cannot be built with num_attent",
        ),
        ("blip2_opt", {"llm_lora": {"r": 10**15}}, "model.llm_lora.r: ... 1 to 65,536 ... got "),
        (
            "blip2_opt",
            {"max_output_txt_len": 0},
            "model.max_output_txt_len: ... 1 to 100,000",
        ),
    ],
)
def test_a_constructor_names_the_key_and_what_it_takes(arch: str, settings: dict[str, Any], message: str) -> None:
    tiny = (
        {"vit_type": "tiny"} if arch in ("blip_caption", "blip_nlvr", "blip_classification", "blip_retrieval") else {}
    )
    if arch.startswith("blip2"):
        tiny = {"vit_model": "eva_tiny", "vit_weights": "random"} | ({"opt_model": "tiny_opt"} if "opt" in arch else {})
    with pytest.raises(InputError) as caught, torch.device("meta"):
        registry.get_model_class(arch)(**{"tokenizer": "shapes", "image_size": 48} | tiny | settings)
    assert says(str(caught.value), message)


def test_sizes_that_are_allowed_at_their_edges_are_built() -> None:
    """0 and 1 are shares, 0 is contrast within the batch, and one layer, head or query is a model."""
    tiny = section_of("blip_retrieval")
    build(tiny | {"queue_size": 0, "momentum": 0.0, "alpha": 1.0, "embed_dim": 1, "max_txt_len": 3})
    build(section_of("blip2") | {"num_query_token": 1, "cross_attention_freq": 1, "drop_path_rate": 1.0})
    assert build(section_of("blip2_opt") | {"llm": {"do_layer_norm_before": False}}).lm.model.config.dropout == 0.0


def test_a_timm_encoder_takes_a_size_for_each_stage_and_refuses_nonsense() -> None:
    with torch.device("meta"):
        assert build_encoder("swin_tiny_patch4_window7_224", sizes={"num_heads": [3, 6, 12, 24]}).width == 768
        for key, value in (("num_heads", [3, 0, 12, 24]), ("width", 1e15), ("norm_eps", "small")):
            with pytest.raises(InputError, match=f"model.vit.{key}: must be a"):
                build_encoder("swin_tiny_patch4_window7_224", sizes={key: value})
        with pytest.raises(InputError, match="timm's vit_tiny_patch16_224 cannot be built"):
            build_encoder("vit_tiny_patch16_224", sizes={"num_heads": 7})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.med.num_heads=0", "model.med.num_heads: ... 1 to "),
        ("model.image_size=1e15", "model.image_size: ... 1 to 4,096 ... got "),
        ("model.max_txt_len=-3", "model.max_txt_len: ... 3 to 100,000 ... got -3"),
        (
            "model.image_size=1e308",
            "model.image_size: ... 9,007,199,254,740,992 ... got 1e+308",
        ),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_the_command_line_shows_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, message: str, flags: tuple[str, ...]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "model: {arch: blip_caption, model_type: tiny}\n"
        "datasets: {shapes_caption: {num_train: 8, num_val: 2, num_test: 2}}\n"
        f"run: {{task: captioning, output_dir: {tmp_path}, num_workers: 0}}\n"
    )
    assert main(parser(), ["--cfg-path", str(path), "--options", option, *flags]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert says(line, message.removeprefix("model."))


@pytest.mark.parametrize("size", [0, -1, 10**9, 1e308, "384", None])
@pytest.mark.parametrize("name", ["blip_image_train", "blip_image_eval", "blip2_image_train", "blip_video_eval"])
def test_a_processor_refuses_an_image_size_that_no_model_has(name: str, size: Any) -> None:
    with pytest.raises(InputError, match=r"image_size: (expected|must be) a whole number.*got "):
        load_processor(name, {"image_size": size})


def test_frames_and_candidates_have_bounds() -> None:
    for value in (0, -1, 1e308, float("nan"), "4", True):
        with pytest.raises(InputError, match=r"num_frames:.*1 to 10,000.*got "):
            check_num_frames(value)
    for value in (-1, 1e308, "all"):
        with pytest.raises(InputError, match=r"run\.k_test:.*0 to 1,000,000,000.*got "):
            RetrievalTask(k_test=value)
        with pytest.raises(InputError, match=r"^k_test:.*0 to 1,000,000,000.*got "):
            similarity_matrices(None, None, value)
    assert RetrievalTask(k_test=10**6).k_test == 10**6  # more than the gallery has: all are ranked


def test_python_gets_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"model\.med\.num_layers:.*1 to 512.*got -2"):
        load_model("blip_caption", "tiny", med={"num_layers": -2})
