"""How well CapFilt's filter tells true from wrong texts of `shapes`, whose scenes are known.

A text counts as wrong if it is not true of its image (`datasets/shapes/truth.py`). Precision: the share of dropped web
texts that are wrong; recall: the share of wrong web texts that are dropped.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lavis_lite.common.checkpoint import write_text
from lavis_lite.datasets.readers.capfilt import finished_manifest, read_shard
from lavis_lite.datasets.shapes.truth import is_true
from lavis_lite.tasks.metrics.mean import Mean


class Text(NamedTuple):
    """What is known of a text."""

    source: str
    is_kept: bool
    is_true: bool


def texts(manifest: Path) -> Iterator[Text]:
    """Yield all texts of a manifest."""
    content = finished_manifest(manifest)
    root = Path(content["image_root"])
    scenes: dict[str, dict[str, Any]] = {}
    for name in content["shards"]:
        for record in read_shard(manifest.parent / name):
            split, number = re.fullmatch(r"(\w+)/SHAPES_\w+_0*(\d+)\.jpg", record["image"]).groups()  # type: ignore[union-attr]
            if split not in scenes:
                scenes[split] = json.loads((root.parent / f"scenes_{split}.json").read_text(encoding="utf-8"))
            yield Text(record["source"], record["kept"], is_true(record["caption"], scenes[split][number]))


def share(hits: Sequence[bool]) -> Mean | None:
    """Return the share of hits in percent, with its interval; None of none."""
    return Mean(100 * sum(hits) / len(hits), [100 * hit for hit in hits]) if hits else None


def figures(found: Sequence[Text]) -> dict[str, Mean | None]:
    """Return the figures by name."""
    web = [text for text in found if text.source == "web"]
    written = [text for text in found if text.source == "synthetic"]
    return {
        "filter: precision on wrong web texts": share([not text.is_true for text in web if not text.is_kept]),
        "filter: recall on wrong web texts": share([not text.is_kept for text in web if not text.is_true]),
        "filter: recall on wrong written texts": share([not text.is_kept for text in written if not text.is_true]),
        "true texts: web, all": share([text.is_true for text in web]),
        "true texts: web, kept": share([text.is_true for text in web if text.is_kept]),
        "true texts: written, all": share([text.is_true for text in written]),
        "true texts: written, kept": share([text.is_true for text in written if text.is_kept]),
        "true texts: after CapFilt": share([text.is_true for text in found if text.is_kept]),
        "kept of the true web texts": share([text.is_kept for text in web if text.is_true]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path, help="manifest.json of the task capfilt on shapes_pairs")
    parser.add_argument("--out", type=Path, help="file for the figures")
    args = parser.parse_args()
    found = figures(list(texts(args.manifest)))
    for name, value in found.items():
        bounds = "" if value is None else "{:5.1f} % [{:.1f}, {:.1f}]".format(value, *value.interval())
        print(f"{name:40}{bounds or 'none'}")
    if args.out:
        write_text(args.out, json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
