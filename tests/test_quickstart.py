"""The quickstarts' own scripts: language models from texts alone, and a report that finds every job's figures."""

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from lavis_lite.cli import main as cli
from lavis_lite.common.config.config import Config, parser
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


@pytest.mark.slow
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


@pytest.mark.parametrize("family", ["blip", "blip2", "instructblip"])
def test_every_figure_of_the_report_has_a_job_that_measures_it(family: str) -> None:
    report = script("quickstart_report").FAMILIES[family]
    recipes = {
        path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / f"projects/{family}/quickstart").glob("*")
    }
    jobs = {name: recipe["run"]["job_id"] for name, recipe in recipes.items() if not name.startswith("_")}
    assert all(name == job for name, job in jobs.items())
    again = {name for _, _, name in evaluations(f"quickstart_{family}")}
    assert {figure.job for figure in report.figures} <= set(jobs) | again
    assert set(report.jobs) <= set(jobs)
    assert {*report.pictures} <= set(jobs) | again


def evaluations(function: str) -> list[tuple[str, str, str]]:
    """(recipe, folder of the weights, name) of every `evaluate` that a function of quickstart.sh comes to."""
    shell = (ROOT / "run_scripts/quickstart.sh").read_text()
    bodies = dict(re.findall(r"^(\w+)\(\) \{((?:.*\}$)|(?:\n(?:.*\n)*?\}$))", shell, flags=re.MULTILINE))
    called = [
        name for name in bodies if name != function and re.search(rf"(?<![/\w]){name}(?![/\w])", bodies[function])
    ]
    own = re.findall(r'evaluate (\w+) "(\S+)" (\w+)', bodies[function])
    return own + [found for name in called if name not in ("train", "evaluate") for found in evaluations(name)]


def chains(tmp_path: Path, functions: str) -> subprocess.CompletedProcess[str]:
    """Runs shell `functions` with what quickstart.sh has to begin and finish them."""
    shell = (ROOT / "run_scripts/quickstart.sh").read_text()
    kept = shell[shell.index("# begin CHAIN") : shell.index("# language_model NAME")]
    text = f"set -euo pipefail\nout={tmp_path}\nstarted=0\n{kept}\n{functions}\n"
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=300)


def test_chains_run_side_by_side_and_one_after_the_other(tmp_path: Path) -> None:
    """`b` only ends when `c`, which begins after `a`, is at work."""
    waits = f"b() {{ until [ -f {tmp_path}/c ]; do sleep 0.05; done; }}"
    order = "begin a b; finish a; begin c; finish b c"
    done = chains(tmp_path, f"a() {{ echo at work; }}\n{waits}\nc() {{ touch {tmp_path}/c; }}\n{order}")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"== (\w) done", done.stdout) == ["a", "b", "c"]
    assert (tmp_path / "a.txt").read_text() == "at work\n"


def test_a_chain_that_fails_ends_the_others(tmp_path: Path) -> None:
    slow = f"slow() {{ echo $BASHPID >{tmp_path}/pid; sleep 600; }}"
    bad = f"bad() {{ until [ -s {tmp_path}/pid ]; do sleep 0.05; done; echo what went wrong; false; echo on; }}"
    done = chains(tmp_path, f"{slow}\n{bad}\nbegin slow bad\nfinish bad slow")
    assert done.returncode == 1
    assert f"what went wrong\nerror: bad failed; its output is in {tmp_path}/bad.txt\n" in done.stderr
    pid = (tmp_path / "pid").read_text().strip()
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the other chain is still at work")


