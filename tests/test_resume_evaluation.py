"""An evaluation that was interrupted continues after its last batch, and ends as an uninterrupted one, bit for bit."""

import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cli_helpers
import pytest
import test_distributed
import torch
import warm
from torch import nn

from lavis_lite.common.partial import PartialFile
from lavis_lite.common.registry import registry
from lavis_lite.nn.fingerprint import weights_digest
from lavis_lite.runners.loaders import EvalLoader
from lavis_lite.runners.stopping import Stopped

AUTO = ["--resume", "auto"]
SAMPLING = {"run": {"use_nucleus_sampling": True, "num_captions": 2, "top_p": 0.99, "temperature": 3.0}}
SCORES = {"run": {"save_scores": True}}
BOTH = {"run": {"valid_splits": ["val"], "test_splits": ["test"], "batch_size_eval": 2}}


def left(job: Path) -> dict[str, str]:
    """Result files and predictions of a job, and its metrics."""
    files = [*(job / "result").iterdir(), *(job / "predictions").iterdir()]
    found = {path.name: path.read_text() for path in files}
    evaluation = json.loads((job / "evaluation.json").read_text())
    kept = {key: evaluation[key] for key in ("metrics", "intervals", "standard_errors", "num_samples")}
    return {**found, "evaluation.json": json.dumps(kept)}


