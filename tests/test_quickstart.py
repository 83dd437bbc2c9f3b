"""The quickstarts' own scripts: language models from texts alone, and a report that finds every job's figures."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lavis_lite import cli
from lavis_lite.config import parser
from lavis_lite.models import load_model

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("shapes_data")


def script(name: str) -> ModuleType:
    """A file of run_scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "run_scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Few texts to train on."""
    small = {"num_train": 20, "num_val": 5, "num_test": 5}
    path = tmp_path / "texts.yaml"
    path.write_text(yaml.safe_dump({"datasets": {"shapes_caption": small, "shapes_vqa": small}}))
    return path


@pytest.mark.parametrize(
    ("llm", "arch", "key"), [("tiny_opt", "blip2_opt", "opt_model"), ("tiny_t5", "blip2_t5", "t5_model")]
)
def test_a_language_model_learns_from_texts_and_is_taken(
    llm: str, arch: str, key: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "llm"
    arguments = ["x", llm, "--texts", str(texts), "--out", str(out), "--steps", "30", "--batch-size", "8"]
    monkeypatch.setattr(sys, "argv", arguments)
    printed: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
    script("train_tiny_llm").main()
    loss = float(re.search(r"step 30/30  loss ([\d.]+)", "\n".join(printed))[1])
    assert loss < 5.5  # 256 tokens at random: log(256) = 5.55 on average over all steps, much less at the end
    model = load_model(arch, "tiny", is_eval=True, **{key: str(out)})
    stored = load_file(out / "model.safetensors")
    name, tensor = next((n, t) for n, t in stored.items() if n.endswith("layers.0.fc1.weight") or "wi_0" in n)
    torch.testing.assert_close(dict(getattr(model, key).named_parameters())[name], tensor, rtol=0, atol=0)
    assert not any(n.startswith(f"{key}.") for n in model.checkpoint_state_dict())


@pytest.mark.parametrize("family", ["blip", "blip2"])
def test_every_figure_of_the_report_has_a_job_that_measures_it(family: str) -> None:
    report = script("quickstart_report").FAMILIES[family]
    recipes = {
        path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / f"projects/{family}/quickstart").glob("*")
    }
    jobs = {name: recipe["run"]["job_id"] for name, recipe in recipes.items() if not name.startswith("_")}
    assert all(name == job for name, job in jobs.items())
    shell = (ROOT / "run_scripts/quickstart.sh").read_text().replace("${llm}", "opt").replace("$llm", "opt")
    again = set(re.findall(r"evaluate \S+ \"?(\w+)\"?", shell)) | {"stage2_t5_shuffled"}
    assert {figure.job for figure in report.figures} <= set(jobs) | again
    assert set(report.jobs) <= set(jobs)
    assert {job for _, job, _ in report.pictures} <= set(jobs)


def test_the_blip2_quickstart_runs_from_end_to_end(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every job of quickstart.sh in its order, a few steps each, and the report of them."""
    monkeypatch.chdir(tmp_path)
    out = Path("output/quickstart_blip2")

    def door(name: str, *options: str) -> None:
        recipe = yaml.safe_load((ROOT / f"projects/{name}.yaml").read_text())
        sets = ["shapes_vqa"] if "vqa" in name else ["shapes_retrieval"] if "retrieval" in name else ["shapes_caption"]
        sets += ["shapes_pairs"] if recipe["run"]["job_id"] in ("pretrain", "stage1") else []
        sizes = ("num_train=70", "num_val=5", "num_test=5", "gallery_size=5")
        small = [f"datasets.{dataset}.{size}" for dataset in sets for size in sizes]
        settings = [*small, "run.num_workers=0", *options]
        assert cli.main(parser(), ["--cfg-path", str(ROOT / f"projects/{name}.yaml"), "--options", *settings]) == 0

    door("blip/quickstart/pretrain", "run.max_iters=2")
    for llm in ("opt", "t5"):
        arguments = ["x", f"tiny_{llm}", "--texts", str(texts), "--out", str(out / llm), "--steps", "2"]
        monkeypatch.setattr(sys, "argv", arguments)
        script("train_tiny_llm").main()
    for job in script("quickstart_report").FAMILIES["blip2"].jobs:
        door(f"blip2/quickstart/{job}", "run.max_iters=2")
    for job, name, option in (
        ("stage2_opt", "stage2_opt_shuffled", "run.shuffle_images=True"),
        ("stage2_t5", "stage2_t5_shuffled", "run.shuffle_images=True"),
        ("vqa", "vqa_blank", "run.blank_images=True"),
    ):
        best = f"model.checkpoint={out / job / 'checkpoint_best.pth'}"
        door(f"blip2/quickstart/{job}", "run.evaluate=True", f"run.job_id={name}", option, best)
    monkeypatch.setattr(sys, "argv", ["x", str(out), "--family", "blip2", "--seconds", "1"])
    script("quickstart_report").main()
    assert "with the queries of other images" in capsys.readouterr().out
    assert (out / "report.html").read_text().count("<svg") == 6
    assert not any("opt_model" in name for name in torch.load(out / "vqa" / "checkpoint_last.pth")["model"])


def test_figures_are_collected_from_the_logs(tmp_path: Path) -> None:
    report = script("quickstart_report")
    family = report.FAMILIES["blip2"]
    for number, figure in enumerate(family.figures):
        (tmp_path / figure.job).mkdir(exist_ok=True)
        with (tmp_path / figure.job / "log.txt").open("a") as file:
            file.write(json.dumps({"split": "test", "metrics": {f.metric: number for f in family.figures}}) + "\n")
    results = report.collect(tmp_path, family, 60.0)
    assert results["stage2_opt"] == {"true_rate": 0, "shuffled": 1}
    assert results["seconds"] == 60.0
    assert report.table(results, family)[-1] == ("time for everything", "1.0 min")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "log.txt").write_text("")
    with pytest.raises(SystemExit, match="holds no test metrics"):
        report.test_metrics(tmp_path / "empty")
