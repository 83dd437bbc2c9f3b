"""The page's actions: one method per button, without Gradio.

Models are shared by all users and computed with by one at a time: seeds and recorded attention are state of the
process. Nothing else is kept between calls; a conversation belongs to its page.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from lavis_lite.common.bounds import check_number
from lavis_lite.common.errors import InputError, UnreadableSample
from lavis_lite.common.image_io import MAX_PIXELS
from lavis_lite.common.rng import seed_everything
from lavis_lite.datasets.image import open_image
from lavis_lite.demo.code import Code, chat_code, command_line, explain_code, python_call, search_code
from lavis_lite.demo.models import DemoModel, DemoModels, Task
from lavis_lite.demo.settings import TextSettings
from lavis_lite.inference.chat import Conversation
from lavis_lite.inference.inputs import Item, load_image
from lavis_lite.inference.overlays import Overlay, overlay, overlays, squashed
from lavis_lite.inference.search import ImageIndex, Progress
from lavis_lite.models.explain import explain

MAX_TEXT = 2_000
"""Characters of a text; more than any of the models reads."""
MAX_TEXTS = 50
MAX_HITS = 48
THUMBNAIL = 256
VERBS: dict[Task, str] = {
    "caption": "write captions",
    "ask": "answer questions",
    "match": "compare texts with images",
    "embed": "search",
    "chat": "chat",
}


class Upload(NamedTuple):
    """A file of the user: where it lies, and the name that it had."""

    path: Path
    name: str


class Written(NamedTuple):
    """Texts that a model wrote about an image, and the maps of the first."""

    texts: list[str]
    maps: list[Overlay]


class Match(NamedTuple):
    """Scores of texts for an image, and the maps of the text that fits best."""

    scores: list[dict[str, Any]]
    text: str
    maps: list[Overlay]


class Side(NamedTuple):
    """A model's text in a comparison, and how long it took."""

    text: str
    seconds: float


class Session(NamedTuple):
    """A user's conversation, and what it is about; `num_frames` of a video."""

    conversation: Conversation
    model: str
    source: Upload
    num_frames: int | None


class Found(NamedTuple):
    """An image that was found: a thumbnail, its name and its score."""

    picture: Image.Image
    name: str
    score: float


