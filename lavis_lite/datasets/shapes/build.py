"""Write the dataset `shapes` to disk: JPEG images, annotations in the benchmarks' own formats, and the true scenes.

The same config gives the same bytes: every random draw comes from a generator seeded by (seed, purpose, split, image).
The folder is written under another name and renamed as a whole, so a folder with the right name is complete.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from lavis_lite.common.errors import MissingFileError, WriteError
from lavis_lite.common.locks import Lock
from lavis_lite.common.progress import progress
from lavis_lite.datasets.shapes.language import MEANINGLESS_TEXTS, captions, full_captions
from lavis_lite.datasets.shapes.questions import Question, QuestionGenerator, statement
from lavis_lite.datasets.shapes.render import save_jpeg
from lavis_lite.datasets.shapes.scene import SPLITS, Scene, SceneMaker, ShapesConfig
from lavis_lite.datasets.shapes.truth import is_true

logger = logging.getLogger(__name__)

FORMAT = 1  # goes up when the same config gives other content
ANNOTATIONS = ("caption", "retrieval", "nlvr", "pairs")
"""The annotation files that every split has."""
ABANDONED = 60.0  # seconds
_ID_STEP = 1_000_000  # image ids of train start at 0, of val and test at one and two times this


def ensure_built(config: ShapesConfig, root: Path) -> Path:
    """Return the dataset's folder below `root`, built if need be; safe with several processes, and when killed.

    Raises MissingFileError if files were deleted from it, WriteError if the disk is full.
    """
    config.check()
    content = json.dumps({"format": FORMAT, **config.resolved()}, sort_keys=True)
    target = root / hashlib.sha256(content.encode()).hexdigest()[:12]
    if target.is_dir():
        check_complete(config, target)
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        _build_aside(config, target)
    except OSError as error:
        if not target.is_dir():  # else another process was faster, with the same content
            raise not_written(target, error) from error
    return target


def _build_aside(config: ShapesConfig, target: Path) -> None:
    """Build in a locked folder beside the target, and rename it when it is complete."""
    logger.info("building the dataset shapes in %s", target)
    _sweep(target.parent, prefix=f".{target.name}-")
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    lock = Lock(aside)
    try:
        _lock(lock)
        build(config, aside)
        aside.chmod(0o755)
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    finally:
        lock.release()


def not_written(path: Path, error: OSError) -> WriteError:
    """Return the error about a file or folder of the dataset that could not be written."""
    return WriteError(
        error.errno,
        f"the dataset shapes could not be written to {path} ({error.strerror}): free some space there, or set the "
        "environment variable LAVIS_LITE_DATA to another folder",
    )


def check_complete(config: ShapesConfig, folder: Path) -> None:
    """Raise MissingFileError if files of a built dataset were deleted."""
    notes = [folder / "annotations" / f"{kind}_{split}.json" for kind in ANNOTATIONS for split in SPLITS]
    notes += [folder / "annotations" / questions_name(split) for split in SPLITS]
    wanted = [folder / "annotations" / "answer_list.json", *notes]
    wanted += [folder / f"scenes_{split}.json" for split in SPLITS]
    missing = [path for path in wanted if not path.is_file()]
    for split in SPLITS:
        images = folder / "images" / split
        there = set(os.listdir(images)) if images.is_dir() else set()
        names = (Path(image_name(split, index)).name for index in range(vars(config)[f"num_{split}"]))
        missing += [images / name for name in names if name not in there]
    if missing:
        raise MissingFileError(
            f"the generated dataset shapes lacks {len(missing)} of its files, e.g. {missing[0]}: delete the folder "
            f"{folder}, and it is generated again"
        )


def _sweep(root: Path, *, prefix: str) -> None:
    """Delete the folders of killed builds: without a lock, and older than the time it takes to lock one."""
    for left in root.glob(f"{prefix}*"):
        lock = Lock(left)
        if time.time() - left.stat().st_mtime > ABANDONED and _lock(lock):
            shutil.rmtree(left, ignore_errors=True)
            lock.release()


def _lock(lock: Lock) -> bool:
    """Return whether the lock is held now; False where the file system has no locks, so nothing is swept there."""
    try:
        return lock.take()
    except (OSError, ImportError) as error:
        logger.debug("%s cannot be locked: %s", lock.path, error)
        return False


def build(config: ShapesConfig, folder: Path) -> None:
    """Write `images/<split>/*.jpg`, `annotations/*.json` and `scenes_<split>.json` into an empty folder."""
    (folder / "annotations").mkdir()
    _write(folder / "config.json", {"format": FORMAT, **config.resolved()})
    _write(folder / "annotations" / "answer_list.json", QuestionGenerator(config).answer_list())
    maker = SceneMaker(config)
    for split in SPLITS:
        _Split(config, maker, split).write(folder)


def image_id(split: str, index: int) -> int:
    """Return the id of an image, unique over the splits."""
    return SPLITS.index(split) * _ID_STEP + index


def image_name(split: str, index: int) -> str:
    """Return the image's path below `images/`; it ends in the id, as in COCO."""
    return f"{split}/SHAPES_{split}_{image_id(split, index):012d}.jpg"


