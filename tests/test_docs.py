"""What README.md and docs/ say is true: their code runs, their files exist, their keys and tables are the schemas'.

A file of a page begins with a line `# <file>`; `/data` in it is made here. The tutorial's are run by
test_extending.py, the computed figures of tables checked by test_docs_figures.py.
"""

import csv
import inspect
import json
import re
import shlex
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import DOCS, PAGES, README, ROOT, blocks, code, table
from PIL import Image
from typer.testing import CliRunner

from lavis_lite.cli import main as cli
from lavis_lite.cli.app import app
from lavis_lite.common.config.config import Config, parser
from lavis_lite.common.config.recipes import find_recipe
from lavis_lite.common.config.run import IGNORED_LAVIS_KEYS, RunConfig
from lavis_lite.common.config.schema import schema_of
from lavis_lite.common.config.sections import MODEL_KEYS
from lavis_lite.common.config.zoo import dataset_zoo, model_zoo
from lavis_lite.common.registry import registry
from lavis_lite.common.sources import download

PLACES = ("lavis_lite/", "projects/", "run_scripts/", "tests/", "docs/", "benchmarks/")
RECORDS = re.compile(r"^### (\w+)\n(.*?)```json\n(.*?)```", re.MULTILINE | re.DOTALL)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
pytestmark = pytest.mark.usefixtures("shapes_data")


def make_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """A CSV file, and the pictures that its first column names in `images/` beside it."""
    images = path.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        Image.new("RGB", (60, 40), "teal").save(images / next(iter(row.values())))


def run(*argv: str) -> int:
    """train.py in this process; the exit code."""
    return cli.main(parser(), ["--cfg-path", *argv])


# Code that runs


@every_page
def test_python_runs_from_top_to_bottom(page: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.language == "python" and not block.file:
            exec(compile(block.text, str(page), "exec"), names)
    if page.name == "python.md":
        out = capsys.readouterr().out
        assert "blip_image_text_matching" in out
        assert {"image_feature", "text_feature", "pair_feature"} <= names.keys()
        assert float(names["image_feature"].norm(dim=-1)) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_own_data_by_one_yaml_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (text,) = [block.text for block in blocks(DOCS / "data.md") if block.file == "flowers.yaml"]
    (tmp_path / "flowers.yaml").write_text(text.replace("/data/", f"{tmp_path}/data/"))
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 4), ("val", 2)):
        rows = [{"image": f"{split}{i}.png", "caption": "a red flower"} for i in range(count)]
        make_csv(tmp_path / f"data/flowers/{split}.csv", rows)
    options = ["model.model_type=tiny", "run.batch_size_train=2", "run.max_iters=1", "run.num_workers=0"]
    assert run("flowers.yaml", "--job-id", "job", "--options", *options) == 0
    rows = [json.loads(line) for line in (tmp_path / "output/flowers/job/log.txt").read_text().splitlines()]
    assert "CIDEr" in next(row for row in rows if row.get("split") == "val")["metrics"]


@pytest.mark.parametrize("builder", [name for name, _, _ in RECORDS.findall((DOCS / "data.md").read_text())])
def test_example_records_are_read(builder: str, tmp_path: Path):
    (text,) = [found for name, _, found in RECORDS.findall((DOCS / "data.md").read_text()) if name == builder]
    (tmp_path / "records.json").write_text(text)
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    storage = {"storage": str(tmp_path / "records.json")}
    info = {"annotations": {"train": storage, "val": storage}, "images": {"storage": str(tmp_path)}}
    datasets = registry.get_builder_class(builder)(build_info=info).build()
    assert len(datasets["train"]) >= len(datasets["val"]) == len(json.loads(text))
    for dataset in datasets.values():
        assert {"instance_id"} < dataset[len(dataset) - 1].keys()


# Commands, files, links


def commands(page: Path) -> list[str]:
    """The page's command lines that train or evaluate by a recipe: a file for the scripts, or a name."""
    lines = [line for block in blocks(page) for line in block.text.splitlines()]
    wanted = r"(train|evaluate)\.py --cfg-path \S|^lavis-lite (train|evaluate) --cfg-path [\w/]+( |$)"
    return [line for line in lines if re.search(wanted, line)]


@pytest.mark.parametrize("line", [line for page in PAGES for line in commands(page)])
@pytest.mark.slow
def test_commands_are_understood(line: str):
    words = line.split("#")[0].split()
    script = next(i for i, word in enumerate(words) if word.endswith(".py") or word in ("train", "evaluate"))
    understood = parser()
    if words[script].startswith("evaluate"):
        for flag in ("--checkpoint", "--limit"):
            understood.add_argument(flag)
        understood.add_argument("--check", action="store_true")
    args = understood.parse_args(words[script + 1 :])
    path = ROOT / args.cfg_path if args.cfg_path.endswith(".yaml") else find_recipe(args.cfg_path)
    assert Config.from_file(path, args.options).run.task


