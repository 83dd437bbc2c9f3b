"""benchmarks/throughput.py at tiny sizes: it runs, both sides of a row do the same work, and operations are counted
right (against torch's counter of what was executed, and the figures derived from the published sizes). No timing.
"""

import importlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lavis_lite.cli.throughput import sample_flops
from lavis_lite.nn.losses import IGNORED

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture(scope="module")
def throughput() -> Iterator[ModuleType]:
    """The script, imported as it is run: with its folder on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("throughput")


@pytest.mark.slow
def test_blip_is_measured(throughput: ModuleType, capsys: pytest.CaptureFixture[str]):
    """One layer deep, at the base model's widths: each row has its name and what it is compared with."""
    importlib.import_module("blip").main(["--depth", "1", "--image-size", "32", "--batch", "2", "--repeats", "1"])
    rows = capsys.readouterr().out.splitlines()[1:]
    names = ("captioning, forward", "captions, 3 beams", "re-ranking 64 texts", "ranking 128", "momentum update")
    assert [row.startswith(name) for row, name in zip(rows, names, strict=True)] == [True] * 5
    others = ("transformers", "transformers", "image repeated", "padded", "one by one")
    assert [row.endswith(other) for row, other in zip(rows, others, strict=True)] == [True] * 5


@pytest.fixture
def blip2(throughput: ModuleType) -> ModuleType:
    """What the script measures."""
    return sys.modules[throughput.all_jobs.__module__]


@pytest.fixture
def flops(blip2: ModuleType) -> ModuleType:
    return blip2.flops


