"""Sharded training (`run.parallel: fsdp`) on two gloo processes: the losses, weights and files of DDP.

One launch trains every case by DDP and by FSDP, and resumes each kind's checkpoint as the other. Without dropout and
with captions of equal length, a step's loss is a mean over the samples of the global batch.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import test_distributed
import torch
import yaml
from test_dist import launch
from test_resume_processes import launched

from lavis_lite.common import checkpoint, dist, sharding
from lavis_lite.common.errors import DamagedFileError, InputError
from lavis_lite.common.sharding import check_shardable
from lavis_lite.common.sources.weights import open_state
from lavis_lite.convert.__main__ import run as convert
from lavis_lite.nn.fingerprint import weights_digest
from lavis_lite.runners import jobs

STEPS = 4
MIDDLE = 2
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
BLIP: dict[str, Any] = {"arch": "blip_caption", "med": {**cli_helpers.SIZES["med"], **NO_DROPOUT}}
BLIP |= {key: cli_helpers.SIZES[key] for key in ("model_type", "vit")}
CHECKPOINTED = {**BLIP, "vit_grad_ckpt": True, "vit_ckpt_layer": 1}
OPT: dict[str, Any] = {"arch": "blip2_opt", "model_type": "tiny", "qformer": NO_DROPOUT}
EVALUATED = {"run": {"valid_splits": ["val"], "test_splits": ["test"]}}
CASES: dict[str, dict[str, Any]] = {
    "blip": {"model": CHECKPOINTED, "run": {"grad_clip_norm": 0.1}},
    "blip_tokens": {"model": BLIP, "run": {"accum_grad_iters": 2, "batch_size_train": 1, "loss_average": "tokens"}},
    "opt_frozen": {"model": OPT, **EVALUATED},
    "opt_trained": {"model": {**OPT, "freeze_vit": False, "freeze_llm": False, "use_grad_checkpoint": True}},
    "opt_lora": {"model": {**OPT, "llm_lora": {"r": 2}, "llm_grad_checkpoint": True, "llm_precision": "bf16"}},
}
BF16 = {"blip_bf16": {"model": CHECKPOINTED, "run": {"precision": "bf16"}}}
"""Matrices of the image encoder are gathered in bf16, in which autocast reads them anyway."""
RESUMED = ("blip", "opt_frozen")
PARTED = "blip"
"""Whose checkpoints are also written in parts, aside; its output layer is tied to the embeddings."""
RUN: dict[str, Any] = {**cli_helpers.RUN, "task": "captioning", "metrics": ["cider"], "num_beams": 1, "max_len": 16}
RUN |= {
    "batch_size_train": 2,
    "max_iters": STEPS,
    "checkpoint_every": MIDDLE,
    "keep_checkpoints": 9,
    "weight_decay": 0.0,
}
RUN |= {"valid_splits": [], "test_splits": []}


def recipe(folder: Path, name: str) -> Path:
    """The YAML of a case: four steps of a global batch of four on two processes."""
    folder.mkdir(parents=True, exist_ok=True)
    case = (CASES | BF16)[name]
    run = {**RUN, "output_dir": str(folder / "output"), **case.get("run", {})}
    captions = test_distributed.equal_captions(folder)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"model": case["model"], "datasets": {"caption": captions}, "run": run}))
    return path


@pytest.fixture(scope="module")
def folder(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the launch left: below each case's `output`, the jobs `ddp`, `fsdp` and two that resumed the other kind."""
    folder, commands = tmp_path_factory.mktemp("sharding"), []
    for name in (*CASES, *BF16):
        argv = ["--cfg-path", str(recipe(folder / name, name))]
        sharded = ["--options", "run.parallel=fsdp"]
        middle = {job: folder / name / "output" / job / f"checkpoint_{MIDDLE}.pth" for job in ("ddp", "fsdp")}
        commands.append([*argv, "--job-id", "ddp"])
        commands.append([*argv, "--job-id", "fsdp", *sharded])
        if name in RESUMED:
            commands.append([*argv, "--job-id", "fsdp_from_ddp", "--resume", str(middle["ddp"]), *sharded])
            commands.append([*argv, "--job-id", "ddp_from_fsdp", "--resume", str(middle["fsdp"])])
        if name == PARTED:
            parts = [*sharded, "run.checkpoint=sharded", "run.async_checkpoint=true"]
            commands.append([*argv, "--job-id", "parts", *parts])
            middle["parts"] = folder / name / "output" / "parts" / f"checkpoint_{MIDDLE}.pth"
            commands.append([*argv, "--job-id", "resumed", "--resume", str(middle["parts"]), *parts])
    launched(folder, *commands)
    return folder


