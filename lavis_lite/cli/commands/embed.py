"""The output of the command `embed`: the features of all images in one array or table.

Until the end they are lines of the unfinished output, as of the other commands, with their bytes as base64.
"""

import base64
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lavis_lite.cli.commands.common import ResumableOptions, lines_of
from lavis_lite.cli.commands.progress import progress
from lavis_lite.cli.commands.run import finished, report, skipped_of
from lavis_lite.common import dist
from lavis_lite.common.checkpoint import atomic_write, write_text
from lavis_lite.common.errors import InputError
from lavis_lite.common.page.render import plural
from lavis_lite.inference.inputs import find_items
from lavis_lite.inference.pipelines import EmbedPipeline
from lavis_lite.inference.results import Results, key_of, write_rows

FORMATS = (".npy", ".parquet")


def embed_to(out: Path, options: ResumableOptions, features: str) -> int:
    """Write features as a .npy file with its ids, or as a .parquet table.

    Returns the exit code: 1 if no image could be read.
    """
    made_with = {name: vars(options)[name] for name in ("model", "checkpoint", "option")} | {"features": features}
    EmbedPipeline.check_model(options.model)
    dist.init(options.device)
    try:
        results = Results(out, made_with, resume=options.resume, overwrite=options.overwrite, formats=FORMATS)
        items = find_items(options.paths, column=options.image_column)
        if results.is_complete:
            return finished(out)
        keys = [key_of({"image": item.name}) for item in items]
        with results:
            missing = [item for item, key in zip(items, keys, strict=True) if key not in results.rows]
            mine = missing[dist.rank() :: dist.world_size()]
            if mine:
                pipeline = EmbedPipeline(options.load(), batch_size=options.batch_size, num_threads=options.num_threads)
                for row in progress(pipeline.stream(mine, skip_unreadable=True, features=features), len(mine)):
                    results.add(row if "error" in row else packed(row))
            rows = results.finish(keys)
        whole = [row for row in rows if "error" not in row]
        if dist.is_main():
            if whole:
                write_features(out, [row["image"] for row in whole], np.stack([unpacked(row) for row in whole]))
            results.remove_partial()
        return report(len(whole), [row for row in rows if "error" in row], str(out), listed=skipped_of(out))
    finally:
        dist.shutdown()


def embed_texts_to(out: Path, options: ResumableOptions, features: str) -> int:
    """Write features of texts, the lines of the files that `options.paths` names; returns the exit code."""
    EmbedPipeline.check_model(options.model)
    Results(out, {}, overwrite=options.overwrite, formats=FORMATS)  # refuses what cannot be written
    texts = [line for path in options.paths for line in lines_of(Path(path))]
    if not texts:
        raise InputError(f"{options.paths[0]}: has no text; write one per line")
    found = EmbedPipeline(options.load()).texts(texts, features=features)
    write_features(out, texts, found, column="text")
    print(f"{plural(len(texts), 'result')}: {out}", file=sys.stderr)
    return 0


def packed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result whose features are a text."""
    features = np.asarray(row["features"], dtype=np.float32)
    return {**row, "features": base64.b64encode(features.tobytes()).decode(), "shape": features.shape}


def unpacked(row: Mapping[str, Any]) -> np.ndarray:
    """Return the features of a `packed` result."""
    features = np.frombuffer(base64.b64decode(row["features"]), dtype=np.float32)
    return features.reshape(row["shape"])


def write_features(out: Path, ids: Sequence[str], features: np.ndarray, *, column: str = "image") -> None:
    """Write features (N, ...) and their ids, in a table's `column`."""
    if out.suffix == ".parquet":
        write_rows(out, [{column: name, "features": row.tolist()} for name, row in zip(ids, features, strict=True)])
        return
    atomic_write(out, lambda file: np.save(file, features))
    write_text(out.with_suffix(".ids.txt"), "".join(f"{name}\n" for name in ids))
