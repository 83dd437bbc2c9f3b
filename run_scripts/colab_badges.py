"""Write Colab's links into the notebooks and docs/README.md, for `Repository` in pyproject.toml's [project.urls].

Without the URL there are no links, and this removes them. Run it again after adding a notebook:
    python run_scripts/colab_badges.py
"""

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
GITHUB = re.compile(r"https://github\.com/(?P<place>[\w.-]+/[\w.-]+?)(\.git)?/?")
CELL = "colab-install"
"""The id of the cell that installs the package."""
BEGIN, END = "<!-- notebooks -->", "<!-- end of notebooks -->"
INSTALL = """\
# In Colab: installs the package. Where it is installed already, nothing happens.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("lavis_lite") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "git+{url}"], check=True)"""


def repository(root: Path) -> str | None:
    """Return `owner/name` of the project's repository on GitHub, None if pyproject.toml does not name it."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    url = project.get("urls", {}).get("Repository")
    if url is None:
        return None
    match = GITHUB.fullmatch(url)
    if match is None:
        raise SystemExit(f"pyproject.toml: project.urls.Repository: expected https://github.com/OWNER/NAME, got {url}")
    return match["place"]


def badge(place: str, notebook: Path) -> str:
    """Return the link, as Markdown, that opens a notebook in Colab."""
    target = f"https://colab.research.google.com/github/{place}/blob/main/notebooks/{notebook.name}"
    return f"[![Open in Colab]({BADGE})]({target})"


def write_notebook(path: Path, place: str | None) -> None:
    """Write the link into the first cell, and the cell that installs the package after it."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in content["cells"] if cell.get("id") != CELL]
    lines = [line for line in "".join(cells[0]["source"]).splitlines() if BADGE not in line]
    if place is not None:
        lines.insert(1, badge(place, path))
        source = lined(INSTALL.replace("{url}", f"https://github.com/{place}"))
        cells.insert(1, {"cell_type": "code", "execution_count": None, "id": CELL, "metadata": {}, "outputs": []})
        cells[1]["source"] = source
    cells[0]["source"] = lined("\n".join(lines))
    text = json.dumps({**content, "cells": cells}, indent=1, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def lined(text: str) -> list[str]:
    """Return a text as notebooks hold it: a list of lines with their ends."""
    return text.splitlines(keepends=True)


def write_index(path: Path, notebooks: list[Path], place: str | None) -> None:
    """Write the list of notebooks between its two comments."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = [f"- `{one.name}`: {title(one)}{'' if place is None else f' {badge(place, one)}'}" for one in notebooks]
    path.write_text("\n".join([f"{before}{BEGIN}", *lines, f"{END}{after}"]), encoding="utf-8")


def title(notebook: Path) -> str:
    """Return a notebook's heading, its first letter small."""
    first = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"]).splitlines()[0]
    heading = first.removeprefix("# ")
    return heading[0].lower() + heading[1:]


def main(root: Path) -> None:
    """Write all links."""
    place = repository(root)
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    for path in notebooks:
        write_notebook(path, place)
    write_index(root / "docs" / "README.md", notebooks, place)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
