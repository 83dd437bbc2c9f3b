"""Figures and a page about the texts that the task `capfilt` wrote; one pass over the shards, in constant memory."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavis_lite.common.checkpoint import write_text
from lavis_lite.common.errors import UnreadableSample
from lavis_lite.common.page.render import data_address, render
from lavis_lite.common.records import Record, StoredImage
from lavis_lite.datasets.image import open_image
from lavis_lite.datasets.readers.capfilt import Manifest, finished_manifest, read_shard
from lavis_lite.tasks.capfilt.shards import ImageOf

NUM_EXAMPLES = 8
"""Texts shown of each source, kept and dropped."""
PIXELS = 192
BINS = {"itm": (0.0, 1.0), "itc": (-1.0, 1.0), "clip": (-1.0, 1.0)}
"""The range of each score's histogram."""
NUM_BINS = 40
PAGE = "report.html"


@dataclass
class Summary:
    """Counts, histograms and random examples of texts, by source."""

    seen: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    histograms: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    """Texts per bin, by score and source."""
    examples: dict[tuple[str, bool], list[Record]] = field(default_factory=lambda: defaultdict(list))
    """Texts by source and whether they are kept: a uniform draw of `NUM_EXAMPLES` of each."""

    def add(self, record: Record, rng: random.Random) -> None:
        """Count a text."""
        source, is_kept = record["source"], record["kept"]
        self.seen[source] += 1
        self.kept[source] += is_kept
        for name in BINS.keys() & record.keys():
            counts = self.histograms.setdefault((name, source), [0] * NUM_BINS)
            counts[bin_of(record[name], *BINS[name])] += 1
        shown = self.examples[source, is_kept]
        number = self.kept[source] if is_kept else self.seen[source] - self.kept[source]
        if len(shown) < NUM_EXAMPLES:
            shown.append(record)
        elif (place := rng.randrange(number)) < NUM_EXAMPLES:  # a reservoir: each text is equally likely to stay
            shown[place] = record

    def metrics(self) -> dict[str, Any]:
        """Return the percentage of kept texts by source, and the numbers of all and kept texts."""
        shares = {f"kept_{source}": 100 * self.kept[source] / self.seen[source] for source in sorted(self.seen)}
        return {**shares, "num_texts": self.seen.total(), "num_kept": self.kept.total(), "agg_metrics": None}


def bin_of(value: float, low: float, high: float) -> int:
    """Return the number of the bin of a value; what is outside the range counts in the first or last one."""
    return min(max(int((value - low) / (high - low) * NUM_BINS), 0), NUM_BINS - 1)


def summarise(manifest_path: Path, *, seed: int) -> Summary:
    """Return the summary of finished texts; the examples are drawn by the seed."""
    manifest, summary, rng = finished_manifest(manifest_path), Summary(), random.Random(seed)
    for name in manifest["shards"]:
        for record in read_shard(manifest_path.parent / name):
            summary.add(record, rng)
    return summary


def write_page(manifest_path: Path, summary: Summary, image_of: ImageOf, *, title: str) -> Path:
    """Write `report.html` beside the manifest: one file, with its pictures inline and without scripts."""
    manifest = finished_manifest(manifest_path)
    text = render(
        "page.html",
        package="lavis_lite.tasks.capfilt",
        title=title,
        sources=[(source, summary.seen[source], summary.kept[source]) for source in sorted(summary.seen)],
        charts=list(charts(summary, manifest)),
        examples=[
            (source, is_kept, [(record, picture(image_of(record["sample"]))) for record in records])
            for (source, is_kept), records in sorted(summary.examples.items())
        ],
        settings=manifest["settings"],
    )
    return write_text(manifest_path.parent / PAGE, text)


def charts(summary: Summary, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Yield what the page needs to draw each histogram, in a box of 100 by 100."""
    settings = manifest["settings"]
    for (name, source), counts in sorted(summary.histograms.items()):
        low, high = BINS[name]
        is_judged = name == settings["filter_by"] and source in settings["filtered_sources"]
        line = settings["threshold"] if is_judged else None
        yield {
            "score": name,
            "source": source,
            "low": low,
            "high": high,
            "bars": [(100 * n / NUM_BINS, 100 * count / max(counts), count) for n, count in enumerate(counts)],
            "width": 100 / NUM_BINS,
            "line": None if line is None else 100 * (line - low) / (high - low),
        }


def picture(file: Path | StoredImage) -> str | None:
    """Return an image, made small, as a data address; None if it cannot be read any more."""
    try:
        return data_address(open_image(file), PIXELS)
    except UnreadableSample:
        return None