@pytest.fixture
def comparable(blip2: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing random, and the one epsilon that transformers has for all norms of the image encoder."""
    monkeypatch.setitem(blip2.TINY, "qformer", blip2.TINY["qformer"] | NO_DROPOUT)
    build = blip2.build

    def build_with_its_epsilon(*args: Any, **kwargs: Any) -> Any:
        model = build(*args, **kwargs)
        model.ln_vision.eps = 1e-6
        return model

    monkeypatch.setattr(blip2, "build", build_with_its_epsilon)
    torch.manual_seed(0)


def jobs(throughput: ModuleType, *argv: str) -> Iterator[Any]:
    """The jobs of a command line."""
    return throughput.all_jobs(throughput.parse(["--device", "cpu", "--tiny", "--tokens", "6", *argv]))


@pytest.mark.slow
def test_every_row_is_measured_and_reported(throughput: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "rows.json"
    command = ["--device", "cpu", "--tiny", "--repeats", "1", "--tokens", "4", "--peak-tflops", "1", "--dtype", "bf16"]
    throughput.main([*command, "--json", str(file)])
    report = json.loads(file.read_text())
    printed = capsys.readouterr().out
    names = [row["what"] for row in report["rows"]]
    assert len(names) == 8
    for row in report["rows"]:
        assert row["what"] in printed
        assert row["per_second"] > 0
        assert row["ratio"] > 0
        assert row["peak_gib"] is None  # there is no GPU
        is_step = "training step" in row["what"]
        assert (row["loss"] is not None) == is_step
        assert (row["mfu"] is not None) == (is_step or row["what"] == "image encoder")
        if row["mfu"] is not None:
            assert row["mfu"] == pytest.approx(row["gflop"] * row["per_second"] / 1e3)
    assert report["settings"]["dtype"] == "bf16"
    assert report["process_peak_gib"] > 0


@pytest.mark.usefixtures("comparable")
def test_stage_1_recomputed_is_the_same(throughput: ModuleType, blip2: ModuleType):
    model = blip2.build("blip2", throughput.parse(["--device", "cpu", "--tiny"])).train()
    samples = {"image": torch.randn(4, 3, 48, 48), "text_input": ["a red circle", "two shapes", "a", "a blue square"]}
    losses = []
    for side in (model, blip2.recomputing(model)):
        torch.manual_seed(1)  # the same negatives
        losses.append(blip2.loss_of(side, samples))
    torch.testing.assert_close(*losses)


@pytest.mark.usefixtures("comparable")
def test_encoders_and_rerankings_give_the_same(throughput: ModuleType):
    encoder, _, reranking = jobs(throughput, "--parts", "stage1")
    for job in (encoder, reranking):
        job.ours()
        job.theirs()
    torch.testing.assert_close(encoder.ours.result, encoder.theirs.result.last_hidden_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reranking.ours.result, reranking.theirs.result)


@pytest.mark.usefixtures("comparable")
@pytest.mark.parametrize("part", ["opt", "t5"])
def test_second_stages_are_trained_and_caption_alike(throughput: ModuleType, part: str):
    steps, captions, *beams = jobs(throughput, "--parts", part)
    for _ in range(2):  # the second loss is that of weights which the first step moved
        steps.ours()
        steps.theirs()
        assert steps.ours.loss == pytest.approx(steps.theirs.loss, rel=1e-5)
    for job in (captions, *beams):
        job.ours()
        job.theirs()
    assert all(captions.ours.result)
    assert captions.ours.result == [text.strip() for text in captions.theirs.result]
    assert len(beams) == (part == "opt")
    for job in beams:
        assert torch.equal(job.ours.result.ids, job.theirs.result.ids)
        assert job.ours.result.ids.shape == (2, 7)  # the start and the six that were asked for


def test_a_step_moves_only_what_is_trained(throughput: ModuleType):
    steps = next(jobs(throughput, "--parts", "opt"))
    for side in (steps.ours, steps.theirs):
        before = {name: tensor.clone() for name, tensor in side.model.named_parameters()}
        side()
        moved = {name.split(".")[0] for name, tensor in side.model.named_parameters() if not tensor.equal(before[name])}
        frozen = {name for name, tensor in side.model.named_parameters() if not tensor.requires_grad}
        assert moved >= {"query_tokens"}
        assert len(moved) == 4  # queries, Q-Former, projection, the norm behind the image encoder
        assert all(tensor.equal(before[name]) for name, tensor in side.model.named_parameters() if name in frozen)


def counted(function: Callable[[], Any]) -> int:
    """Floating-point operations that torch executes, with attention as matrix products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.fixture
def wide(throughput: ModuleType, blip2: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """Settings of a Q-Former that is wide enough for what is left out of the count to be small."""
    sizes = {"hidden_size": 128, "num_layers": 4, "num_heads": 2, "intermediate_size": 512}
    monkeypatch.setitem(blip2.TINY, "qformer", sizes)
    return throughput.parse(["--device", "cpu", "--tiny", "--batch", "4", "--depth", "6"])


def test_operations_of_the_image_encoder_are_those_executed(blip2: ModuleType, flops: ModuleType, wide: Namespace):
    encoder = blip2.build("blip2", wide).visual_encoder
    assert counted(lambda: encoder(torch.randn(1, 3, 48, 48))) == flops.image_encoder(encoder).forward


def test_operations_of_stage_1_are_those_executed(blip2: ModuleType, flops: ModuleType, wide: Namespace):
    model, texts = blip2.build("blip2", wide), blip2.synthetic_texts(wide)
    samples = {"image": torch.randn(4, 3, 48, 48), "text_input": texts}
    found = counted(lambda: blip2.loss_of(model, samples).backward()) / 4
    num_text = model.tokenize(texts)[0].shape[1]
    assert flops.stage1_step(model, num_text) == pytest.approx(found, rel=0.001)


@pytest.mark.parametrize("part", ["opt", "t5"])
def test_operations_of_stage_2_are_those_executed(blip2: ModuleType, flops: ModuleType, wide: Namespace, part: str):
    model = blip2.build_with_llm(part, wide)
    hf = blip2.build_hf(model, f"blip2_{part}")
    image = torch.randn(4, 3, 48, 48)
    samples, inputs = blip2.stage2_inputs(model, hf, image, blip2.synthetic_texts(wide))
    found = counted(lambda: blip2.loss_of(model, samples).backward()) / 4
    num_text = inputs["input_ids"].shape[1] - 32
    num_labels = num_text if part == "opt" else inputs["labels"].shape[1]
    assert flops.stage2_step(model, num_text, num_labels) == pytest.approx(found, rel=0.005)


def test_operations_at_full_size_are_the_derived_ones(throughput: ModuleType, blip2: ModuleType, flops: ModuleType):
    full = throughput.parse(["--device", "cpu", "--dtype", "fp32"])
    full.device, full.depth = "meta", None
    stage1, stage2 = blip2.build("blip2", full), blip2.build_with_llm("opt", full)
    assert flops.image_encoder(stage1.visual_encoder).forward / 1e9 == pytest.approx(521, abs=1)
    recomputed = 3 * flops.image_context(stage1.Qformer, 257).trained  # LAVIS projects an image four times
    assert (flops.stage1_step(stage1, 32) + recomputed) / 1e9 == pytest.approx(760, abs=5)
    assert flops.stage2_step(stage2, 14, 45) / 1e9 == pytest.approx(1050, abs=10)


@pytest.mark.slow
def test_the_dry_run_counts_the_operations_that_the_formula_derives(
    throughput: ModuleType, blip2: ModuleType, flops: ModuleType
):
    """At full size, for one text; two equal samples are counted, whose contrast and negatives cost next to nothing."""
    full = throughput.parse(["--device", "cpu", "--dtype", "fp32"])
    full.device, full.depth = "meta", None
    text = blip2.synthetic_texts(full)[:1]
    batch = {"image": torch.empty(1, 3, 224, 224, device="meta"), "text_input": text}
    stage1 = blip2.build("blip2", full)
    found = sample_flops(stage1, batch)
    assert found == pytest.approx(flops.stage1_step(stage1, stage1.tokenize(text)[0].shape[1]), rel=0.005)
    stage2 = blip2.build_with_llm("opt", full)
    read = stage2.llm_tokenizer.caption_batch(text, stage2.prompt)
    found = sample_flops(stage2, batch)
    num_labels = int((read.labels != IGNORED).sum())
    assert found == pytest.approx(flops.stage2_step(stage2, read.ids.shape[1], num_labels), rel=0.005)


@pytest.mark.parametrize("setting", [["--batch", "1"], ["--words", "1"]])
def test_what_cannot_be_measured_is_refused(
    throughput: ModuleType, setting: list[str], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        throughput.parse(setting)
    assert "must be at least 2" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_is_measured_on_a_gpu(throughput: ModuleType):
    for job in throughput.all_jobs(throughput.parse(["--device", "cuda", "--tiny", "--tokens", "4"])):
        row = throughput.measure(job, repeats=1, peak_tflops=100.0)
        assert 0 < row.peak_gib < 8
        assert 0 < row.other_peak_gib < 8


def test_a_loss_that_is_not_finite_ends_the_run(throughput: ModuleType):
    steps = next(jobs(throughput, "--parts", "opt"))
    with torch.no_grad():
        steps.ours.model.query_tokens.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"stage 2 tiny_opt, training step.*nan"):
        throughput.measure(steps, repeats=1, peak_tflops=None)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA RTX A6000", 155.0),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_are_known_by_name(throughput: ModuleType, name: str, peak: float | None):
    assert throughput.known_peak(name) == peak


@pytest.mark.slow
def test_sources_are_measured(
    throughput: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Files, tables and shards, and open_clip's pipeline where it is installed: each row has its time and ratios."""
    pytest.importorskip("datasets")
    pytest.importorskip("webdataset")
    monkeypatch.setenv("LAVIS_LITE_CACHE", "")  # the script sets it; this restores it
    script = importlib.import_module("data_sources")
    names = [name for name in script.SOURCES if name != "open_clip" or find_spec("open_clip_train")]
    script.main(["--tiny", "--json", str(tmp_path / "rows.json"), "--sources", *names])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["source"] for row in rows] == names
    assert all(row["images_per_second"] > 0 and row["cpu_ms_per_image"] >= 0 for row in rows)
    assert rows[0]["ratios"] == [1.0]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-len(names) :]] == names