class Actions:
    """The models and folders of a demo. `index_storage`: where indices of some folders are, in place of the cache."""

    def __init__(self, models: DemoModels, folders: dict[str, Path], *, index_storage: dict[str, Path]) -> None:
        self.models, self.folders, self.index_storage = models, folders, index_storage
        self.lock = threading.Lock()
        self.indices: dict[tuple[str, str], ImageIndex] = {}

    def index(self, model: str, folder: str, progress: Progress | None = None) -> ImageIndex:
        """Return the index of a folder by a model, with the features of new files."""
        if folder not in self.folders:
            raise InputError(f"folder {folder!r} is not in this demo; it has {', '.join(self.folders)}")
        chosen = self._model(model, "embed")
        if (model, folder) not in self.indices:
            base = self.index_storage.get(folder)
            storage = None if base is None else base / str(len(self.indices))
            self.indices[model, folder] = ImageIndex(self.folders[folder], chosen.pipeline("embed"), storage=storage)
        self.indices[model, folder].update(progress)
        return self.indices[model, folder]

    def caption(
        self,
        model: str,
        image: Upload | None,
        prompt: str,
        num_captions: int,
        settings: TextSettings,
        with_map: bool = False,
    ) -> tuple[Written, Code]:
        """Return captions of an image, and where the model looked for the first."""
        upload, chosen = _given(image), self._model(model, "caption")
        check_number("number of captions", num_captions, 1, 20)
        given: dict[str, Any] = {"prompt": checked_text("prompt", prompt) or None, **settings.arguments()}
        if num_captions > 1:
            given["num_captions"] = num_captions
            if not settings.samples:
                given["num_beams"] = max(num_captions, given.get("num_beams", 3))
        result = self._run("caption", chosen, upload, settings, given)
        seed = settings.seed if settings.samples else None
        shown = "found['captions']" if num_captions > 1 else "found['caption']"
        code = Code(
            python_call("caption", chosen, upload.name, given, result=shown, seed=seed),
            command_line("caption", [upload.name], chosen, {**given, "seed": seed}),
        )
        texts = result.get("captions", [result["caption"]])
        if not with_map:
            return Written(texts, []), code
        other = explain_code(chosen, upload.name, texts[0])
        return Written(texts, self._maps(chosen, upload, texts[0])), code.then(other)

    def ask(
        self, model: str, image: Upload | None, question: str, settings: TextSettings, with_map: bool = False
    ) -> tuple[Written, Code]:
        """Return the answer to a question about an image, and where the model looked."""
        upload, chosen = _given(image), self._model(model, "ask")
        given = {"question": required_text("question", question), **settings.arguments()}
        answer = str(self._run("ask", chosen, upload, settings, given)["answer"])
        seed = settings.seed if settings.samples else None
        code = Code(
            python_call("ask", chosen, upload.name, given, result="found['answer']", seed=seed),
            command_line("ask", [upload.name], chosen, {**given, "seed": seed}),
        )
        if not with_map:
            return Written([answer], []), code
        asked = chosen.pipeline("ask").asked(given["question"])
        other = explain_code(chosen, upload.name, answer, question=given["question"], asked=asked)
        return Written([answer], self._maps(chosen, upload, answer, asked=asked)), code.then(other)

    def match(self, model: str, image: Upload | None, lines: str, with_map: bool) -> tuple[Match, Code]:
        """Return the scores of texts, one per line, and where the model looked for the best of them."""
        upload, chosen = _given(image), self._model(model, "match")
        required_text("texts", lines, limit=MAX_TEXT * MAX_TEXTS)
        texts = [checked_text("text", line) for line in lines.splitlines() if line.strip()]
        check_number("number of texts", len(texts), 1, MAX_TEXTS)
        scores = self._run("match", chosen, upload, TextSettings(), {"texts": texts})["scores"]
        best = max(scores, key=lambda one: one.get("itm", one.get("itc", 0.0)))["text"]
        code = Code(
            python_call("match", chosen, upload.name, {"texts": texts}, result="found['scores']"),
            command_line("match", [upload.name], chosen, {"text": texts}),
        )
        if not (with_map and chosen.compares_texts):
            return Match(scores, best, []), code
        other = explain_code(chosen, upload.name, best)
        return Match(scores, best, self._maps(chosen, upload, best)), code.then(other)

    def search(
        self, model: str, folder: str, text: str, image: Upload | None, k: int, rerank: int
    ) -> tuple[list[Found], Code]:
        """Return the images of a folder that are most similar to a text, or else to an image."""
        chosen, wanted = self._model(model, "embed"), checked_text("text", text)
        check_number("images to list", k, 1, MAX_HITS)
        if not wanted and image is None:
            raise InputError("search: write what to look for, or upload an image")
        with self._computing(image):
            index = self.index(model, folder)
            hits = index.by_text(wanted, k=k, rerank=rerank) if wanted else index.by_image(_given(image).path, k=k)
        name = None if wanted else _given(image).name
        code = search_code(
            chosen, str(self.folders[folder]), text=wanted or None, image=name, k=k, rerank=rerank if wanted else 0
        )
        return [Found(thumbnail(hit.image), Path(hit.image).name, hit.score) for hit in hits], code

    def chat(
        self,
        session: Session | None,
        model: str,
        source: Upload | None,
        message: str,
        *,
        num_rounds: int,
        num_frames: int | None,
        settings: TextSettings,
    ) -> tuple[Session, Code]:
        """Return the conversation with another answer; `num_frames` are of a video. It begins anew with another model,
        file or number of frames.
        """
        upload, chosen = _given(source, "an image or a video"), self._model(model, "chat")
        question, given = required_text("message", message), settings.arguments()
        seed = settings.seed if settings.samples else None
        video = {} if num_frames is None else {"num_frames": num_frames}
        with self._computing(upload):
            if session is None or session[1:] != (model, upload, num_frames):
                session = Session(Conversation(chosen.loaded), model, upload, num_frames)
                session.conversation.look_at(str(upload.path), **video)
            conversation = session.conversation
            conversation.num_rounds, conversation.seed, conversation.settings = num_rounds, seed, given
            conversation.ask(question)
        asked = [question for question, _ in conversation.rounds]
        given |= {} if seed is None else {"seed": seed}
        return session, chat_code(chosen, upload.name, asked, num_rounds=num_rounds, settings=given, video=video)

    def compare(self, models: Sequence[str], image: Upload | None, question: str, settings: TextSettings) -> list[Side]:
        """Return what each model says of an image: its answer to the question, or its caption without one."""
        upload, asked = _given(image), checked_text("question", question)
        task: Task = "ask" if asked else "caption"
        sides = []
        for chosen in [self._model(model, task) for model in models]:
            given = {**settings.arguments(), **({"question": asked} if asked else {})}
            started = time.perf_counter()
            result = self._run(task, chosen, upload, settings, given)
            sides.append(Side(result["answer" if asked else "caption"], time.perf_counter() - started))
        return sides

    def _model(self, name: str, task: Task) -> DemoModel:
        model = self.models[name]
        if not model.can(task):
            able = ", ".join(self.models.names(task)) or "none of these models"
            raise InputError(f"{name} cannot {VERBS[task]}; {able} can")
        return model

    def _run(
        self, task: Task, model: DemoModel, upload: Upload, settings: TextSettings, given: dict[str, Any]
    ) -> dict[str, Any]:
        with self._computing(upload, settings):
            result: dict[str, Any] = model.pipeline(task)(upload.path, **given)
        return result

    def _maps(self, model: DemoModel, upload: Upload, text: str, *, asked: str | None = None) -> list[Overlay]:
        with self._computing(upload):
            loaded = model.loaded
            image = load_image(Item(name=upload.name, image=upload.path), loaded.process_image)[None]
            samples = {"image": image.to(loaded.device), **({} if asked is None else {"text_input": [asked]})}
            _, maps = explain(loaded.model, samples, text=text)
            small = squashed(open_image(upload.path))
            return [Overlay("mean of all", overlay(small, maps.mean), 1.0), *overlays(small, maps)]

    @contextmanager
    def _computing(self, upload: Upload | None, settings: TextSettings | None = None) -> Iterator[None]:
        """Wait for the models; errors about the upload have its own name, not that of its copy here."""
        with self.lock:
            if settings is not None and settings.samples:
                seed_everything(settings.seed)
            try:
                yield
            except UnreadableSample as error:
                text = str(error)
                raise InputError(text if upload is None else text.replace(str(upload.path), upload.name)) from error


def _given(upload: Upload | None, what: str = "an image") -> Upload:
    if upload is None:
        raise InputError(f"upload {what} first, or click on an example")
    return upload


def checked_text(name: str, text: str | None, *, limit: int = MAX_TEXT) -> str:
    """Return a text without spaces around it. Raises InputError for one that is too long."""
    found = (text or "").strip()
    if len(found) > limit:
        raise InputError(f"{name}: {len(found):,} characters, at most {limit:,} are read; shorten it")
    return found


def required_text(name: str, text: str | None, *, limit: int = MAX_TEXT) -> str:
    """Return a text as `checked_text`. Raises InputError for an empty one."""
    found = checked_text(name, text, limit=limit)
    if not found:
        raise InputError(f"{name}: nothing is written there yet")
    return found


def thumbnail(path: str) -> Image.Image:
    """Return a small copy of an image, at most `THUMBNAIL` pixels wide and high."""
    image = open_image(path, max_pixels=MAX_PIXELS)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image
