"""An index of a folder's images: their features, kept on disk, compared with those of a text or an image."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lavis_lite.common.bounds import check_number
from lavis_lite.common.checkpoint import atomic_write, write_text
from lavis_lite.common.errors import InputError
from lavis_lite.common.precision import autocast
from lavis_lite.common.sources import download
from lavis_lite.datasets.image import opening_settings
from lavis_lite.inference.inputs import Item, find_items, load_image
from lavis_lite.inference.pipelines import EmbedPipeline
from lavis_lite.models.image_text import ImageTextModel
from lavis_lite.models.protocols import ScoresPairs
from lavis_lite.nn.fingerprint import fingerprint

logger = logging.getLogger(__name__)
Progress = Callable[[Iterable[dict[str, Any]], int], Iterator[dict[str, Any]]]
ROWS_PER_STEP = 65_536
SHOWN_ERRORS = 5
MAX_HITS = 10**6


class Hit(NamedTuple):
    """An image that was found."""

    image: str
    score: float


class ImageIndex:
    """Features of the images below `folder`, as `pipeline` computes them.

    It is in `storage` (default: a folder of the cache): `features.npy`, and `files.json` with each row's path, size and
    time of change.
    """

    def __init__(self, folder: str | Path, pipeline: EmbedPipeline, *, storage: str | Path | None = None) -> None:
        self.folder, self.pipeline = Path(folder), pipeline
        self.made_by = f"{fingerprint(pipeline.model)} {opening_settings(pipeline.loaded.process_image)}"
        """The weights and the way files are opened, on which the features depend besides the images."""
        key = hashlib.sha256(f"{self.folder.resolve()}\n{self.made_by}".encode()).hexdigest()[:16]
        self.storage = download.cache_dir() / "search" / key if storage is None else Path(storage)
        self.files: list[list[Any]] = []
        self.features = np.zeros((0, 0), dtype=np.float32)
        self._read()

    def update(self, progress: Progress | None = None) -> None:
        """Compute the features of new and changed files, leave out those that are gone, and write the index."""
        items = find_items([self.folder])
        stamps = [_stamp(item) for item in items]
        known = {tuple(entry): row for row, entry in enumerate(self.files)}
        missing = [item for item, stamp in zip(items, stamps, strict=True) if tuple(stamp) not in known]
        made: dict[str, np.ndarray] = {}
        errors: list[str] = []
        if missing:
            results = self.pipeline.stream(missing, skip_unreadable=True)
            for result in results if progress is None else progress(results, len(missing)):
                if "error" in result:
                    errors.append(result["error"])
                else:
                    made[result["image"]] = result["features"]
        for error in errors[:SHOWN_ERRORS]:
            logger.warning("skipped: %s", error)
        if len(errors) > SHOWN_ERRORS:
            logger.warning("skipped: %s more images", f"{len(errors) - SHOWN_ERRORS:,}")
        kept = [stamp for stamp in stamps if tuple(stamp) in known or stamp[0] in made]
        if kept == self.files:
            return
        rows = [self.features[known[tuple(stamp)]] if tuple(stamp) in known else made[stamp[0]] for stamp in kept]
        if not rows:
            raise InputError(f"{self.folder}: none of its images could be read")
        self.files, self.features = kept, np.stack(rows)
        self._write()

    @torch.no_grad()
    def by_text(self, text: str, *, k: int, rerank: int = 0) -> list[Hit]:
        """Return the `k` images most similar to a text; with `rerank` the matching head ranks so many of the best anew,
        by its probability of a match plus the similarity.
        """
        check_number("k", k, 1, MAX_HITS)
        check_number("rerank", rerank, 0, MAX_HITS)
        if rerank and not isinstance(self.pipeline.model, ScoresPairs):
            name = type(self.pipeline.model).__name__
            raise InputError(
                f"rerank: {name} has no matching head; set rerank to 0, or choose blip_retrieval, blip2 ..."
            )
        similarities = self._similarities(torch.from_numpy(self.pipeline.texts([text])))
        hits = self._best(similarities, max(k, rerank))
        if rerank:
            hits = sorted(self._reranked(text, hits[:rerank]), key=lambda hit: -hit.score) + hits[rerank:]
        return hits[:k]

    @torch.no_grad()
    def by_image(self, image: str | Path, *, k: int) -> list[Hit]:
        """Return the `k` images most similar to an image, by their best pair of features."""
        check_number("k", k, 1, MAX_HITS)
        item = Item(name=str(image), image=image)
        processed = load_image(item, self.pipeline.loaded.process_image)[None].to(self.pipeline.loaded.device)
        with autocast(self.pipeline.loaded.device, self.pipeline.loaded.dtype):
            feature = self.pipeline.image_features(processed)[0].float().cpu()
        return self._best(self._similarities(torch.atleast_2d(feature)), k)

    def _similarities(self, features: Tensor) -> Tensor:
        """Return the similarity (N,) of each image to features (M,D): the largest of all pairs."""
        parts = []
        for start in range(0, len(self.features), ROWS_PER_STEP):
            rows = torch.from_numpy(np.ascontiguousarray(self.features[start : start + ROWS_PER_STEP]))
            parts.append((rows.reshape(len(rows), -1, rows.shape[-1]) @ features.T).flatten(1).amax(dim=1))
        return torch.cat(parts)

    def _best(self, similarities: Tensor, k: int) -> list[Hit]:
        best = similarities.topk(min(k, len(similarities)))
        return [
            Hit(self.files[row][0], value)
            for row, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def _reranked(self, text: str, hits: Sequence[Hit]) -> list[Hit]:
        loaded = self.pipeline.loaded
        model = loaded.model
        assert isinstance(model, ImageTextModel)
        ids, mask = model.cut_texts([loaded.process_text(text)])
        found = []
        for hit in hits:
            image = load_image(Item(name=hit.image, image=Path(hit.image)), loaded.process_image)[None]
            with autocast(loaded.device, loaded.dtype):
                logits = model.matching_logits(ids, mask, model.image_context(image.to(loaded.device)))
            found.append(Hit(hit.image, hit.score + float(logits.float().softmax(dim=1)[0, 1])))
        return found

    def _read(self) -> None:
        names, features = self.storage / "files.json", self.storage / "features.npy"
        if names.is_file() and features.is_file():
            content = json.loads(names.read_text())
            found = np.load(features, mmap_mode="c", allow_pickle=False)  # not "r": torch warns of it
            if content["made_by"] == self.made_by and len(found) == len(content["files"]):
                self.files, self.features = content["files"], found

    def _write(self) -> None:
        self.storage.mkdir(parents=True, exist_ok=True)
        (self.storage / "files.json").unlink(missing_ok=True)  # first: features without their names are not read
        buffer = io.BytesIO()
        np.save(buffer, self.features)
        atomic_write(self.storage / "features.npy", lambda file: file.write(buffer.getbuffer()))
        write_text(self.storage / "files.json", json.dumps({"made_by": self.made_by, "files": self.files}))


def _stamp(item: Item) -> list[Any]:
    """Return path, size and time of change of an item's file."""
    status = Path(str(item.image)).stat()
    return [item.name, status.st_size, status.st_mtime_ns]