def stop_after(monkeypatch: pytest.MonkeyPatch, task: str, number: int) -> Callable[[], int]:
    """Let the task's evaluation stop after some batches, as by SIGTERM; returns a counter of the batches computed."""
    kind, counted = registry.get_task_class(task), [0]
    before = kind.valid_step

    def valid_step(self: Any, model: Any, samples: Any) -> Any:
        if counted[0] == number:
            raise Stopped(signal.SIGTERM)
        counted[0] += 1
        return before(self, model, samples)

    monkeypatch.setattr(kind, "valid_step", valid_step)
    return lambda: counted[0]


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_data")
@pytest.mark.parametrize(
    ("name", "change"),
    [("caption", {}), ("caption", SAMPLING), ("vqa_rank", SCORES), ("vqa_generate", {}), ("nlvr", {})],
)
@pytest.mark.parametrize("number", [1, 5])
def test_a_stopped_evaluation_continues(
    name: str,
    change: dict[str, Any],
    number: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the first split, and in the second one; texts are drawn as if nothing had happened."""
    path = cli_helpers.project(tmp_path, name, BOTH, change)
    assert cli_helpers.evaluate(path, job="whole") == 0
    task = cli_helpers.RECIPES[name]["run"]["task"]
    with monkeypatch.context() as patch:
        stop_after(patch, task, number)
        assert cli_helpers.evaluate(path, job="cut", flags=AUTO) == 143
    err = capsys.readouterr().err
    assert re.search(r"resume with: .*--resume auto --job-id cut", err), err
    with monkeypatch.context() as patch:
        computed = stop_after(patch, task, -1)
        assert cli_helpers.evaluate(path, job="cut", flags=AUTO) == 0
    job = tmp_path / "output" / "cut"
    batches = sum(-(-count // 2) for count in json.loads((job / "evaluation.json").read_text())["num_samples"].values())
    assert computed() == batches - number
    assert left(job) == left(tmp_path / "output" / "whole")
    if change == SAMPLING:
        captions = {row["caption"] for row in json.loads((job / "result" / "test_captions.json").read_text())}
        assert len(captions) > 3, "nothing was drawn"


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_data")
def test_a_dry_run_says_what_would_continue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cli_helpers.project(tmp_path, "caption", {"run": {"valid_splits": [], "batch_size_eval": 2}})
    output = tmp_path / "output"

    def told(*flags: str) -> str:
        capsys.readouterr()
        assert cli_helpers.evaluate(path, job=None, flags=["--dry-run", *flags]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resume  ")]
        return line.removeprefix("resume").strip()

    assert told(*AUTO) == f"nothing to resume below {output}: the evaluation starts from the beginning"
    with monkeypatch.context() as patch:
        stop_after(patch, "captioning", 3)
        assert cli_helpers.evaluate(path, job="cut", flags=AUTO) == 143
    assert told(*AUTO) == f"{output / 'cut'}: 3 batches of test.partial are done"
    torch.save({"model": {}, "step": 7}, tmp_path / "checkpoint_last.pth")
    assert told("--resume", str(tmp_path)) == f"no evaluation; weights of {tmp_path / 'checkpoint_last.pth'}, step 7"


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_data")
def test_a_killed_process_continues(tmp_path: Path) -> None:
    """SIGKILL once the file has two batches; then the end of the file is cut in the middle of a line."""
    path = cli_helpers.project(tmp_path, "caption", {"run": {"valid_splits": [], "batch_size_eval": 1}})
    arguments = ["--cfg-path", str(path), *AUTO]
    process = warm.start("evaluate.py", *arguments, "--job-id", "cut")
    partial = tmp_path / "output" / "cut" / "result" / "test.partial"
    while process.poll() is None and (not partial.is_file() or partial.read_bytes().count(b"\n") < 3):
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    content = partial.read_bytes()
    partial.write_bytes(content + content.splitlines()[-1][:20])
    assert cli_helpers.evaluate(path, job="whole") == 0
    assert cli_helpers.evaluate(path, job="other", flags=["--limit", "2"]) == 0
    with pytest.raises(SystemExit) as end:
        cli_helpers.cli.evaluate_main(arguments)  # without a job id
    assert end.value.code == 0
    assert left(tmp_path / "output" / "cut") == left(tmp_path / "output" / "whole")
    console = (tmp_path / "output" / "cut" / "console.txt").read_text()
    finished = int(re.findall(r"resumed after (\d+) batches", console)[-1])
    assert finished == content.count(b"\n") - 1 >= 2


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_data")
def test_two_processes_continue_each_its_own(tmp_path: Path) -> None:
    """One rank has finished two batches, the other one; with one process instead of two it is refused."""
    path = cli_helpers.project(tmp_path, "vqa_generate", {"run": {"valid_splits": [], "batch_size_eval": 2}})

    def launched(*argv: str) -> tuple[int, str]:
        process = warm.start("evaluate.py", "--cfg-path", str(path), *argv, world=2)
        return test_distributed.ended(process, limit=4 * test_distributed.LIMIT)

    result = tmp_path / "output" / "cut" / "result"
    code, output = launched("--job-id", "whole")
    assert code == 0, output
    # the files of a whole evaluation, cut as kills leave them
    script = tmp_path / "keeping.py"
    script.write_text("import lavis_lite.cli.main as m; m.unfinished_files = lambda folder: []\nm.evaluate_main()\n")
    process = warm.start(script, "--cfg-path", str(path), "--job-id", "cut", world=2)
    code, output = test_distributed.ended(process, limit=4 * test_distributed.LIMIT)
    assert code == 0, output
    for name, lines in (("test.partial", 3), ("test.partial-1", 2)):
        content = (result / name).read_text().splitlines(keepends=True)
        assert len(content) > lines
        (result / name).write_text("".join(content[:lines]) + content[lines][:9])
    assert cli_helpers.evaluate(path, job="cut", flags=AUTO) == 2
    code, output = launched("--job-id", "cut", *AUTO)
    assert code == 0, output
    assert "resumed after 2 batches" in output
    assert left(result.parent) == left(tmp_path / "output" / "whole")
    assert not list(result.glob("*.partial*"))


@pytest.mark.slow
@pytest.mark.usefixtures("shapes_data")
def test_what_has_changed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [
        {"image": one, "image_id": n, "caption": "a picture"} for n, one in enumerate(cli_helpers.pictures(tmp_path, 6))
    ]
    own = cli_helpers.user_set(tmp_path, {"test": records})
    own["text_processor"] = {"eval": {"name": "blip_caption"}}
    run = {"run": {"valid_splits": [], "batch_size_eval": 2}}
    path = cli_helpers.project(tmp_path, "caption", run, {"datasets": {"shapes_caption": None, "caption": own}})
    weights = tmp_path / "weights.pth"
    model = cli_helpers.build("caption")
    torch.save({"model": model.state_dict()}, weights)
    with monkeypatch.context() as patch:
        stop_after(patch, "captioning", 1)
        assert cli_helpers.evaluate(path, job="cut", weights=weights) == 143
    partial = tmp_path / "output/cut/result/test.partial"
    before = partial.read_bytes()
    capsys.readouterr()

    def refused(*texts: str, options: tuple[str, ...] = ()) -> None:
        assert cli_helpers.evaluate(path, *options, job="cut", weights=weights, flags=AUTO) == 2
        err = capsys.readouterr().err
        assert not [text for text in texts if text not in err], err
        assert "--job-id" in err
        assert partial.read_bytes() == before

    refused("run.num_beams not set, now 2", options=("run.num_beams=2",))
    with torch.no_grad():
        next(model.parameters()).view(-1)[-1] += 1  # one number, that none of the first ones of its tensor
    torch.save({"model": model.state_dict()}, weights)
    refused("weights ")
    torch.save({"model": cli_helpers.build("caption").state_dict()}, weights)
    annotation = tmp_path / "test.json"
    content = annotation.read_text()
    annotation.write_text(content.replace('"a picture"', '"another one"', 1))
    refused("data ")
    annotation.write_text(content)
    # without a job id, an evaluation of other settings begins in a folder of its own, and a line says why
    arguments = ["--cfg-path", str(path), "--checkpoint", str(weights), *AUTO]
    with pytest.raises(SystemExit) as end:
        cli_helpers.cli.evaluate_main([*arguments, "--options", "run.num_beams=2"])
    assert end.value.code == 0
    assert "cut is unfinished, but not of these settings (run.num_beams not set, now 2)" in capsys.readouterr().err
    assert partial.read_bytes() == before
    assert cli_helpers.evaluate(path, job="cut", weights=weights, flags=AUTO) == 0
    assert not partial.exists()


@pytest.mark.usefixtures("shapes_data")
@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("retrieval", [], "RetrievalTask does not compute"),
        ("caption", ["run.shuffle_images=true"], "run.shuffle_images"),
    ],
)
def test_what_cannot_continue_is_refused(
    name: str, options: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cli_helpers.project(tmp_path, name, BOTH)
    assert cli_helpers.evaluate(path, *options, flags=AUTO) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(("world", "size", "length"), [(1, 3, 10), (2, 3, 10), (3, 2, 7)])
def test_the_loader_continues_with_the_batch_that_comes_next(world: int, size: int, length: int) -> None:
    from test_loaders import Noisy, run_config

    for rank in range(world):
        run = run_config(batch_size_eval=size, num_workers=0)
        whole = list(EvalLoader(Noisy(length), run, rank=rank, world=world))
        for number in range(len(whole) + 1):
            loader = EvalLoader(Noisy(length), run, rank=rank, world=world, num_finished=number)
            rest = list(loader)
            assert len(rest) == len(loader) == len(loader.sizes) == len(whole) - number
            assert [batch["id"].tolist() for batch in rest] == [batch["id"].tolist() for batch in whole[number:]]


def test_a_partial_file_ends_after_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "one.partial"
    file = PartialFile(path, {"a": 1}, advice="start anew")
    file.open()
    rows = [{"text": "é\ud800\n", "value": 0.1 + 0.2}, {"value": float("inf")}]
    for row in rows:
        file.add(row)
    file.close()
    whole = path.read_bytes()
    again = PartialFile(path, {"a": 1}, advice="start anew")
    for damage in (b'{"value": 1', b"\0" * 40, b'{"value": 1}', b"[1]\n"):
        path.write_bytes(whole + damage)
        assert again.read() == rows
        again.open()
        again.close()
        assert path.read_bytes() == whole
    for length in range(len(whole.splitlines()[0])):  # killed in the first line
        path.write_bytes(whole[:length])
        assert again.read() == []
    again.open()
    again.add(rows[0])
    assert again.read() == rows[:1]


def test_the_digest_of_weights_sees_every_number() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3, bias=False).to(torch.bfloat16))
    model.register_buffer("odd", torch.arange(7, dtype=torch.uint8)[1:])
    seen = {weights_digest(model.state_dict())}
    for tensor in model.state_dict().values():
        for index in range(tensor.numel()):
            before = tensor.view(-1)[index].clone()
            tensor.view(-1)[index] += 1
            seen.add(weights_digest(model.state_dict()))
            tensor.view(-1)[index] = before
    large = nn.Linear(64, 100)
    before = weights_digest(large.state_dict())
    with torch.no_grad():
        large.weight[[3, 70]] = large.weight[[70, 3]]
    assert weights_digest(large.state_dict()) != before
    assert len(seen) == 1 + sum(tensor.numel() for tensor in model.state_dict().values())
