"""`lavis-lite train --data`: the YAML of a finetuning on one's own data: a folder, a table or a data set of the hub.

The source is looked at once, to see its fields. The YAML is written beside the run, to be read and edited.
"""

import argparse
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lavis_lite.common.errors import InputError, MissingFileError
from lavis_lite.common.registry import did_you_mean

NAMES = {
    "image": ("image", "file_name", "filename", "file", "path", "image_path", "filepath", "img"),
    "caption": ("caption", "captions", "text", "title", "description"),
    "question": ("question", "query", "question_text"),
    "answer": ("answer", "answers", "direct_answers"),
    "instruction": ("instruction", "prompt"),
    "output": ("output", "response", "completion"),
    "label": ("label", "class", "category"),
}
"""Our fields, and what they are usually called."""
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
"""Our splits, and the names of sub-folders with one split each."""
FILE = "train.yaml"
HEAD = "# Made by `lavis-lite train --data`. Edit it, and train by `lavis-lite train --cfg-path`.\n"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A way to finetune: the task, and the layouts that it can read, the first whose fields are there."""

    task: str
    layouts: Mapping[str, tuple[str, ...]]
    model: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)


CAPTIONS = Kind(task="captioning", layouts={"caption": ("caption",)}, run={"init_lr": 1e-5})
PROMPTED = Kind(
    task="captioning",
    layouts={"caption": ("caption",)},
    model={"freeze_vit": True, "prompt": "a photo of"},
    preprocess={"text_processor": {"train": {"prompt": "${model.prompt} "}}},
    run={"init_lr": 1e-5},
)
INSTRUCTIONS = Kind(
    task="instruct",
    layouts={
        "instruct": ("instruction", "output"),
        "vqa_instruct": ("question", "answer"),
        "caption_instruct": ("caption",),
    },
    model={"freeze_vit": True},
    run={"init_lr": 1e-5, "metric": "accuracy"},
)
RETRIEVAL = Kind(task="retrieval", layouts={"retrieval": ("caption",)}, run={"init_lr": 1e-5})
KINDS = {
    "blip_caption": CAPTIONS,
    **dict.fromkeys(("blip2_opt", "blip2_t5", "blip2_vicuna", "blip2_llm"), PROMPTED),
    **dict.fromkeys(("blip2_t5_instruct", "blip2_vicuna_instruct"), INSTRUCTIONS),
    "blip_vqa": Kind(task="vqa", layouts={"vqa": ("question", "answer")}, run={"init_lr": 2e-5}),
    "blip_retrieval": RETRIEVAL,
    "blip2": RETRIEVAL,
    "blip_image_classification": Kind(
        task="multimodal_classification", layouts={"classification": ("label",)}, run={"init_lr": 2e-5}
    ),
}
"""Architectures that can be finetuned on one's own data by one command."""


