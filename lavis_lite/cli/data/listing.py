"""`data list`: the packaged datasets, read from their YAMLs alone (no torch is loaded)."""

import argparse
from collections.abc import Iterable
from typing import Any

from lavis_lite.cli.data.table import table
from lavis_lite.common.config.zoo import dataset_zoo, packaged_dataset
from lavis_lite.common.errors import UnknownNameError
from lavis_lite.common.registry import did_you_mean
from lavis_lite.common.sources import download
from lavis_lite.datasets.storage import annotation_files, section_of, visual_folder

PACKAGED = ("openclipart", "openmoji", "fashion_mnist")
"""Layouts of pictures that a system's packages install."""
HEAD = ("dataset", "layout", "splits (files here)", "images or videos", "", "download")


def run(args: argparse.Namespace) -> int:
    """Print the table of datasets and types."""
    for name in args.names:
        if name not in dataset_zoo:
            raise UnknownNameError(f"unknown dataset {name!r}. {did_you_mean(name, dataset_zoo.names())}")
    rows = [row for row in map(row_of, chosen(args.names)) if not args.here or is_here(row)]
    print("\n".join(table(HEAD, rows)) if rows else "no file of these datasets is on this machine")
    print(f"\npaths are below {download.data_root()} (environment variable LAVIS_LITE_DATA)")
    return 0


def chosen(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the datasets with each of their types, the default one first."""
    wanted = list(names)
    return [
        (name, kind)
        for name, kinds in dataset_zoo
        if not wanted or name in wanted
        for kind in sorted(kinds, key=lambda kind: (kind != "default", kind))
    ]


def row_of(named: tuple[str, str]) -> tuple[str, ...]:
    """Return the cells of one dataset and type."""
    name, kind = named
    section = packaged_dataset(name, kind)
    title = name if kind == "default" else f"{name}/{kind}"
    layout, build_info = section.get("layout", name), section.get("build_info") or {}
    if layout.startswith("shapes"):
        return (title, layout, "generated at first use", "", "", "")
    if layout in PACKAGED:
        return (title, layout, "a package's, prepared at first use", "", "", "")
    if not build_info:
        return (title, layout, "your own files", "", "", "")
    splits, folder = splits_text(build_info, title), visual_folder(build_info, owner=title)
    has_url = any(entry and entry.get("url") for entry in section_of(build_info, "annotations").values())
    fetched = ["annotations"] if has_url else []
    if folder is None:
        return (title, layout, splits, "", "", ", ".join(fetched))
    fetched += [folder.kind] if folder.is_published else []
    state = "here" if folder.path().is_dir() else "missing"
    return (title, layout, splits, folder.storage, state, ", ".join(fetched))


def splits_text(build_info: dict[str, Any], name: str) -> str:
    """Return the splits with how many of their files are here: `train 1/1, val 0/2`."""
    parts = []
    for split, entry in section_of(build_info, "annotations").items():
        if entry is not None:
            files = annotation_files(build_info, split, owner=name)
            parts.append(f"{split} {sum(file.found() is not None for file in files)}/{len(files)}")
    return ", ".join(parts)


def is_here(row: tuple[str, ...]) -> bool:
    """Return whether a row has a file or folder that is here."""
    counts = [part.rpartition(" ")[2].partition("/")[0] for part in row[2].split(", ") if "/" in part]
    return row[4] == "here" or any(count not in ("0", "") for count in counts)
