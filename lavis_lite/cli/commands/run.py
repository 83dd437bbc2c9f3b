"""A pipeline over many images from the command line: progress, results as they come, resume, several processes."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lavis_lite.cli.commands.common import ResumableOptions
from lavis_lite.cli.commands.progress import progress
from lavis_lite.common import dist
from lavis_lite.common.checkpoint import write_text
from lavis_lite.common.errors import ExistingFileError, InputError
from lavis_lite.common.page.render import plural
from lavis_lite.common.rng import seed_everything
from lavis_lite.inference.inputs import Item, column_of, find_items
from lavis_lite.inference.pipelines import PIPELINES
from lavis_lite.inference.results import Results, key_of, write_rows

logger = logging.getLogger(__name__)
Row = dict[str, Any]
SHOWN_ERRORS = 5


@dataclass(kw_only=True)
class Job:
    """A pipeline over the images of a command line."""

    task: str
    options: ResumableOptions
    settings: dict[str, Any]
    """Settings of the pipeline's call."""
    text: str
    """The field that is printed, or written to a sidecar."""
    column: str | None = None
    """Column of a table with each image's question."""
    seed: int = 42
    edit: Callable[[Row], Row] = dict
    """Makes a row of the output from a result."""

    def run(self, out: Path | None, sidecars: bool = False) -> int:
        """Compute what is not there yet, and write or print it. Returns the exit code: 1 if no image could be read."""
        PIPELINES[self.task].check_model(self.options.model)
        dist.init(self.options.device)
        try:
            items = find_items(self.options.paths, column=self.options.image_column)
            if sidecars:
                return self._to_sidecars(items)
            return self._print(items) if out is None else self._to_file(out, items)
        finally:
            dist.shutdown()

    def results(self, items: Sequence[Item]) -> Iterator[Row]:
        """Yield the results of items, with progress; no model is loaded without items."""
        if not items:
            return
        settings = dict(self.settings)
        if self.column is not None:
            settings["question"] = column_of(items, self.column, "--question-column")
        options, kind = self.options, PIPELINES[self.task]
        pipeline = kind(options.load(), batch_size=options.batch_size, num_threads=options.num_threads)
        seed_everything(self.seed + dist.rank())
        yield from progress(pipeline.stream(items, skip_unreadable=True, **settings), len(items))

    def _print(self, items: Sequence[Item]) -> int:
        errors = []
        for row in self.results(items[dist.rank() :: dist.world_size()]):
            if "error" in row:
                errors.append(row)
            else:
                tqdm.write(f"{row['image']}\t{_shown(self.edit(row)[self.text])}", file=sys.stdout)
        errors = dist.gather_objects(errors)
        return report(len(items) - len(errors), errors, "")

    def _to_file(self, out: Path, items: Sequence[Item]) -> int:
        options = self.options
        made_with: dict[str, Any] = {
            "task": self.task,
            "model": options.model,
            "checkpoint": options.checkpoint,
            "seed": self.seed,
        }
        made_with |= {"option": options.option, "question_column": self.column, **self.settings}
        results = Results(out, made_with, resume=options.resume, overwrite=options.overwrite)
        if results.is_complete:
            return finished(out)
        with results:
            missing = [item for item in items if self.key(item) not in results.rows]
            for row in self.results(missing[dist.rank() :: dist.world_size()]):
                results.add(row)
            rows = results.finish([self.key(item) for item in items])
        written = [self.edit(row) for row in rows if "error" not in row]
        if dist.is_main():
            write_rows(out, written)
            results.remove_partial()
        return report(len(written), [row for row in rows if "error" in row], str(out), listed=skipped_of(out))

    def _to_sidecars(self, items: Sequence[Item]) -> int:
        """Write each text beside its image; with `--resume` those that have one are left out."""
        options = self.options
        if remote := [item.name for item in items if not isinstance(item.image, Path)]:
            raise InputError(f"--sidecars: {remote[0]} is not a file; a URL has no folder for its .txt")
        there = [item for item in items if sidecar_of(item).exists()]
        if there and not (options.resume or options.overwrite):
            raise ExistingFileError(
                f"{sidecar_of(there[0])} exists already, as {len(there):,} of {len(items):,} do: --resume keeps them, "
                "--overwrite replaces them"
            )
        dist.barrier()
        missing = items if options.overwrite else [item for item in items if not sidecar_of(item).exists()]
        mine, errors = missing[dist.rank() :: dist.world_size()], []
        for item, row in zip(mine, self.results(mine), strict=True):
            if "error" in row:
                errors.append(row)
            else:
                write_text(sidecar_of(item), self.edit(row)[self.text] + "\n")
        errors = dist.gather_objects(errors)
        return report(len(missing) - len(errors), errors, ".txt files beside the images")

    def key(self, item: Item) -> str:
        """Return what identifies the item's result."""
        question = self.settings.get("question") if self.column is None else item.fields.get(self.column)
        return key_of({"image": item.name, "question": question})


def finished(out: Path) -> int:
    """Say that an output is complete; returns the exit code."""
    if dist.is_main():
        print(f"{out} is finished already; --overwrite computes it anew", file=sys.stderr)
    return 0


def sidecar_of(item: Item) -> Path:
    """Return the text file beside an item's image."""
    return Path(str(item.image)).with_suffix(".txt")


def skipped_of(out: Path) -> Path:
    """Return the file that lists the images that an output lacks."""
    return out.with_name(f"skipped_{out.name}.txt")


def report(count: int, errors: Sequence[Mapping[str, Any]], where: str, *, listed: Path | None = None) -> int:
    """Print what was done and which images could not be read; `listed` is a file for all of their names, which is
    removed if there are none. Returns the exit code: 1 if no image could be read.
    """
    if not dist.is_main():
        return 0 if count or not errors else 1
    if listed is not None and errors:
        write_text(listed, "".join(f"{row['image']}\n" for row in errors))
    elif listed is not None:
        listed.unlink(missing_ok=True)
    for row in errors[:SHOWN_ERRORS]:
        print(f"skipped: {row['error']}", file=sys.stderr)
    if len(errors) > SHOWN_ERRORS:
        print(f"skipped: {plural(len(errors) - SHOWN_ERRORS, 'more image')}", file=sys.stderr)
    if where:
        skipped = f"; {plural(len(errors), 'image')} could not be read" if errors else ""
        skipped += f": {listed}" if errors and listed is not None else ""
        print(f"{plural(count, 'result')}: {where}{skipped}", file=sys.stderr)
    return 0 if count or not errors else 1


def _shown(value: Any) -> str:
    """Return a text as it is, scores with four digits."""
    if isinstance(value, str):
        return value
    return json.dumps(json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 4)), ensure_ascii=False)