@pytest.mark.slow
def test_the_suite_fails_where_a_ratio_has_fallen(
    throughput: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """Every part runs at tiny sizes; a ratio that nothing reaches fails, one that everything reaches does not."""
    suite, stored = importlib.import_module("suite"), tmp_path / "ratios.json"
    assert suite.main(["--tiny", "--update", "--repeats", "1", "--stored", str(stored)]) == 0
    ratios = json.loads(stored.read_text())
    assert len(ratios) >= 12
    assert all(ratio > 0 for ratio in ratios.values())
    stored.write_text(json.dumps({"transform: image to tensor": 1e-6, "augment: RandAugment's moves": 1e9}))
    settings = ["--tiny", "--repeats", "1", "--stored", str(stored), "--only"]
    assert suite.main([*settings, "transform"]) == 0
    capsys.readouterr()
    assert suite.main([*settings, "transform", "augment"]) == 1
    printed = capsys.readouterr().out.splitlines()
    (fallen,) = [line for line in printed if "is stored" in line]
    assert fallen.startswith("augment: RandAugment's moves: ")


@pytest.mark.slow
def test_the_script_for_a_gpu_runs(tmp_path: Path):
    """At tiny sizes on the CPU: a check, both tables, and the rows as JSON."""
    script, environment = BENCHMARKS / "gpu.sh", {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(script), str(tmp_path / "gpu"), "--tiny"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 passed" in (tmp_path / "gpu" / "checks.txt").read_text()
    assert len(json.loads((tmp_path / "gpu" / "blip2.json").read_text())["rows"]) == 8
    assert "ranking 128 of 3128 answers" in (tmp_path / "gpu" / "blip.txt").read_text()


@pytest.fixture
def long_run(throughput: ModuleType) -> ModuleType:
    """The script, on the path that `throughput` set."""
    return importlib.import_module("long_run")


def test_growth_is_found(long_run: ModuleType):
    """The first quarter may grow, as may what is within the tolerance."""
    flat = [long_run.Sample(step, 100.0 + min(step, 4) * 50, 20, 5, 3) for step in range(16)]
    assert long_run.growth(flat) == []
    for name, leak in {"mib": 3.0, "files": 1, "threads": 1, "processes": 1}.items():
        grown = [one._replace(**{name: getattr(one, name) + leak * one.step}) for one in flat]
        (found,) = long_run.growth(grown)
        assert found.startswith(f"{name}: "), found


@pytest.mark.slow
def test_a_long_run_is_watched(long_run: ModuleType, capsys: pytest.CaptureFixture[str]):
    code = long_run.main(["--steps", "200", "--every", "10"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    rows = [line for line in lines if line[0].isdigit()]
    assert len(rows) >= 4
    assert all(float(mib.replace(",", "")) > 100 and int(files) > 3 for _, mib, files, *_ in rows)
    assert code == (lines[-1][:2] != ["nothing", "grew"])


def test_too_few_steps_are_refused(long_run: ModuleType, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        long_run.main(["--steps", "10", "--every", "5"])
    assert "at least 4 times" in capsys.readouterr().err
