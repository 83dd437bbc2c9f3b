"""The command `lavis-lite convert`, also installed as `lavis-lite-convert`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_lite.common.config.adapters import ADAPTER_KEYS
from lavis_lite.common.errors import InputError
from lavis_lite.common.registry import registry

if TYPE_CHECKING:
    from lavis_lite.models.base import BaseModel

HELP = """Turn LAVIS's weights into a Hugging Face folder, or such a folder into a LAVIS file, without loss.

examples (docs/weights.md has more):
  lavis-lite convert to-hf blip2_opt pretrain_opt2.7b blip2-opt-2.7b
  lavis-lite convert to-hf blip2_t5 caption_coco_flant5xl captioner --checkpoint output/checkpoint_best.pth \\
      --precision bf16 --options t5_model=/models/flan-t5-xl
  lavis-lite convert to-lavis Salesforce/blip-vqa-base blip_vqa.pth
  lavis-lite convert consolidate output/my_run/JOB/checkpoint_last.pth checkpoint.pth"""
PLACES = (
    *("tokenizer", "vit_weights", "vit_precision", "llm_precision", "opt_model", "t5_model", "llm_model"),
    *(*ADAPTER_KEYS, "llm_quantization", "llm_device_map"),
)
"""Keys of a model section that a folder leaves out, as it has its own tokenizers and weights."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `lavis-lite-convert`; ends the process, with exit code 2 after a user's mistake."""
    sys.exit(run(argv))


def run(argv: Sequence[str] | None) -> int:
    """Parse, convert, and return the exit code."""
    args = parser().parse_args(argv)
    from lavis_lite.cli.failures import exit_code  # after --help, which needs no torch
    from lavis_lite.common import logger as run_logger

    run_logger.setup()
    return exit_code(lambda: print(args.convert(args)))


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="lavis-lite convert", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = p.add_subparsers(required=True, metavar="to-hf | to-lavis | consolidate")
    to_hf = ways.add_parser("to-hf", help="write a Hugging Face folder")
    to_hf.set_defaults(convert=write_hf)
    to_hf.add_argument("arch", help="architecture, such as blip2_opt")
    to_hf.add_argument("type", help="model type, such as pretrain_opt2.7b")
    to_hf.add_argument("target", help="folder to write")
    to_hf.add_argument("--checkpoint", metavar="PATH", help="file or URL to load instead of the type's own weights")
    to_hf.add_argument("--adapter", metavar="FOLDER", help="write adapters (LoRA) there for peft, instead of merging")
    to_hf.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one weight file (default 5GB)")
    text = "upload the folder to the hub, as a private repository; asks first"
    to_hf.add_argument("--push", metavar="OWNER/NAME", help=text)
    to_lavis = ways.add_parser("to-lavis", help="write a .pth file")
    to_lavis.set_defaults(convert=write_lavis)
    to_lavis.add_argument("source", help="Hugging Face folder or hub id, or a checkpoint of train.py")
    to_lavis.add_argument("target", help="file to write")
    to_lavis.add_argument("--arch", help="architecture, where the folder's class serves several")
    to_lavis.add_argument("--trainable-only", action="store_true", help="leave out frozen parts, as LAVIS's files do")
    for way in (to_hf, to_lavis):
        text = "of the language model and BLIP-2's image encoder (default fp32, which loses nothing)"
        way.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help=text)
        way.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the model section")
    join = ways.add_parser("consolidate", help="make one file of a sharded checkpoint (run.checkpoint: sharded)")
    join.set_defaults(convert=consolidate)
    join.add_argument("source", type=Path, help="its file, such as JOB/checkpoint_last.pth, or the job's folder")
    join.add_argument("target", help="file to write, such as run.checkpoint: full would have written")
    for way in (to_hf, to_lavis, join):
        way.add_argument("--overwrite", action="store_true", help="replace what is there already")
    return p


