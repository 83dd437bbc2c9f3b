"""The model of a server: one thread computes, and requests that came meanwhile share its next batch."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from PIL import Image
from torch import Tensor

from lavis_lite.common.errors import InputError, InputTypeError
from lavis_lite.common.rng import seed_everything
from lavis_lite.inference.chat import Conversation
from lavis_lite.inference.inputs import Item
from lavis_lite.inference.loading import Loaded
from lavis_lite.inference.pipelines import AskPipeline, CaptionPipeline
from lavis_lite.models.blip2.llm import Blip2LLM
from lavis_lite.models.protocols import AnswersQuestions, Generates
from lavis_lite.models.tokenizers import written_texts
from lavis_lite.server.requests import ChatRequest, RequestError

logger = logging.getLogger(__name__)

Kind = Literal["chat", "answer", "caption"]
SEED = 42


def kind_of(loaded: Loaded) -> Kind:
    """Return what a model does with a question: converse, answer it, or continue it as a caption.

    Raises InputError if it does not write texts about images.
    """
    try:
        loaded.process_image(Image.new("RGB", (8, 8)))
    except InputTypeError as error:  # it reads features of another encoder
        raise InputError(f"--model: the server is of models that read images; {error}") from error
    if isinstance(loaded.model, Blip2LLM):
        return "chat"
    if isinstance(loaded.model, AnswersQuestions):
        return "answer"
    if isinstance(loaded.model, Generates):
        return "caption"
    name = type(loaded.model).__name__
    raise InputError(f"--model: {name} writes no texts; choose blip_caption, blip_vqa, blip2_t5_instruct ...")


class Written(NamedTuple):
    """A text of the model, and whether it was cut at the greatest length."""

    text: str
    is_cut: bool


class NobodyWaits(Exception):
    """Ends the decoding of a batch whose clients have all left."""


@dataclass(frozen=True)
class Job:
    """A request with its image, and where its texts go."""

    request: ChatRequest
    image: Image.Image
    text: str
    """The text that the model reads."""
    send: Callable[[int, str], None] | None = None
    """Takes the index of a choice and the next words of its text, in the thread of the model."""
    done: Future[list[Written]] = field(default_factory=Future)
    left: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Drop the job, as its client has left: in the queue now, in a batch where no other client waits for it."""
        self.left.set()
        self.done.cancel()


class Following:
    """A `Watch` of a batch: sends the words of its texts, and ends it when all clients have left."""

    def __init__(self, loaded: Loaded, jobs: Sequence[Job]) -> None:
        self.loaded = loaded
        self.rows = [(job, choice) for job in jobs for choice in range(job.request.num_choices)]
        self.sent = [""] * len(self.rows)
        self.is_cut: list[bool] = []

    def token(self, ids_NL: Tensor | None, num_prompt: int) -> None:
        if all(job.left.is_set() for job, _ in self.rows):
            raise NobodyWaits
        if ids_NL is None or all(job.send is None for job, _ in self.rows):
            return
        model, first = self.loaded.model, len(self.is_cut)
        if isinstance(model, Blip2LLM):
            texts = model.llm_tokenizer.decode(ids_NL)
        else:
            texts = written_texts(tokenizer_of(self.loaded), ids_NL, num_prompt)
        for row, text in enumerate(texts, first):
            self.send(row, "".join(text.rsplit(None, 1)[:-1]))  # the next token may change the last word

    def end(self, is_cut: list[bool]) -> None:
        self.is_cut += is_cut

    def send(self, row: int, text: str) -> None:
        """Send what a text has beyond what was sent of it."""
        (job, choice), before = self.rows[row], self.sent[row]
        if job.send is not None and len(text) > len(before) and text.startswith(before):
            job.send(choice, text.removeprefix(before))
            self.sent[row] = text

    def written(self, texts: Sequence[str]) -> list[Written]:
        """Send the rest of the texts, and return them. RuntimeError if one is not what was sent of it: a batch that was
        divided for memory was sampled again.
        """
        for row, (text, (job, _)) in enumerate(zip(texts, self.rows, strict=True)):
            self.send(row, text)
            if job.send is not None and self.sent[row] != text:
                raise RuntimeError(f"{self.sent[row]!r} was sent of {text!r}")
        return [Written(*pair) for pair in zip(texts, self.is_cut, strict=True)]