@pytest.mark.parametrize("page", [DOCS / "commands.md", README], ids=lambda page: page.name)
def test_commands_over_images_are_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every line parses; the command then stops at its images, which are not there."""
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks(page) for line in block.text.splitlines()]
    lines = [line for line in lines if re.match(r"lavis-lite (caption|ask|match|embed|search|explain|chat) ", line)]
    assert len(lines) > 3
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        absent = ("photo", "questions", "captions.txt")
        words = ["nowhere" if word.startswith(absent) else word for word in words]
        if words[0] in ("search", "chat"):
            words += ["--model", "nowhere"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2, line
        assert "nowhere" in result.stderr, result.stderr


@every_page
def test_links_lead_somewhere(page: Path):
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file) if file else page
        assert path.exists(), f"{page.name} links to {target}"
        headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], target


@every_page
def test_lines_of_prose_are_short(page: Path):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    kept = () if page.name == "CHANGELOG.md" else text.splitlines()  # a line per change
    prose = [line for line in kept if not line.startswith(("|", "![", "#", "<"))]
    assert [line for line in prose if len(line) > 120 and len(line.split()) > 1] == []


@every_page
def test_named_files_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(rf"(?<!LAVIS, )(?<![\w./-])(?:{'|'.join(PLACES)})[\w./-]*", text):
        assert (ROOT / name.rstrip(".")).exists(), f"{page.name} names {name}"


def test_the_index_lists_every_notebook():
    listed = re.findall(r"^- `(\w+\.ipynb)`: ", (ROOT / "docs/README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


def test_the_folder_tree_names_every_folder():
    (tree,) = [
        block.text for block in blocks(DOCS / "architecture.md") if "train.py, evaluate.py       training" in block.text
    ]
    folders = {path.parent.name for path in (ROOT / "lavis_lite").glob("*/*") if path.parent.name != "__pycache__"}
    assert {f"lavis_lite/{name}/" for name in folders} == set(re.findall(r"^lavis_lite/\w+/", tree, re.MULTILINE))


# Keys and tables


def section_keys(section: str, rest: list[str]) -> tuple[str, set[str]]:
    """The key that `section.rest` sets, and the keys that there are."""
    if section == "run":
        task_fields = {f.name for name in registry.list_tasks() for f in fields(registry.get_task_class(name))}
        return rest[0], {f.name for f in fields(RunConfig)} | task_fields
    if section == "model":
        classes = [registry.get_model_class(name) for name in registry.list_models()]
        return rest[0], {p for cls in classes for p in inspect.signature(cls).parameters} | set(MODEL_KEYS)
    builders = registry.list_builders() if rest[0].startswith("<") else [rest[0]]
    known = {f.name for name in builders for f in fields(registry.get_builder_class(name))}
    return rest[1] if len(rest) > 1 else "build_info", known


@every_page
def test_named_keys_exist(page: Path):
    text = re.sub(r"^error: .*$", "", page.read_text(), flags=re.MULTILINE)  # messages about mistakes
    named = re.findall(r"(?<![\w./-])(run|model|datasets)\.((?:\w+|<name>)(?:\.\w+)*)(?![\w(/])", text)
    for section, rest in named:
        key, known = section_keys(section, rest.split("."))
        assert key in known, f"{page.name} names {section}.{rest}"


def default(field: Any) -> Any:
    """A dataclass field's default."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


def test_the_table_of_run_keys_is_complete_and_has_the_defaults():
    rows = {code(key)[0]: cell for key, cell, _ in table(DOCS / "training.md", "| key | default |")}
    assert rows.pop("task") == "required"
    expected = {f.name: default(f) for f in fields(RunConfig) if f.name != "task"}
    assert rows.keys() == expected.keys()
    for key, cell in rows.items():
        value = yaml.safe_load(code(cell)[0])
        assert (float(value) if isinstance(expected[key], float) else value) == expected[key], key


def test_the_table_of_task_keys_is_complete_and_has_the_defaults():
    own = [n for n in registry.list_tasks() if registry.get_task_class(n).__module__.startswith("lavis_lite.")]
    shown: dict[str, dict[str, Any]] = {name: {} for name in own}  # other test files register tasks of their own
    task = ""
    for name, key, cell, _ in table(DOCS / "training.md", "| task | key |"):
        task = code(name)[0] if name else task
        shown[task][code(key)[0]] = yaml.safe_load(code(cell)[0])
    for name, accuracy in re.findall(r"`(\w+)` \(`accuracy: (\w+)`", (DOCS / "training.md").read_text()):
        shown[name] = {**shown["vqa"], "accuracy": accuracy}
    for name, keys in shown.items():
        assert keys == {f.name: default(f) for f in fields(registry.get_task_class(name))}, name


def test_the_zoo_table_is_the_zoo():
    rows = table(DOCS / "zoo.md", "| architecture | types |")
    assert [(code(arch)[0], code(types)) for arch, types, _ in rows] == list(model_zoo)
    for arch, types, _ in rows:
        for name in code(types):
            text = model_zoo.path(code(arch)[0], name).read_text()
            reads_texts = "tokenizer" in schema_of(registry.get_model_class(code(arch)[0]))[0]
            local = "://" not in text and ("tokenizer: shapes" in text or not reads_texts)
            assert local == (f"**`{name}`**" in types), f"{code(arch)[0]} {name}"


def test_every_builder_is_described():
    text = (DOCS / "data.md").read_text()
    named = set(re.findall(r"`(\w+)`", text)) | {name for name, _, _ in RECORDS.findall(text)}
    assert set(registry.list_builders()) <= named
    assert set(dataset_zoo.names()) <= named


def test_every_environment_variable_is_described():
    rows = table(DOCS / "data.md", "| variable |")
    named = {name for row in rows for name in code(row[0]) if name.startswith("LAVIS_LITE_")}
    source = "".join(path.read_text() for path in (ROOT / "lavis_lite").rglob("*.py"))
    assert named == set(re.findall(r"LAVIS_LITE_[A-Z]+", source))
    assert str(download.data_root())  # the fixture set LAVIS_LITE_DATA


def test_the_table_of_dead_keys_is_complete():
    rows = table(DOCS / "lavis.md", "| key | why |")
    assert {key for row in rows for key in code(row[0])} == set(IGNORED_LAVIS_KEYS)
