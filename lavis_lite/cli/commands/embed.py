"""The output of the command `embed`: the features of all images in one array or table."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lavis_lite.cli.commands.common import ImageOptions
from lavis_lite.cli.commands.progress import progress
from lavis_lite.cli.commands.run import report, skipped_of
from lavis_lite.common import dist
from lavis_lite.common.checkpoint import atomic_write, write_text
from lavis_lite.common.errors import ExistingFileError, InputError
from lavis_lite.inference.inputs import find_items
from lavis_lite.inference.pipelines import EmbedPipeline
from lavis_lite.inference.results import check_folder, write_rows


def embed_to(out: Path, options: ImageOptions, features: str) -> int:
    """Write features as a .npy file with its ids, or as a .parquet table; they are in memory until the end.

    Returns the exit code: 1 if no image could be read.
    """
    if out.suffix not in (".npy", ".parquet"):
        raise InputError(f"--out {out}: the ending must be .npy or .parquet")
    check_folder(out)
    if out.exists() and not options.overwrite:
        raise ExistingFileError(f"--out {out} exists already: --overwrite replaces it")
    dist.init(options.device)
    try:
        items = find_items(options.paths, column=options.image_column)
        pipeline = EmbedPipeline(options.load(), batch_size=options.batch_size, num_threads=options.num_threads)
        mine = items[dist.rank() :: dist.world_size()]
        found = progress(pipeline.stream(mine, skip_unreadable=True, features=features), len(mine))
        rows = {row["image"]: row for row in dist.gather_objects(list(found))}
        whole = [rows[item.name] for item in items if "error" not in rows[item.name]]
        if whole and dist.is_main():
            write_features(out, [row["image"] for row in whole], np.stack([row["features"] for row in whole]))
        return report(len(whole), [row for row in rows.values() if "error" in row], str(out), listed=skipped_of(out))
    finally:
        dist.shutdown()


def write_features(out: Path, ids: Sequence[str], features: np.ndarray) -> None:
    """Write features (N, ...) and their ids."""
    if out.suffix == ".parquet":
        write_rows(out, [{"image": name, "features": row.tolist()} for name, row in zip(ids, features, strict=True)])
        return
    atomic_write(out, lambda file: np.save(file, features))
    write_text(out.with_suffix(".ids.txt"), "".join(f"{name}\n" for name in ids))
