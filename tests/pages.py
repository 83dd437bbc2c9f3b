"""The Markdown pages of the repository, read: fenced blocks, tables, inline code."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("C*.md")), ROOT / "SECURITY.md", *sorted(DOCS.glob("*.md"))]


class Block(NamedTuple):
    """A fenced block: its language and its lines."""

    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that the block is, if its first line says so."""
        found = re.match(r"# ([\w./]+\.(?:py|yaml))\n", self.text)
        return found[1] if found else None


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(*pair) for pair in found]


def tables(page: Path) -> dict[str, list[list[str]]]:
    """A page's tables by their head row, each a list of rows of cells."""
    found: dict[str, list[list[str]]] = {}
    rows: list[list[str]] | None = None
    for line in page.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            rows = None
        elif rows is None:
            rows = found.setdefault(line, [])
        elif not line.startswith("| ---"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


def table(page: Path, head: str) -> list[list[str]]:
    """The one table of a page whose head row starts so."""
    (found,) = [rows for title, rows in tables(page).items() if title.startswith(head)]
    return found


def code(cell: str) -> list[str]:
    """The inline code of a table's cell."""
    return re.findall(r"`([^`]+)`", cell)