def write_hf(args: argparse.Namespace) -> str:
    """Write a model type, or a checkpoint, as a folder; return the line to print."""
    from lavis_lite.common.config.sections import MODEL_KEYS
    from lavis_lite.common.config.zoo import model_zoo
    from lavis_lite.convert.card import Origin, check_push, push
    from lavis_lite.convert.folders import adapter_of, check_target, write_folder
    from lavis_lite.models.loading import build, configured

    model_zoo.path(args.arch, args.type)
    adapter_of(registry.get_model_class(args.arch), arch=args.arch).hf_class(args.arch)
    if args.push is not None:
        check_push(args.push)
    for folder in filter(None, (args.target, args.adapter)):
        check_target(folder, overwrite=args.overwrite)
    overrides = _precisions(args.arch, args.precision) | _overrides(args.options)
    layers, tree = configured(args.arch, args.type, args.checkpoint, overrides, level=logging.INFO)
    model = build(tree["model"], layers, is_eval=True, device="cpu", checkpoint=args.checkpoint)
    _lower(model, args.arch, args.precision)
    write_folder(
        model,
        args.target,
        arch=args.arch,
        settings={key: value for key, value in tree["model"].items() if key not in (*MODEL_KEYS, *PLACES)},
        preprocess=tree.get("preprocess", {}),
        adapter=args.adapter,
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
        origin=Origin(model_type=args.type, checkpoint=args.checkpoint),
    )
    line = f"{args.arch}/{args.type} written to {args.target}"
    return line if args.push is None else f"{line}\n{push(Path(args.target).expanduser(), args.push)}"


def write_lavis(args: argparse.Namespace) -> str:
    """Write a folder or checkpoint as a file; return the line to print."""
    from lavis_lite.common.config.sections import MODEL_KEYS
    from lavis_lite.common.sources.download import is_folder
    from lavis_lite.convert.folders import check_target, write_checkpoint
    from lavis_lite.models.loading import arch_in, build, described

    check_target(args.target, overwrite=args.overwrite)
    arch = arch_in(args.source, args.arch)
    overrides = _precisions(arch, args.precision) | _overrides(args.options)
    layers, tree = described(args.source, arch, overrides)
    model = build(tree["model"], layers, is_eval=True, device="cpu", checkpoint=args.source)
    _lower(model, arch, args.precision)
    left_out = (*ADAPTER_KEYS, *(key for key in MODEL_KEYS if key not in ("arch", "model_type")))
    section = {key: value for key, value in tree["model"].items() if key not in left_out}
    config = None if is_folder(args.source) else {"model": section, "preprocess": tree.get("preprocess", {})}
    write_checkpoint(model, args.target, config=config, trainable_only=args.trainable_only, overwrite=args.overwrite)
    return f"{args.source} ({arch}) written to {args.target}"


def consolidate(args: argparse.Namespace) -> str:
    """Write a sharded checkpoint as one file; return the line to print."""
    from lavis_lite.common import checkpoint, checkpoint_parts
    from lavis_lite.convert.folders import check_target
    from lavis_lite.runners.jobs import LAST

    path = args.source / LAST if args.source.is_dir() else args.source
    check_target(args.target, overwrite=args.overwrite)
    saved = checkpoint.load(path)
    if not checkpoint_parts.is_sharded(saved):
        raise InputError(f"{path}: is not a sharded checkpoint: it is one file already, which can be copied")
    checkpoint.save(checkpoint_parts.read(saved, path), args.target)
    return f"{path} written to {args.target}"


def _overrides(options: Sequence[str]) -> dict[str, Any]:
    """Return options as keys of the model section; the prefix `model.` may be left out."""
    from lavis_lite.common.config.files import parse_options

    tree = parse_options(options).tree
    return tree.pop("model", {}) | tree


def _precisions(arch: str, precision: str) -> dict[str, Any]:
    """Return overrides that load frozen parts in their stored precision, and not in that of the device."""
    from lavis_lite.common.config.schema import schema_of

    schema, _ = schema_of(registry.get_model_class(arch))
    wanted: dict[str, Any] = {"vit_precision": "fp32", "llm_precision": precision}
    wanted |= {"llm_quantization": None, "llm_device_map": None}
    return {key: value for key, value in wanted.items() if key in schema}


def _lower(model: "BaseModel", arch: str, precision: str) -> None:
    """Cast the image encoder of BLIP-2 to the precision of the arguments."""
    if precision == "bf16" and "vit_precision" in _precisions(arch, precision):
        model.get_submodule("visual_encoder").bfloat16()


if __name__ == "__main__":
    main()
