"""`data status`: everything that a recipe needs, and whether it is here. One run lists all, whatever is missing."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from lavis_lite.cli.data.named import NamedDataset, of_recipe, offline, read_recipe
from lavis_lite.cli.data.needs import Need, file_need, model_needs, package_needs, weights_need
from lavis_lite.cli.data.table import size_text, table
from lavis_lite.common.config.config import Config
from lavis_lite.datasets.storage import (
    ImageArchive,
    VisualFolder,
    annotation_files,
    has_files,
    is_streamed,
    split_folder,
    visual_folder,
)
from lavis_lite.datasets.tables import is_table

HEAD = ("", "what", "for", "size", "path", "from")
DATA = ("annotations", "images", "videos")


def run(args: argparse.Namespace) -> int:
    """Print the table; return 1 if something is missing."""
    with offline():
        cfg, unread = read_recipe(args.recipe, args.options)
        found = of_recipe(cfg)
        needs = [*(weights_need(key, source) for key, source in unread.items()), *all_needs(cfg, found)]
    if "model.checkpoint" in unread:  # it replaces the type's own weights
        needs = [need for need in needs if need.name not in ("model.finetuned", "model.pretrained")]
    needs = list({(need.kind, need.place or need.name): need for need in reversed(needs)}.values())[::-1]
    if args.json:
        print(json.dumps([asdict(need) for need in needs], indent=1, ensure_ascii=False))
    else:
        print("\n".join(report(needs, found, recipe=args.recipe)))
    return 0 if all(need.is_there for need in needs) else 1


def all_needs(cfg: Config, found: Sequence[NamedDataset]) -> Iterator[Need]:
    """Yield what the recipe needs: data, weights, tokenizers, packages."""
    has_videos = has_tables = False
    for named in found:
        if not named.splits:
            continue
        yield from annotation_needs(named)
        for key in named.annotation_keys():
            files = annotation_files(named.build_info, key, owner=named.name)
            has_tables = has_tables or any(file.hub_split or is_table(file.path()) for file in files)
            if (own := split_folder(named.build_info, key)) is not None:
                is_there, place = has_files(own.path()), str(own.path())
                yield Need(kind=own.kind, name=f"{named.name}/{key}", is_there=is_there, place=place)
        folder = visual_folder(named.build_info, owner=named.name)
        if folder is not None:
            has_videos = has_videos or folder.kind == "videos"
            yield from folder_needs(named, folder)
    yield from model_needs(cfg)
    yield from package_needs(cfg, has_videos=has_videos, has_tables=has_tables)


def annotation_needs(named: NamedDataset) -> Iterator[Need]:
    """Yield the annotation files of the splits that are used; a generated dataset has none."""
    if not named.annotation_keys():
        yield Need(kind="generated", name=named.name, is_there=True, source="drawn at first use")
    for key in named.annotation_keys():
        for file in annotation_files(named.build_info, key, owner=named.name):
            path, name = file.found(), f"{named.name}/{key}"
            if named.builder.is_stream(key) and is_streamed(file):
                source = file.storage or file.url or ""
                yield Need(kind="annotations", name=name, is_there=True, place="read as a stream", source=source)
            elif file.hub_split:
                place, source = str(file.path()), str(file.hub_split)
                yield Need(kind="annotations", name=name, is_there=path is not None, place=place, source=source)
            else:
                yield file_need("annotations", name, path or file.path(), source=file.url or "")


def folder_needs(named: NamedDataset, folder: VisualFolder) -> Iterator[Need]:
    """Yield the archives of images of the splits that are used, or the folder if its owner publishes none."""
    archives = list(dict.fromkeys(one for split in named.splits for one in folder.archives_of(split)))
    for archive in archives:
        yield archive_need(named.name, folder, archive)
    if not archives:
        root = folder.path()
        listed = [one for split in named.splits for one in folder.listed_of(split)]
        source = "addresses in its lists" if listed else named.build_info.get("homepage") or ""
        name, place = f"{named.name}/{','.join(named.splits)}", str(root)
        yield Need(kind=folder.kind, name=name, is_there=has_files(root), place=place, source=source)


def archive_need(name: str, folder: VisualFolder, archive: ImageArchive) -> Need:
    """Return the need of an unpacked archive."""
    root = folder.path()
    return Need(
        kind=folder.kind,
        name=f"{name}/{archive.name}",
        is_there=archive.is_there(root, folder.archives),
        place=str(archive.folder(root)),
        source=archive.url,
        size=archive.size,
    )


def report(needs: Sequence[Need], found: Sequence[NamedDataset], *, recipe: str) -> list[str]:
    """Return the lines of the table, the licences, and the commands that fetch what is missing."""
    rows = [
        ("have" if need.is_there else "MISSING", need.kind, need.name, size_text(need.size), need.place, need.source)
        for need in needs
    ]
    lines = [*table(HEAD, rows), ""]
    for named in found:
        home, licence = (named.build_info.get(key) for key in ("homepage", "licence"))
        if home or licence:
            lines.append(f"{named.name}: {home or ''}{f' (licence: {licence})' if licence else ''}")
    missing = [need for need in needs if not need.is_there]
    if not missing:
        return [*lines, f"all {len(needs)} are here"]
    lines.append(f"{len(missing)} of {len(needs)} are missing")
    if any(need.kind in DATA for need in missing):
        images = " --images" if any(need.kind in DATA[1:] for need in missing) else ""
        lines.append(f"data that its owner publishes: lavis-lite data download {recipe}{images}")
    if any(need.kind not in (*DATA, "package", "program") and need.source for need in missing):
        lines.append("weights, tokenizers and references with an address are downloaded when a run starts")
    return lines