class Quickstart:
    """Jobs of quickstart.sh with a few steps and samples."""

    def __init__(self, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts, self.monkeypatch = texts, monkeypatch

    def door(self, name: str, *options: str) -> None:
        recipe = ROOT / f"projects/{name}.yaml"
        sizes = ("num_train=70", "num_val=5", "num_test=5", "gallery_size=5")
        small = [f"datasets.{dataset}.{size}" for dataset in Config.from_file(recipe).datasets for size in sizes]
        settings = [*small, "run.num_workers=0", *options]
        assert cli.main(parser(), ["--cfg-path", str(recipe), "--options", *settings]) == 0

    def train(self, *names: str) -> None:
        for name in names:
            self.door(name, "run.max_iters=2")

    def evaluate_again(self, family: str, *options: str) -> None:
        """What the script evaluates beside the training jobs, with its own options."""
        shell = (ROOT / "run_scripts/quickstart.sh").read_text().replace("\\\n", " ")
        for recipe, folder, name in evaluations(f"quickstart_{family}"):
            given = re.search(rf'evaluate {recipe} "\S+" {name}((?: [\w.]+=\w+)*)', shell)[1].split()
            folder = folder.replace("$out", f"output/quickstart_{family}").replace("$blip2", "output/quickstart_blip2")
            best = f"model.checkpoint={folder}/checkpoint_best.pth"
            self.door(
                f"{family}/quickstart/{recipe}", "run.evaluate=True", f"run.job_id={name}", best, *given, *options
            )

    def language_model(self, name: str) -> None:
        out = f"output/quickstart_blip2/{name}"
        arguments = ["x", f"tiny_{name}", "--texts", str(self.texts), "--out", out, "--steps", "2"]
        self.monkeypatch.setattr(sys, "argv", arguments)
        script("train_tiny_llm").main()

    def report(self, family: str) -> None:
        out = f"output/quickstart_{family}"
        self.monkeypatch.setattr(sys, "argv", ["x", out, "--family", family, "--seconds", "1"])
        script("quickstart_report").main()


@pytest.mark.slow
def test_the_blip2_and_instructblip_quickstarts_run_from_end_to_end(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every job of quickstart.sh in its order, two steps each, and the reports of them."""
    monkeypatch.chdir(tmp_path)
    quickstart = Quickstart(texts, monkeypatch)
    quickstart.train("blip/quickstart/pretrain")
    quickstart.language_model("opt")
    quickstart.language_model("t5")
    quickstart.train(*(f"blip2/quickstart/{job}" for job in script("quickstart_report").FAMILIES["blip2"].jobs))
    quickstart.evaluate_again("blip2")
    quickstart.report("blip2")
    out = Path("output/quickstart_blip2")
    assert "with the queries of other images" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert page.count('aria-label="Loss: training ') == 6
    assert len(re.findall("drawn at random with seed 0", page)) == 5
    assert not any("t5_model" in name for name in torch.load(out / "vqa" / "checkpoint_last.pth")["model"])
    quickstart.train("instructblip/quickstart/instruct", "instructblip/quickstart/instruct_unaware")
    quickstart.evaluate_again("instructblip")
    quickstart.report("instructblip")
    assert "BLIP-2, not tuned on instructions" in capsys.readouterr().out
    page = Path("output/quickstart_instructblip/report.html").read_text()
    assert "10 of 10 predictions, drawn at random with seed 0" in page


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
        report.last_metrics(tmp_path / "empty", "test")


def test_the_readmes_picture_is_drawn_from_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing = script("readme_picture")
    cards = [
        drawing.Card(tmp_path / f"{i}.png", f"a caption of image {i}", i % 2 == 0, "what is it?") for i in range(7)
    ]
    for card in cards:
        Image.new("RGB", (48, 48), "teal").save(card.image)
    monkeypatch.setattr(drawing, "cards", lambda job: iter(cards))
    monkeypatch.setattr(sys, "argv", ["readme_picture.py", str(tmp_path), str(tmp_path / "out" / "picture.png")])
    drawing.main()
    colours = {colour for _, colour in Image.open(tmp_path / "out" / "picture.png").convert("RGB").getcolors(10**6)}
    assert {(0, 128, 128), (255, 255, 255)} < colours