def losses(job: Path) -> list[float]:
    return [row["loss"] for row in cli_helpers.steps(job)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_shards_compute_what_whole_models_do(folder: Path, name: str) -> None:
    output = folder / name / "output"
    whole, sharded = losses(output / "ddp"), losses(output / "fsdp")
    assert len(whole) == STEPS
    assert whole[-1] < whole[0]
    assert sharded == pytest.approx(whole, rel=1e-5)
    for job in ("fsdp_from_ddp", "ddp_from_fsdp") if name in RESUMED else ():
        assert losses(output / job) == pytest.approx(whole[MIDDLE:], rel=1e-5)


@pytest.mark.slow
def test_gathering_in_bf16(folder: Path) -> None:
    whole, sharded = (losses(folder / "blip_bf16" / "output" / job) for job in ("ddp", "fsdp"))
    assert sharded == pytest.approx(whole, rel=1e-5)


def body_shards(folder: Path) -> None:
    """Each rank holds half of every parameter, and all of them while it evaluates."""
    model = cli_helpers.build("blip2_opt", freeze_vit=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if not dist.is_main():
        model.query_tokens.data.zero_()  # every rank starts from rank 0's
    units = model.shard_units()
    assert {type(unit.module).__name__ for unit in units} == {"EvaBlock", "OPTDecoderLayer"}
    sharding.shard(model, units, device=torch.device("cpu"), dtype=torch.float32)
    assert all(map(sharding.is_shard, model.parameters()))
    own = sum(sharding.local(parameter).numel() for parameter in model.parameters())
    total = sum(map(torch.numel, before.values()))
    assert own <= 0.52 * total
    with sharding.gathered(model), dist.single_process(), torch.no_grad():
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]), name
        for _ in range(1 + torch.distributed.get_rank()):  # ranks take different numbers of steps
            assert len(model.generate({"image": torch.zeros(1, 3, 48, 48)}, num_beams=1, max_length=9)) == 1
    assert own == sum(sharding.local(parameter).numel() for parameter in model.parameters())
    state = sharding.whole(model.state_dict())
    for name, value in before.items():
        assert torch.equal(state[name], value) if dist.is_main() else not state[name].numel()


@pytest.mark.slow
def test_each_rank_holds_a_part(tmp_path: Path) -> None:
    launch(body_shards, tmp_path, world=2)