class _Split:
    """One split's scenes, and its files."""

    def __init__(self, config: ShapesConfig, maker: SceneMaker, split: str) -> None:
        self.config = config
        self.split = split
        self.scenes = [maker.make(split, self.rng("scene", i)) for i in range(vars(config)[f"num_{split}"])]

    def rng(self, purpose: str, index: int) -> random.Random:
        return random.Random(f"{self.config.seed}/{purpose}/{self.split}/{index}")

    def write(self, folder: Path) -> None:
        """Write all files of the split."""
        (folder / "images" / self.split).mkdir(parents=True)
        for index, scene in enumerate(progress(self.scenes, len(self.scenes), name=f"drawing {self.split}")):
            path = folder / "images" / image_name(self.split, index)
            save_jpeg(scene, path, image_size=self.config.image_size, quality=self.config.jpeg_quality)
        scenes = {str(image_id(self.split, index)): scene.to_dict() for index, scene in enumerate(self.scenes)}
        _write(folder / f"scenes_{self.split}.json", scenes)
        notes = folder / "annotations"
        _write(notes / f"caption_{self.split}.json", self.caption_records("caption", range(len(self.scenes))))
        _write(notes / f"retrieval_{self.split}.json", self.caption_records("retrieval", self.gallery()))
        _write(notes / f"nlvr_{self.split}.json", self.nlvr_records())
        _write(notes / f"pairs_{self.split}.json", self.pair_records())
        self.write_questions(notes)

    def caption_records(self, purpose: str, indices: Any) -> list[dict[str, Any]]:
        """Return COCO's Karpathy form: one record per caption in train, one per image with five captions elsewhere."""
        write_captions = full_captions
        if purpose == "caption":
            write_captions = functools.partial(captions, relations=self.config.relations)
        records: list[dict[str, Any]] = []
        for index in indices:
            texts = write_captions(self.scenes[index], self.rng(purpose, index), sizes=self.config.size_names)
            image = image_name(self.split, index)
            if self.split == "train":
                key = f"shapes_{image_id(self.split, index)}"
                records += [{"caption": text, "image": image, "image_id": key} for text in texts]
            else:
                records.append({"image": image, "caption": texts})
        return records

    def gallery(self) -> list[int]:
        """Return all of train; elsewhere `gallery_size` images, with different objects as far as possible."""
        if self.split == "train":
            return list(range(len(self.scenes)))
        chosen: dict[int, None] = {}
        for key in (_objects_of, _relations_of, id):
            known = {key(self.scenes[index]) for index in chosen}
            for index, scene in enumerate(self.scenes):
                if len(chosen) < self.config.gallery_size and index not in chosen and key(scene) not in known:
                    known.add(key(scene))
                    chosen[index] = None
        return sorted(chosen)

    def nlvr_records(self) -> list[dict[str, Any]]:
        """Return records of two images and a statement; every second one is true."""
        records = []
        for index in range(len(self.scenes)):
            label = index % 2 == 0
            text, other = statement(self.scenes, index, label, self.config, self.rng("nlvr", index))
            images = [image_name(self.split, index), image_name(self.split, other)]
            records.append({"sentence": text, "label": str(label), "images": images})
        return records

    def pair_records(self) -> list[dict[str, Any]]:
        """Return one text per image; a share of them is of another image and false of this one, or means nothing."""
        records = []
        for index, scene in enumerate(self.scenes):
            rng = self.rng("pairs", index)
            is_noisy = rng.random() < self.config.noise_share
            text = self.wrong_text(scene, rng) if is_noisy else self.caption(index, rng)
            records.append({"image": image_name(self.split, index), "caption": text, "is_noisy": is_noisy})
        return records

    def caption(self, index: int, rng: random.Random) -> str:
        config = self.config
        return captions(self.scenes[index], rng, sizes=config.size_names, relations=config.relations, count=1)[0]

    def wrong_text(self, scene: Scene, rng: random.Random) -> str:
        if rng.random() < 0.7:
            for _ in range(50):
                text = self.caption(rng.randrange(len(self.scenes)), rng)
                if not is_true(text, scene):
                    return text
        text = rng.choice(MEANINGLESS_TEXTS)
        while "{digit}" in text:
            text = text.replace("{digit}", str(rng.randrange(10)), 1)
        return text

    def write_questions(self, notes: Path) -> None:
        """Write train in LAVIS's form, val and test in its evaluation form and as the official pair of files."""
        generator = QuestionGenerator(self.config)
        questions: list[tuple[int, int, Question, list[str]]] = []
        for index, scene in enumerate(self.scenes):
            rng = self.rng("vqa", index)
            for number, question in enumerate(generator.make(scene, self.config.questions_per_image, rng)):
                question_id = image_id(self.split, index) * 100 + number
                questions.append((index, question_id, question, question.ten_answers(rng)))
        records = [
            {
                "question_id": question_id,
                "question": question.text,
                **({"answer": answers} if self.split == "train" else {}),
                "image": image_name(self.split, index),
                "dataset": "shapes",
            }
            for index, question_id, question, answers in questions
        ]
        _write(notes / questions_name(self.split), records)
        if self.split == "train":
            return
        head = {"info": {"description": "shapes"}, "license": {}, "data_type": "shapes", "data_subtype": self.split}
        official = [
            {"image_id": image_id(self.split, index), "question": question.text, "question_id": question_id}
            for index, question_id, question, _ in questions
        ]
        truths = [_official_truth(self.split, *item) for item in questions]
        paths = official_paths(self.split)
        _write(notes / paths[0], {**head, "task_type": "Open-Ended", "questions": official})
        _write(notes / paths[1], {**head, "annotations": truths})


def questions_name(split: str) -> str:
    """Return the name of the split's questions in LAVIS's form."""
    return "vqa_train.json" if split == "train" else f"vqa_{split}_eval.json"


def official_paths(split: str) -> tuple[str, str]:
    """Return the names of the official questions file and the official annotations file."""
    return f"v2_OpenEnded_shapes_{split}_questions.json", f"v2_shapes_{split}_annotations.json"


def _official_truth(split: str, index: int, question_id: int, question: Question, answers: list[str]) -> dict[str, Any]:
    return {
        "question_type": question.question_type,
        "multiple_choice_answer": question.answer,
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": number}
            for number, answer in enumerate(answers, start=1)
        ],
        "image_id": image_id(split, index),
        "answer_type": question.answer_type,
        "question_id": question_id,
    }


def _objects_of(scene: Scene) -> Any:
    return tuple(sorted((t.size, t.color, t.shape) for t in scene.things))


def _relations_of(scene: Scene) -> Any:
    things = sorted(scene.things, key=lambda t: (t.size, t.color, t.shape))
    return _objects_of(scene), tuple(tuple(scene.relations(a, b)) for a in things for b in things if a is not b)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
