"""The model of a server: one thread computes, and requests that came meanwhile share its next batch."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from lavis_lite.common.errors import InputError, InputTypeError
from lavis_lite.common.rng import seed_everything
from lavis_lite.inference.chat import Conversation
from lavis_lite.inference.inputs import Item
from lavis_lite.inference.loading import Loaded
from lavis_lite.inference.pipelines import AskPipeline, CaptionPipeline
from lavis_lite.models.blip2.llm import Blip2LLM
from lavis_lite.models.protocols import AnswersQuestions, Generates
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


@dataclass(frozen=True)
class Job:
    """A request with its image, and where its texts go."""

    request: ChatRequest
    image: Image.Image
    text: str
    """The text that the model reads."""
    done: Future[list[str]] = field(default_factory=Future)

    @property
    def shared(self) -> tuple[Any, ...]:
        """The settings that jobs of one batch share; jobs that are sampled are computed alone, for their seed."""
        own = id(self) if self.request.samples else None
        return own, bool(self.text), tuple(sorted(self.request.decoding.items()))


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

    def submit(self, request: ChatRequest, image: Image.Image) -> Future[list[str]]:
        """Return the future texts of a request, one per choice. RequestError if too many requests wait."""
        job = Job(request, image, self.prompt(request))
        try:
            self.waiting.put_nowait(job)
        except queue.Full:
            problem = f"{self.waiting.maxsize} requests wait already; try again later"
            raise RequestError(problem, status=429, code="rate_limit_exceeded") from None
        return job.done

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
                if following.shared != job.shared or count > self.max_batch:
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
        except InputError as error:
            self._fail(jobs, RequestError(str(error)))
        except Exception:  # of one batch; the server continues, and its log has the traceback
            logger.exception("a batch of %d requests failed", len(jobs))
            self._fail(jobs, RequestError("the model failed; the server's log says why", status=500))

    def _fail(self, jobs: Sequence[Job], error: RequestError) -> None:
        for job in jobs:
            if not job.done.done():
                job.done.set_exception(error)

    def texts(self, jobs: Sequence[Job]) -> list[str]:
        """Return the texts of jobs with the same settings, all choices of the first one first."""
        rows = [job for job in jobs for _ in range(job.request.num_choices)]
        settings: dict[str, Any] = dict(jobs[0].request.decoding)
        if jobs[0].request.samples:
            seed = jobs[0].request.seed
            seed_everything(SEED if seed is None else seed)
        given = [job.text for job in rows]
        if self.kind == "answer":
            settings["question"] = given
        elif jobs[0].text:
            settings["prompt"] = given
        items = [Item(name="image_url", image=job.image) for job in rows]
        name = "answer" if self.kind == "answer" else "caption"
        return [str(result[name]).strip() for result in self.pipeline.stream(items, **settings)]


def num_tokens(loaded: Loaded, text: str) -> int:
    """Return the number of tokens of a text by the tokenizer that the model writes with."""
    model = loaded.model
    tokenizer = model.llm_tokenizer.tokenizer if isinstance(model, Blip2LLM) else vars(model)["tokenizer"]
    return len(tokenizer(text, add_special_tokens=False).input_ids)