def is_wanted(argv: Sequence[str]) -> bool:
    """Return whether a command line of `train` names data in place of a YAML."""
    return any(argument == "--data" or argument.startswith("--data=") for argument in argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of what `train --data` adds; other arguments are those of `train`."""
    p = argparse.ArgumentParser(
        description="Finetune a model on your own data. Writes the YAML that it trains by to OUT/train.yaml.",
        epilog="Further options are those of `train`: --options, --job-id, --resume auto, --profile, --dry-run.",
        allow_abbrev=False,
    )
    text = (
        "a folder of images (with .txt files, a metadata file or sub-folders as classes; or with train/ and val/), a "
        "table (.csv, .tsv, .json, .jsonl, .parquet), or hf://owner/name"
    )
    p.add_argument("--data", required=True, metavar="SOURCE", help=text)
    p.add_argument("--model", required=True, metavar="ARCH/TYPE", help="e.g. blip_caption/base_coco")
    p.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder of the YAML and of the run")
    p.add_argument("--images", metavar="FOLDER", help="where a table's paths start (default: the table's folder)")
    text = "names of the fields in your data, e.g. caption=text image=file_name"
    p.add_argument("--columns", nargs="+", action="extend", default=[], metavar="FIELD=COLUMN", help=text)
    text = "share of the images to validate on, where the data have no split of their own (default: 0.1)"
    p.add_argument("--val-share", type=float, default=0.1, metavar="SHARE", help=text)
    p.add_argument("--epochs", type=int, default=5, metavar="N", help="times through the data (default: 5)")
    p.add_argument("--batch-size", type=int, default=16, metavar="N", help="images per step and process (default: 16)")
    return p


def arguments(argv: Sequence[str]) -> list[str]:
    """Write the YAML that a command line with `--data` asks for; return the command line that trains by it.

    Raises:
        InputError: a model that this cannot finetune, fields that cannot be found, or an edited YAML in the place.
    """
    args, others = parser().parse_known_args(["--help"] if {"-h", "--help"} & set(argv) else argv)
    if any(other.partition("=")[0] == "--cfg-path" for other in others):
        raise InputError("--data: writes its own YAML; give --data or --cfg-path")
    path = args.out / FILE
    _write(path, yaml.safe_dump(configuration(args), sort_keys=False, allow_unicode=True))
    return ["--cfg-path", str(path), *others]


def configuration(args: argparse.Namespace) -> dict[str, Any]:
    """Return the content of the YAML."""
    arch, _, model_type = args.model.partition("/")
    if arch not in KINDS:
        raise InputError(f"--model {args.model}: {did_you_mean(arch, KINDS)} These are finetuned by --data: {[*KINDS]}")
    if not model_type:
        raise InputError(f"--model {args.model}: write ARCH/TYPE; `lavis-lite models` lists the types")
    kind = KINDS[arch]
    parts = _splits(args.data)
    layout, columns, found = choose_layout(kind, parts["train"], _mapping(args.columns))
    dataset: dict[str, Any] = {"layout": layout}
    if columns:
        dataset["columns"] = columns
    if "val" not in parts:
        dataset["split_off"] = {"val": args.val_share}
    build_info: dict[str, Any] = {"annotations": {split: {"storage": source} for split, source in parts.items()}}
    images = args.images or _images_of(parts["train"])
    if images:
        build_info["images"] = {"storage": str(Path(images).absolute())}
    dataset["build_info"] = build_info
    model = {"arch": arch, "model_type": model_type, **kind.model}
    if layout == "classification":
        model["num_classes"] = len(_classes(parts["train"], found))
    run = {
        "task": kind.task,
        "train_splits": ["train"],
        "valid_splits": ["val"],
        "test_splits": ["test"] if "test" in parts else [],
        "max_epoch": args.epochs,
        "early_stopping": 3,
        "batch_size_train": args.batch_size,
        "batch_size_eval": args.batch_size,
        "num_workers": min(4, os.cpu_count() or 1),
        **kind.run,
        "output_dir": str(args.out),
    }
    preprocess = {"preprocess": dict(kind.preprocess)} if kind.preprocess else {}
    return {"model": model, **preprocess, "datasets": {"own": dataset}, "run": run}


def choose_layout(
    kind: Kind, source: str, given: Mapping[str, str]
) -> tuple[str, dict[str, str], Mapping[str, Any] | None]:
    """Return the layout, the columns that have other names than ours, and the source's first record (None if it
    cannot be looked at here).
    """
    found = first_record(source)
    names = [*found] if found is not None else []
    if "caption" not in given and any("caption" in wanted for wanted in kind.layouts.values()):
        check_text_files(source)
    for layout, wanted in kind.layouts.items():
        columns = {}
        for name in ("image", *wanted):
            theirs = given.get(name) or next((usual for usual in NAMES[name] if usual in names), None)
            if theirs is not None:
                columns[name] = theirs
        if found is None or all(name in columns for name in ("image", *wanted)):
            for name, theirs in given.items():
                if found is not None and theirs not in found:
                    raise InputError(f"--columns {name}={theirs}: {source} has no such field. It has {names}")
            return layout, {name: theirs for name, theirs in {**given, **columns}.items() if name != theirs}, found
    wanted_by = " or ".join(" + ".join(("image", *wanted)) for wanted in kind.layouts.values())
    raise InputError(
        f"--data {source}: {kind.task} needs the fields {wanted_by}; found {names}. Name them by --columns, e.g. "
        f"--columns {next(iter(kind.layouts.values()))[0]}=name"
    )


def check_text_files(source: str) -> None:
    """Raise InputError for a folder of images without a table whose `.txt` files are missing, all or some."""
    from lavis_lite.datasets.folders import folder_records, metadata_file
    from lavis_lite.datasets.tables import is_saved

    path = Path(source)
    if not path.is_dir() or is_saved(path) or metadata_file(path) is not None:
        return
    records = folder_records(path)
    if without := [record["image"] for record in records if "caption" not in record]:
        count = f"{len(without):,} of {len(records):,} images have no .txt file, e.g. {without[0]}"
        advice = f"write each one's text beside it (`lavis-lite caption {source} --sidecars` writes drafts)"
        raise InputError(f"--data {source}: {count}: {advice}, or move them away")


def first_record(source: str) -> Mapping[str, Any] | None:
    """Return a record that shows a source's fields; None of the hub and of shards, which are not looked at."""
    from lavis_lite.datasets.annotations import read_records
    from lavis_lite.datasets.folders import folder_records, metadata_file
    from lavis_lite.datasets.hub import is_hub
    from lavis_lite.datasets.shards import is_shard
    from lavis_lite.datasets.tables import is_saved, is_table, open_tables

    path = Path(source)
    if is_hub(source) or is_shard(path):
        return None
    if is_saved(path):
        return dict(open_tables([path], split="train")[0])
    if path.is_dir():
        metadata = metadata_file(path)
        if metadata is None:
            return folder_records(path)[0]
        path = metadata
    if not path.is_file():
        raise MissingFileError(f"--data {source}: no such file or folder")
    return dict(open_tables([path], split="train")[0]) if is_table(path) else read_records(path)[0]


