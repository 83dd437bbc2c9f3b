"""Links that open the notebooks in Colab: those of the project's URL, in every notebook, or none without one."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "run_scripts" / "colab_badges.py"
LINK = re.compile(r"https://colab\.research\.google\.com/github/([^)\s\"\\]+)")
URLS = '[project.urls]\nRepository = "https://github.com/someone/some.repo"\n\n[project.scripts]'


def script() -> Any:
    spec = importlib.util.spec_from_file_location("colab_badges", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def project(folder: Path, urls: str) -> Path:
    """A copy of the files that have links, of a project with these URLs."""
    for name in ("docs", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("figures"))
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    text = re.sub(r"^\[project\.urls\]\n(.+\n)*\n?", "", text, flags=re.MULTILINE)
    (folder / "pyproject.toml").write_text(text.replace("\n[project.scripts]", f"\n{urls}"), encoding="utf-8")
    return folder


def write(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True)


def check_links(root: Path, place: str | None) -> None:
    """Every notebook has one link, in its first cell, and the cell that installs the package; the index has all."""
    index = (root / "docs" / "README.md").read_text(encoding="utf-8")
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    assert not [path.name for path in notebooks if f"- `{path.name}`: " not in index]
    expected = [] if place is None else [f"{place}/blob/main/notebooks/{path.name}" for path in notebooks]
    assert LINK.findall(index) == expected
    for path in notebooks:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        installs = [number for number, cell in enumerate(cells) if cell.get("id") == "colab-install"]
        links = [LINK.findall("".join(cell["source"])) for cell in cells]
        own = [f"{place}/blob/main/notebooks/{path.name}"]
        assert links == [own if place and number == 0 else [] for number in range(len(cells))], path.name
        assert installs == ([] if place is None else [1]), path.name


def test_the_links_are_those_of_the_projects_url() -> None:
    """Fails after the URL was set or changed until run_scripts/colab_badges.py has run."""
    check_links(ROOT, script().repository(ROOT))


def test_links_follow_the_url(tmp_path: Path) -> None:
    folder = project(tmp_path, URLS)
    assert write(folder).returncode == 0
    check_links(folder, "someone/some.repo")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert write(folder).returncode == 0
    assert {path: path.read_bytes() for path in before} == before, "a second time changes nothing"
    text = (folder / "pyproject.toml").read_text().replace("someone/some.repo", "other/name.git")
    (folder / "pyproject.toml").write_text(text)
    assert write(folder).returncode == 0
    check_links(folder, "other/name")
    (folder / "pyproject.toml").write_text(text.replace('Repository = "https://github.com/other/name.git"\n', ""))
    assert write(folder).returncode == 0
    check_links(folder, None)


@pytest.mark.parametrize("url", ["https://example.org/a/b", "https://github.com/a", "git@github.com:a/b.git"])
def test_another_host_is_refused(url: str, tmp_path: Path) -> None:
    folder = project(tmp_path, URLS.replace("https://github.com/someone/some.repo", url))
    done = write(folder)
    assert done.returncode == 1
    assert f"project.urls.Repository: expected https://github.com/OWNER/NAME, got {url}" in done.stderr


@pytest.mark.parametrize("is_installed", [True, False])
def test_the_cell_installs_the_package_where_it_is_missing(
    is_installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = project(tmp_path, URLS)
    assert write(folder).returncode == 0
    cells = json.loads((folder / "notebooks" / "own_photos.ipynb").read_text(encoding="utf-8"))["cells"]
    ran: list[Any] = []
    monkeypatch.setattr(subprocess, "run", lambda *command, **options: ran.append((command, options)))
    if not is_installed:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec("".join(cells[1]["source"]), {})
    words = [sys.executable, "-m", "pip", "install", "-q", "git+https://github.com/someone/some.repo"]
    assert ran == ([] if is_installed else [((words,), {"check": True})])
