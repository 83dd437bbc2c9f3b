"""`lavis-lite serve`: streams by words, texts that are cut, and clients that leave; in this process, by ASGI."""

import asyncio
import dataclasses
import json
import random
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_serve import NOISE, body, request
from transformers import BertTokenizer

from lavis_lite.inference.loading import Loaded, load
from lavis_lite.models.tokenizers import written_texts
from lavis_lite.nn.decoding import DecodingConfig, decode
from lavis_lite.server.app import Limits, Server
from lavis_lite.server.requests import RequestError, read_request
from lavis_lite.server.worker import Following, Job, Worker

LIMITS = Limits(max_bytes=10**6)


@pytest.fixture(scope="module")
def caption() -> Loaded:
    torch.manual_seed(0)
    return load("blip_caption/tiny", device="cpu")


class Recorded:
    """A `Watch` that keeps what it takes."""

    def __init__(self) -> None:
        self.seen: list[list[list[int]] | None] = []
        self.is_cut: list[bool] = []

    def token(self, ids_NL: torch.Tensor | None, num_prompt: int) -> None:
        assert num_prompt == 1
        self.seen.append(None if ids_NL is None else ids_NL.tolist())

    def end(self, is_cut: list[bool]) -> None:
        self.is_cut += is_cut


class Rows:
    """A cache without content."""

    def expand(self, times: int) -> "Rows":
        return self

    def select(self, index: torch.Tensor) -> "Rows":
        return self


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_watch_sees_the_tokens_and_which_texts_are_cut(num_beams: int) -> None:
    """The first text ends (token 1) after two tokens, the second writes 2 up to the greatest length."""

    def step(ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Rows]:
        likely = torch.tensor([3 if cache is None else 1, 2]).repeat_interleave(1 if cache is None else num_beams)
        return torch.nn.functional.one_hot(likely, 5) * 50.0, Rows()

    watch = Recorded()
    config = DecodingConfig(max_length=4, eos_id=1, pad_id=0, num_beams=num_beams, watch=watch)
    ids = decode(step, torch.tensor([[4], [4]]), config).ids
    assert ids.tolist() == [[4, 3, 1, 0], [4, 2, 2, 2]]
    assert watch.is_cut == [False, True]
    greedy = [[[4, 3], [4, 2]], [[4, 3, 1], [4, 2, 2]], [[4, 3, 1, 0], [4, 2, 2, 2]]]
    assert watch.seen == (greedy if num_beams == 1 else [None] * 3)


@pytest.mark.parametrize("model", ["blip2_t5_instruct/tiny", "blip_vqa/tiny", "blip_caption/tiny"])
def test_texts_are_sent_by_words(model: str) -> None:
    """Of a shared batch only to the client that wants it; by beam search in one piece."""
    torch.manual_seed(0)
    worker = Worker(load(model, device="cpu"), max_waiting=4, max_batch=2)
    sent: dict[str, list[str]] = {"greedy": [], "beams": []}
    greedy = {"num_beams": 1, "max_new_tokens": 8, "min_new_tokens": 8}
    jobs = [
        worker.submit(request("red", decoding=greedy), NOISE, lambda choice, text: sent["greedy"].append(text)),
        worker.submit(request("red", decoding=greedy), NOISE),
        worker.submit(request("red", decoding={"num_beams": 2}), NOISE, lambda _, text: sent["beams"].append(text)),
    ]
    with worker:
        texts = [job.done.result(timeout=60)[0].text for job in jobs]
    assert "".join(sent["greedy"]) == texts[0] == texts[1]
    assert len(sent["greedy"]) > 2
    assert sent["beams"] == [texts[2]]