def _splits(source: str) -> dict[str, str]:
    """Return the source of each split: a folder's sub-folders named after splits, or the whole as `train`."""
    from lavis_lite.datasets.hub import is_hub
    from lavis_lite.datasets.tables import is_saved

    if is_hub(source):
        return {"train": source}
    path = Path(source).expanduser().absolute()
    if path.is_dir() and not is_saved(path):
        parts = {split: str(path / name) for split, names in SPLITS.items() for name in names if (path / name).is_dir()}
        if "train" in parts:
            return parts
    return {"train": str(path)}


def _images_of(source: str) -> str | None:
    """Return the folder that a table's paths are relative to."""
    return str(Path(source).parent) if Path(source).is_file() else None


def _classes(source: str, found: Mapping[str, Any] | None) -> list[str]:
    """Return the names of a folder's classes. Raises InputError where they are not its sub-folders."""
    from lavis_lite.datasets.folders import class_names

    if not Path(source).is_dir() or found is None or "folder" not in found:
        raise InputError(f"--data {source}: classes are sub-folders of images; for labels in a table write a YAML")
    return class_names(Path(source))


def _mapping(columns: Sequence[str]) -> dict[str, str]:
    """Return `FIELD=COLUMN` arguments as a dictionary."""
    pairs = [column.partition("=") for column in columns]
    for name, equals, theirs in pairs:
        if not equals or not theirs or name not in NAMES:
            raise InputError(f"--columns {name}{equals}{theirs}: write FIELD=COLUMN with a FIELD of {[*NAMES]}")
    return {name: theirs for name, _, theirs in pairs}


def _write(path: Path, content: str) -> None:
    """Write the YAML, in the place of one that this command made and nobody edited. InputError if another is there."""
    from lavis_lite.common.checkpoint import write_text

    if path.is_file():
        head, _, old = path.read_text(encoding="utf-8").partition("\n")
        if head != _head(old):
            raise InputError(
                f"{path}: was edited or is of another origin. Train by it with --cfg-path {path}, remove it, or name "
                "another --out"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f"{_head(content)}\n{content}")


def _head(content: str) -> str:
    """Return the first line of a YAML of this content, whose digest tells whether it was edited."""
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    return f"# Made by `lavis-lite train --data` ({digest}). Edit it, and train by `lavis-lite train --cfg-path`."
