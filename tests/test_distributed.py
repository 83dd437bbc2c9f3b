"""Two gloo processes under torchrun: every task trains and evaluates there, and agrees with one process where it must.

One launch does it all, because starting is what takes time: as a script (`torchrun test_distributed.py PLAN`) this file
runs a list of command lines in one process group, and each rank saves its model after training.

What must agree at the same global batch, without dropout: the loss of each step (and so the weights) where it is a mean
over samples, as for VQA, NLVR2 and classification, and for captioning if all texts have the same number of tokens (each
rank averages over its own tokens). Contrastive losses see the rank's own batch and the queue, as in BLIP: they are
compared with one process that is given each rank's half in turn. Drawn negatives are not compared.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import torch
import warm

pytestmark = pytest.mark.slow  # every test waits for a job of two processes
LIMIT = 150  # seconds until a hanging launch fails
STEPS = 3
SAME_LOSSES = ("equal_captions", "vqa_rank", "nlvr", "classification")
TRAINED = ("pretrain", "retrieval", "vqa_generate", *SAME_LOSSES)
ONE_SAMPLE = {"num_test": 1, "gallery_size": 1, "questions_per_image": 1}


def recipe(folder: Path, name: str) -> Path:
    """The YAML of a run without dropout; `equal_captions` are captions of seven words each."""
    folder.mkdir(parents=True, exist_ok=True)
    changes = [cli_helpers.NO_DROPOUT, {"run": {"max_iters": STEPS, "batch_size_eval": 2}}]
    if name == "equal_captions":
        changes += [{"datasets": {"shapes_caption": None, "caption": equal_captions(folder)}}]
        name = "caption"
    if name == "vqa_generate":
        changes += [{"run": {"batch_size_eval": 1}}]  # its decoder sees the padding of a batch, as in BLIP
    return cli_helpers.project(folder, name, *changes)


def equal_captions(folder: Path) -> dict[str, Any]:
    """A captioning set whose texts all have the same number of tokens."""
    colours, shapes = ("red", "blue", "green", "yellow"), ("circle", "square", "star")
    paths = cli_helpers.pictures(folder / "pictures", 12)
    texts = [f"a {colours[i % 4]} {shapes[i % 3]} above a {colours[i % 3]} {shapes[i % 2]}" for i in range(12)]
    records = [
        {"image": path, "caption": text, "image_id": f"bild {i}"}
        for i, (path, text) in enumerate(zip(paths, texts, strict=True))
    ]
    text = {"train": {"name": "blip_caption", "prompt": "a picture of "}, "eval": {"name": "blip_caption"}}
    return cli_helpers.user_set(
        folder, {"train": records, "val": records[:3], "test": records[3:8]}, text_processor=text
    )


class Launch:
    """What the one launch left: `output` on the terminal, exit codes by job, and the folders of its jobs."""

    def __init__(self, folder: Path, output: str) -> None:
        self.folder, self.output = folder, output

    def job(self, name: str, kind: str = "train") -> Path:
        """The folder of a recipe's job."""
        return self.folder / name / "output" / kind

    def codes(self) -> list[list[int]]:
        """The exit codes of the plan's command lines, by rank."""
        return [json.loads((self.folder / f"codes{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def launch(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Runs the plan: train and test every recipe, evaluate on one sample, and one mistake."""
    folder, plan = tmp_path_factory.mktemp("distributed"), []
    for name in TRAINED:
        path = recipe(folder / name, name)
        options = ["run.batch_size_train=2", "run.runner=runner_recorded"]
        plan.append(["train", "--cfg-path", str(path), "--job-id", "train", "--options", *options])
        if name not in ("equal_captions", "classification"):
            (dataset,) = cli_helpers.RECIPES[name]["datasets"]
            one = [f"datasets.{dataset}.{key}={value}" for key, value in ONE_SAMPLE.items()]
            best = folder / name / "output" / "train" / "checkpoint_best.pth"
            argv = ["--cfg-path", str(path), "--checkpoint", str(best), "--job-id", "one", "--options", *one]
            plan.append(["evaluate", *argv])
    plan.append(["train", "--cfg-path", str(path), "--options", "run.max_epochs=3"])
    (folder / "plan.json").write_text(json.dumps(plan))
    settings = {"LAVIS_LITE_DATA": str(shapes_root), "LAVIS_LITE_OFFLINE": "1"}
    process = warm.start(__file__, str(folder / "plan.json"), world=2, **settings)
    return Launch(folder, ended(process)[1])


def ended(process: subprocess.Popen[str] | warm.Warm, *, limit: float = LIMIT) -> tuple[int, str]:
    """Exit code and output of a process, which is killed if it takes too long."""
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes
        raise AssertionError(f"hangs:\n{process.communicate()[0]}") from None
    return process.returncode, output


def test_every_task_ran_on_both_ranks(launch: Launch) -> None:
    assert "Traceback" not in launch.output, launch.output
    for codes in launch.codes():
        assert codes[:-1] == [0] * (len(codes) - 1), launch.output
        assert codes[-1] == 2
    assert launch.output.count("error: ") == 1  # a mistake in a file is told once
    for name in TRAINED:
        assert [row["step"] for row in cli_helpers.steps(launch.job(name))] == [1, 2, 3]


@pytest.mark.parametrize("name", TRAINED)
def test_ranks_end_with_the_same_model(launch: Launch, name: str) -> None:
    first, second = (torch.load(launch.job(name) / f"rank{rank}.pth") for rank in (0, 1))
    cli_helpers.assert_same_state(first, second)
    cli_helpers.assert_same_state(first, cli_helpers.weights(launch.job(name) / "checkpoint_last.pth"))


@pytest.mark.usefixtures("shapes_data")
@pytest.mark.parametrize("name", SAME_LOSSES)
def test_losses_and_weights_equal_one_process(launch: Launch, name: str, tmp_path: Path) -> None:
    assert cli_helpers.train(recipe(tmp_path, name), "run.batch_size_train=4", "run.test_splits=[]") == 0
    alone = tmp_path / "output" / "job"
    losses = [[row["loss"] for row in cli_helpers.steps(job)] for job in (launch.job(name), alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    pair = [cli_helpers.weights(job / "checkpoint_last.pth") for job in (launch.job(name), alone)]
    far = [key for key in pair[0] if not torch.allclose(pair[0][key], pair[1][key], rtol=1e-3, atol=1e-5)]
    # AdamW's first steps are the gradients' signs, so a gradient of 1e-9 shows here. A key's bias raises all scores of
    # a query alike: its gradient is rounding and nothing else, and so is the way it moves.
    assert [key for key in far if not key.endswith(".key.bias")] == []


@pytest.mark.usefixtures("shapes_data")
@pytest.mark.parametrize("name", ["retrieval", "pretrain"])
def test_contrast_and_queues_equal_one_process(launch: Launch, name: str, tmp_path: Path) -> None:
    """The first step: each rank's contrast over its half and the queue; then both halves are in both queues."""
    path = recipe(tmp_path, name)
    assert cli_helpers.train(path, "run.batch_size_train=4", "run.max_iters=1", "run.test_splits=[]") == 0
    halves = [first_losses(path, half=half)["loss_itc"] for half in (0, 1)]
    assert cli_helpers.steps(launch.job(name))[0]["loss_itc"] == pytest.approx(sum(halves).item() / 2, rel=1e-5)
    joined = cli_helpers.weights(tmp_path / "output" / "job" / "checkpoint_last.pth")
    shared = torch.load(launch.job(name) / "rank1.pth")
    assert shared["queue_ptr"].tolist() == [4 * STEPS]
    for queue in [key for key in joined if key.endswith("_queue")]:
        torch.testing.assert_close(shared[queue][:, :4], joined[queue][:, :4], rtol=0, atol=1e-5)
        untouched = slice(4 * STEPS, None)
        assert torch.equal(shared[queue][:, untouched], joined[queue][:, untouched])
    assert not torch.equal(shared["image_queue"][:, 4:12], joined["image_queue"][:, 4:12])


def first_losses(path: Path, *, half: int) -> dict[str, torch.Tensor]:
    """The losses of one rank's half of the first batch of four, by a fresh model in this process."""
    from lavis_lite.common.config.config import Config
    from lavis_lite.common.registry import registry
    from lavis_lite.common.rng import seed_everything
    from lavis_lite.runners.loaders import TrainLoader, train_sets

    cfg = Config.from_file(path, ["run.batch_size_train=4"])
    task = registry.get_task_class(cfg.run.task)(**cfg.task)
    samples = next(iter(TrainLoader(train_sets(task.build_datasets(cfg), ["train"]), cfg.run)))
    seed_everything(cfg.run.seed)
    model = task.build_model(cfg).train()
    part = {key: value[2 * half : 2 * half + 2] for key, value in samples.items()}
    return model({**part, "epoch": 0, "iters": 0, "num_iters_per_epoch": 6})


@pytest.mark.usefixtures("shapes_data")
@pytest.mark.parametrize("name", [name for name in TRAINED if name != "pretrain"])
def test_evaluation_equals_one_process(launch: Launch, name: str, tmp_path: Path) -> None:
    """An odd number of samples on two ranks; pretraining is left out, since its losses depend on the batch."""
    best = launch.job(name) / "checkpoint_best.pth"
    assert cli_helpers.evaluate(recipe(tmp_path, name), weights=best) == 0
    job = tmp_path / "output" / "evaluation"
    assert cli_helpers.metrics(launch.job(name), "test") == cli_helpers.metrics(job, "test")
    for file in (job / "result").iterdir():
        theirs, own = (
            json.loads((folder / file.name).read_text()) for folder in (launch.job(name) / "result", file.parent)
        )
        if name == "retrieval":  # features differ in the last bits by the size of the batch
            for key in [key for key in own if key.endswith("_scores")]:
                torch.testing.assert_close(torch.tensor(theirs.pop(key)), torch.tensor(own.pop(key)), atol=2e-6, rtol=0)
        assert theirs == own


@pytest.mark.parametrize("name", [n for n in TRAINED if n not in ("equal_captions", "classification")])
def test_one_sample_on_two_ranks(launch: Launch, name: str) -> None:
    metrics = cli_helpers.metrics(launch.job(name, "one"), "test")
    assert isinstance(metrics["agg_metrics"], float)
    if name == "retrieval":
        assert metrics["txt_r1"] == metrics["img_r1"] == 100.0


@pytest.mark.usefixtures("shapes_data")
def test_an_error_on_one_rank_ends_all(tmp_path: Path) -> None:
    """Of two training pictures one is missing, so just one rank fails while the other waits for its gradients."""
    there, _ = cli_helpers.pictures(tmp_path / "pictures", 2)
    missing = str(tmp_path / "gone.png")
    records = [{"image": image, "caption": "a red circle"} for image in (there, missing)]
    section = cli_helpers.user_set(tmp_path, {"train": records})
    run = {"batch_size_train": 1, "max_iters": 1, "valid_splits": [], "test_splits": []}
    path = cli_helpers.project(
        tmp_path, "caption", {"datasets": {"shapes_caption": None, "caption": section}, "run": run}
    )
    code, output = ended(cli_helpers.process("train.py", "--cfg-path", str(path), world=2))
    assert code != 0
    assert f"error: image file not found: {missing}" in output
    assert not list(tmp_path.rglob("checkpoint*"))


@pytest.mark.usefixtures("shapes_data")
def test_a_missing_file_is_told_without_traceback(tmp_path: Path) -> None:
    """Rank 0 looks for files first; the others wait for it, and end when it fails."""
    section = cli_helpers.user_set(tmp_path, {"train": [{"image": "a.png", "caption": "a red circle"}]})
    run = {"valid_splits": [], "test_splits": []}
    path = cli_helpers.project(
        tmp_path, "caption", {"datasets": {"shapes_caption": None, "caption": section}, "run": run}
    )
    (tmp_path / "train.json").unlink()
    code, output = ended(cli_helpers.process("train.py", "--cfg-path", str(path), world=2))
    assert code != 0
    ours = output.split("torch/distributed/elastic")[0]  # torchrun's own report follows
    assert ours.count("error: ") == 1
    assert f"annotation file not found: {tmp_path / 'train.json'}" in ours
    assert "Traceback" not in ours


def main(plan: Sequence[Sequence[str]], folder: Path) -> None:
    """Each rank's part: the plan's command lines in one process group."""
    from lavis_lite.cli import main as cli
    from lavis_lite.common import dist
    from lavis_lite.common.registry import registry
    from lavis_lite.runners.runner import Runner

    @registry.register_runner("runner_recorded")
    class Recorded(Runner):
        """Saves every rank's model after training."""

        def train(self) -> dict[str, Any]:
            self.run.test_splits, splits = [], self.run.test_splits
            super().train()
            torch.save(self.model.state_dict(), self.job_dir / f"rank{dist.rank()}.pth")
            self._load_best()
            return {"test": self.evaluate(splits)}

    dist.init("cpu")
    shutdown, dist.shutdown = dist.shutdown, lambda: None  # a door leaves the group at its end
    codes = []
    for door, *argv in plan:
        enter = {"train": cli.train_main, "evaluate": cli.evaluate_main}[door]
        try:
            enter(argv)
        except SystemExit as end:
            codes.append(end.code)
    (folder / f"codes{dist.rank()}.json").write_text(json.dumps(codes))
    shutdown()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).parent)