class Worker:
    """Answers requests in batches of at most `max_batch` images; at most `max_waiting` requests wait.

    Use it as a context. `submit` may be called from any thread.
    """

    def __init__(self, loaded: Loaded, *, max_waiting: int, max_batch: int) -> None:
        self.loaded, self.kind, self.max_batch = loaded, kind_of(loaded), max_batch
        kind = AskPipeline if self.kind == "answer" else CaptionPipeline
        self.pipeline = kind(loaded, batch_size=max_batch, num_threads=1)
        self.waiting: queue.Queue[Job | None] = queue.Queue(maxsize=max_waiting)
        self.thread = threading.Thread(target=self._work, name="lavis-lite-model", daemon=True)

    def __enter__(self) -> Worker:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.waiting.put(None)
        self.thread.join(timeout=30)

    def prompt(self, request: ChatRequest) -> str:
        """Return what the model reads for a request. RequestError if it cannot use its messages."""
        if self.kind == "chat" and request.text:
            conversation = Conversation(self.loaded, num_rounds=len(request.rounds))
            conversation.rounds = request.rounds
            return conversation.prompt(request.text)
        if request.rounds:
            problem = "this model answers single questions: send one message, of the role user"
            raise RequestError(f"messages: {problem}", param="messages")
        if self.kind == "answer" and not request.text:
            raise RequestError("messages: has no question; add a part of the type text", param="messages")
        return request.text

    def submit(self, request: ChatRequest, image: Image.Image, send: Callable[[int, str], None] | None = None) -> Job:
        """Return the job of a request, whose future has a text per choice; `send` takes them in pieces. RequestError if
        too many requests wait.
        """
        job = Job(request, image, self.prompt(request), send)
        try:
            self.waiting.put_nowait(job)
        except queue.Full:
            problem = f"{self.waiting.maxsize} requests wait already; try again later"
            raise RequestError(problem, status=429, code="rate_limit_exceeded") from None
        return job

    def shared(self, job: Job) -> tuple[Any, ...]:
        """Return the settings that jobs of one batch share; jobs that are sampled are computed alone, for their seed.

        A captioning model decodes texts after different prompts one after another: these do not share a batch.
        """
        own = id(job) if job.request.samples else None
        text = job.text if self.kind == "caption" else bool(job.text)
        return own, text, tuple(sorted(job.request.decoding.items()))

    def _work(self) -> None:
        later: Job | None = None
        while (job := later or self.waiting.get()) is not None:
            later, jobs, count = None, [job], job.request.num_choices
            while count < self.max_batch and not self.waiting.empty():
                following = self.waiting.get()
                if following is None:
                    self.waiting.put(None)
                    break
                count += following.request.num_choices
                if self.shared(following) != self.shared(job) or count > self.max_batch:
                    later = following
                    break
                jobs.append(following)
            self._answer([one for one in jobs if one.done.set_running_or_notify_cancel()])

    def _answer(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        try:
            texts = iter(self.texts(jobs))
            for job in jobs:
                job.done.set_result([next(texts) for _ in range(job.request.num_choices)])
        except NobodyWaits:
            self._fail(jobs, RequestError("the client has left"))
        except InputError as error:
            self._fail(jobs, RequestError(str(error)))
        except Exception:  # of one batch; the server continues, and its log has the traceback
            logger.exception("a batch of %d requests failed", len(jobs))
            self._fail(jobs, RequestError("the model failed; the server's log says why", status=500))

    def _fail(self, jobs: Sequence[Job], error: RequestError) -> None:
        for job in jobs:
            if not job.done.done():
                job.done.set_exception(error)

    def texts(self, jobs: Sequence[Job]) -> list[Written]:
        """Return the texts of jobs with the same settings, all choices of the first one first."""
        following = Following(self.loaded, jobs)
        settings: dict[str, Any] = {**jobs[0].request.decoding, "watch": following}
        if jobs[0].request.samples:
            seed = jobs[0].request.seed
            seed_everything(SEED if seed is None else seed)
        given = [job.text for job, _ in following.rows]
        if self.kind == "answer":
            settings["question"] = given
        elif jobs[0].text:
            settings["prompt"] = given
        items = [Item(name="image_url", image=job.image) for job, _ in following.rows]
        name = "answer" if self.kind == "answer" else "caption"
        return following.written([str(result[name]).strip() for result in self.pipeline.stream(items, **settings)])


def num_tokens(loaded: Loaded, text: str) -> int:
    """Return the number of tokens of a text by the tokenizer that the model writes with."""
    return len(tokenizer_of(loaded)(text, add_special_tokens=False).input_ids)


def tokenizer_of(loaded: Loaded) -> Any:
    """Return the tokenizer that the model writes with."""
    model = loaded.model
    return model.llm_tokenizer.tokenizer if isinstance(model, Blip2LLM) else vars(model)["tokenizer"]
