"""The recipes for one card at tiny size: checked by the dry run, trained in 4 bits with adapters, used afterwards."""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import full_size
import pytest
import torch
from cli_helpers import ROOT, log, train
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM

from lavis_lite.cli.main import train_main
from lavis_lite.models import from_pretrained

pytestmark = pytest.mark.skipif(not (find_spec("bitsandbytes") and find_spec("peft")), reason="needs the extras")

WIDE = {
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
}
"""Sizes that bitsandbytes' CPU kernels take."""
LARGE = {
    "opt": {"hidden_size": 2048, "word_embed_proj_dim": 2048, "ffn_dim": 8192},
    "llama": {"hidden_size": 2048, "intermediate_size": 8192, "head_dim": 512},
}
"""Sizes that show in GiB; the dry run allocates nothing."""
RECIPES = {"blip2_captions": ("opt", "opt_model", "caption"), "instructblip_int4": ("llama", "llm_model", "instruct")}


def language_model(folder: Path, family: str) -> Path:
    """A small random language model, as transformers saves it."""
    shutil.copytree(full_size.TINY_HF / family, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = AutoConfig.from_pretrained(full_size.TINY_HF / family, **WIDE[family])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def photos(folder: Path) -> Path:
    """Pictures with captions and instructions, as the recipes ask for them."""
    (folder / "images").mkdir(parents=True)
    records = []
    for number in range(6):
        image = Image.new("RGB", (64, 48), "teal")
        image.putpixel((number, 3), (255, 255, 255))
        image.save(folder / "images" / f"{number}.png")
        text = {"caption": "a red circle", "instruction": "what is it?", "output": "a red circle"}
        records.append({"image": f"{number}.png", **text})
    for split, part in (("train", records[:4]), ("val", records[4:])):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return folder


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[str]]:
    """The recipe's file, and the options that make it small."""
    family, key, dataset = RECIPES[request.param]
    folder = photos(tmp_path / "photos")
    annotations = {split: {"storage": str(folder / f"{split}.jsonl")} for split in ("train", "val")}
    info = {"annotations": annotations, "images": {"storage": str(folder / "images")}}
    return ROOT / f"projects/one_gpu/{request.param}.yaml", [
        f"datasets.{dataset}.build_info={json.dumps(info)}",
        f"model.{key}={language_model(tmp_path / family, family)}",
        *("model.model_type=tiny", "model.vit_precision=fp32", "model.max_txt_len=24"),
        *("run.device=cpu", "run.accum_grad_iters=1", "run.batch_size_train=2", "run.num_workers=0"),
        *("run.max_iters=2", "run.warmup_steps=1", "run.log_freq=1", "run.num_beams=2", "run.max_len=10"),
        f"run.output_dir={tmp_path / 'out'}",
    ]


@pytest.mark.slow
def test_a_dry_run_counts_the_quantized_language_model(
    recipe: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, options = recipe
    large, weights = LARGE[RECIPES[path.stem][0]], []
    for kind in ("null", "int4"):
        more = [*options, f"model.llm_quantization={kind}", f"model.llm={json.dumps(large)}"]
        with pytest.raises(SystemExit) as ended:
            train_main(["--cfg-path", str(path), "--dry-run", "--gpu", "3090", "--options", *more])
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        assert re.search(r"^throughput  RTX 3090: ", printed.out, re.MULTILINE)
        weights.append(float(re.search(r"^memory +weights ([\d.]+) GiB", printed.out, re.MULTILINE)[1]))
    whole, four_bits = weights
    assert whole > 0.15
    assert four_bits < 0.6 * whole


@pytest.mark.slow
def test_it_trains_in_four_bits_and_is_used(recipe: tuple[Path, list[str]]) -> None:
    path, options = recipe
    assert train(path, *options, "model.llm_quantization=int4") == 0
    job = next(path for path in Path(options[-1].partition("=")[2]).iterdir() if path.is_dir())
    losses = [row["loss"] for row in log(job) if "loss" in row]
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)
    model = from_pretrained(job / "checkpoint_best.pth", is_eval=True)
    stored = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.uint8}
    assert any("q_proj" in name for name in stored)
    (text,) = model.generate({"image": torch.zeros(1, 3, 48, 48), "prompt": "a"}, num_beams=2, max_new_tokens=4)
    assert isinstance(text, str)