def test_sent_words_do_not_change(caption: Loaded) -> None:
    """Whatever tokens follow: parts of words, apostrophes, characters without spaces between them."""
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "don", "'", "t", "##s", "-", "\u4e2d", "\u304b", "\u2026"]
    tokenizer = BertTokenizer(vocab={token: index for index, token in enumerate(known)})
    model: Any = SimpleNamespace(tokenizer=tokenizer)
    draw, num_pieces = random.Random(0), 0
    for _ in range(200):
        pieces: list[str] = []
        job = Job(request(), NOISE, "", lambda choice, text, to=pieces: to.append(text))  # type: ignore[misc]
        following = Following(dataclasses.replace(caption, model=model), [job])
        ids = torch.tensor([[2, *(draw.randrange(5, len(known)) for _ in range(12))]])
        for length in range(2, ids.shape[1] + 1):
            following.token(ids[:, :length], 1)
        following.end([True])
        (written,) = following.written(written_texts(tokenizer, ids, 1))
        assert written.text == "".join(pieces)
        num_pieces += len(pieces)
    assert num_pieces > 5 * 200
    with pytest.raises(RuntimeError, match="was sent"):
        following.written(["another text"])


class Client:
    """A client of the application, in this process, that may leave."""

    def __init__(self, worker: Worker) -> None:
        self.app = Server(worker, name="m", limits=LIMITS).app()
        self.leaves = asyncio.Event()
        self.messages: list[Any] = []
        self.sent: dict[str, Any] | None = None

    async def receive(self) -> dict[str, Any]:
        if self.sent is not None:
            content, self.sent = json.dumps(self.sent).encode(), None
            return {"type": "http.request", "body": content}
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.messages.append(message)
        if b"content" in message.get("body", b""):
            self.leaves.set()

    async def ask(self, content: dict[str, Any]) -> int:
        """Send a request, leave after the first text, and return the status."""
        self.sent = content
        head = {"headers": [(b"content-type", b"application/json")], "query_string": b"", "root_path": ""}
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "asgi": {}, **head}
        await self.app(scope, self.receive, self.send)
        return int(self.messages[0]["status"])


def test_a_request_whose_client_leaves_the_queue_is_not_computed(
    caption: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(caption, max_waiting=2, max_batch=1)
    computed: list[str] = []
    monkeypatch.setattr(worker.pipeline, "stream", lambda items, **settings: computed.append(settings["prompt"]))

    async def leave() -> int:
        client = Client(worker)
        asking = asyncio.create_task(client.ask(body("first")))
        while worker.waiting.empty():
            await asyncio.sleep(0.01)
        client.leaves.set()
        return await asking

    assert asyncio.run(leave()) == 499
    last = worker.submit(request("second"), NOISE)
    with worker, pytest.raises(RequestError, match="log"):  # the stub returns no results
        last.done.result(timeout=60)
    assert computed == [["second"]]


@pytest.mark.parametrize("is_shared", [False, True])
def test_decoding_ends_when_the_client_of_a_stream_leaves(
    caption: Loaded, monkeypatch: pytest.MonkeyPatch, is_shared: bool
) -> None:
    """At the next token, unless another client waits for the same batch."""
    calls: list[int] = []
    left, before = threading.Event(), Following.token

    def token(self: Following, ids: Any, num_prompt: int) -> None:
        calls.append(len(self.rows))
        assert not any(self.sent) or left.wait(timeout=60)
        before(self, ids, num_prompt)

    monkeypatch.setattr(Following, "token", token)
    worker = Worker(caption, max_waiting=4, max_batch=2)
    content = body("red", temperature=0, max_tokens=12, min_tokens=12, stream=True)
    other = worker.submit(request("red", decoding=read_request(content).decoding), NOISE) if is_shared else None

    async def leave() -> int:
        client = Client(worker)
        asking = asyncio.create_task(client.ask(content))
        while worker.waiting.qsize() < 1 + is_shared:
            await asyncio.sleep(0.01)
        worker.thread.start()
        status = await asking
        left.set()
        assert len(client.messages) == 2, "the head and one piece"
        return status

    assert asyncio.run(leave()) == 200
    worker.__exit__()
    assert not worker.thread.is_alive()
    if other is None:
        assert len(calls) < 12
    else:
        assert len(other.done.result()) == 1
        assert calls == [2] * 12