@pytest.mark.slow
def test_evaluation_gathers_the_parameters(folder: Path) -> None:
    """An odd number of samples on two ranks; evaluation.json has a digest of whole weights."""
    jobs = [folder / "opt_frozen" / "output" / job for job in ("ddp", "fsdp")]
    assert cli_helpers.metrics(jobs[0], "test") == cli_helpers.metrics(jobs[1], "test")
    captions = [json.loads((job / "result" / "test_captions.json").read_text()) for job in jobs]
    assert captions[0] == captions[1]
    digest = json.loads((jobs[1] / "evaluation.json").read_text())["provenance"]["weights_sha256"]
    assert digest == weights_digest(cli_helpers.weights(jobs[1] / "checkpoint_best.pth"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_checkpoint_files_do_not_tell_how_a_run_was_parallel(folder: Path, name: str) -> None:
    """Same names, order, shapes, types and optimizer state; values up to rounding."""
    first, second = (checkpoint.load(folder / name / "output" / job / "checkpoint_last.pth") for job in ("ddp", "fsdp"))
    assert list(first) == list(second)
    assert list(first["model"]) == list(second["model"])
    assert {type(value) for value in second["model"].values()} == {torch.Tensor}
    for key, value in first["model"].items():
        if not key.endswith((".key.bias", "k_proj.bias")):  # whose gradients are rounding alone
            close = {"rtol": 1e-3, "atol": 1e-4}
            torch.testing.assert_close(second["model"][key], value, **close, msg=lambda m, k=key: f"{k}: {m}")
    assert first["optimizer"]["param_groups"] == second["optimizer"]["param_groups"]
    shapes = [
        {
            number: {key: value.shape for key, value in values.items()}
            for number, values in one["optimizer"]["state"].items()
        }
        for one in (first, second)
    ]
    assert shapes[0] == shapes[1]


def content(path: Path) -> dict[str, Any]:
    """A checkpoint of one file, without its settings."""
    return {key: value for key, value in checkpoint.load(path).items() if key != "config"}


@pytest.mark.slow
def test_parts_make_the_file_that_one_process_writes(folder: Path, tmp_path: Path) -> None:
    """To the bit, tied tensors included, after a resume too; the weights are also read from the parts themselves."""
    output, whole = folder / PARTED / "output", tmp_path / "whole.pth"
    last = output / "parts" / jobs.LAST
    assert len(list(last.parent.glob(f"checkpoint_{STEPS}_*.parts/*.safetensors"))) == 2
    assert len(list(last.parent.glob("*.parts"))) == len(list(last.parent.glob("checkpoint_[0-9]*.pth")))
    assert convert(["consolidate", str(last), str(whole)]) == 0
    expected = content(output / "fsdp" / jobs.LAST)
    cli_helpers.assert_same_state(content(whole), expected)
    joined = checkpoint.load(whole)["model"]
    tied = {name: first for name, first in checkpoint.load(last)["parts"]["tied"].items() if name.startswith("model.")}
    assert tied
    for pair in tied.items():
        assert len({joined[name.removeprefix("model.")].data_ptr() for name in pair}) == 1
    cli_helpers.assert_same_state(dict(open_state(last)), expected["model"])
    assert convert(["consolidate", str(output / "resumed"), str(whole), "--overwrite"]) == 0
    cli_helpers.assert_same_state(content(whole), expected)
    assert convert(["consolidate", str(whole), str(tmp_path / "other.pth")]) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_data")
def test_one_process_resumes_the_parts_of_two(folder: Path) -> None:
    place = folder / PARTED
    flags = ["--resume", str(place / "output" / "parts" / f"checkpoint_{MIDDLE}.pth")]
    options = ["run.parallel=fsdp", "run.checkpoint=sharded", "run.keep_checkpoints=0"]
    assert cli_helpers.train(place / f"{PARTED}.yaml", *options, job="parts_to_one", flags=flags) == 0
    assert cli_helpers.train(place / f"{PARTED}.yaml", *options, flags=[*flags, "--dry-run"]) == 0
    job = place / "output" / "parts_to_one"
    assert losses(job) == pytest.approx(losses(place / "output" / "fsdp")[MIDDLE:], rel=1e-5)
    assert len(list(job.glob("*.parts"))) == 1
    resumed = ["--resume", str(job / jobs.LAST)]
    assert cli_helpers.evaluate(place / f"{PARTED}.yaml", "run.test_splits=[test]", flags=resumed) == 0
    provenance = json.loads((place / "output" / "evaluation" / "evaluation.json").read_text())["provenance"]
    assert provenance["weights_sha256"] == weights_digest(dict(open_state(job / jobs.LAST)))


@pytest.mark.slow
def test_a_lost_or_cut_part_is_found_and_an_older_checkpoint_taken(folder: Path, tmp_path: Path) -> None:
    job = shutil.copytree(folder / PARTED / "output" / "parts", tmp_path / "job")
    last, older = job / jobs.LAST, job / f"checkpoint_{MIDDLE + 1}.pth"
    checkpoint.load(last)
    first, second = sorted(job.glob(f"checkpoint_{STEPS}_*.parts/*"))
    second.write_bytes(second.read_bytes()[:-8])
    with pytest.raises(DamagedFileError, match=rf"{second} fails its checksum"):
        checkpoint.load(last)
    first.unlink()
    with pytest.raises(DamagedFileError, match=rf"{first} is missing"):
        open_state(last)
    assert jobs.newest_checkpoint(tmp_path, job_id="job") == older


@pytest.mark.slow
def test_one_process_has_the_same_losses(folder: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, "blip")
    assert cli_helpers.train(path, "run.batch_size_train=4", "run.parallel=fsdp", job="one") == 0
    assert losses(tmp_path / "output" / "one") == pytest.approx(losses(folder / "blip" / "output" / "fsdp"), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("pretrain", [], ["momentum"]),
        ("retrieval", [], ["momentum"]),
        ("caption", ["run.precision=fp16"], ["fp16", "bf16"]),
        ("caption", ["run.checkpoint=sharded", "run.parallel=ddp"], ["run.checkpoint"]),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    name: str,
    options: list[str],
    words: list[str],
    tmp_path: Path,
    shapes_data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = cli_helpers.project(tmp_path, name)
    assert cli_helpers.train(path, "run.parallel=fsdp", *options, flags=["--dry-run"]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in ["run.parallel: fsdp", *words]), error


def test_a_temperature_and_quantized_weights_are_refused() -> None:
    model = torch.nn.Linear(2, 2)
    check_shardable(model, dtype=torch.float32)
    model.register_parameter("temp", torch.nn.Parameter(torch.tensor(0.07)))
    with pytest.raises(InputError, match="temp"):
        check_shardable(model, dtype=torch.float32)
    quantized = torch.nn.Module()
    quantized.weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="quantiz"):
        check_shardable(quantized, dtype=torch.float32)
    mixed = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16())
    with pytest.raises(InputError, match="bfloat16"):
        check_shardable(mixed, dtype=torch.float32)
