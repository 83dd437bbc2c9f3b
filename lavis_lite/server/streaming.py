"""Texts from the model's thread to a client word by word, and clients that leave before their end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lavis_lite.server.requests import RequestError
from lavis_lite.server.worker import Job, Written

T = TypeVar("T")
Piece = tuple[int, str]
"""The index of a choice, and the next words of its text."""


class Pieces:
    """A queue of pieces, then None, that the model's thread fills and the event loop reads."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Piece | None] = asyncio.Queue()

    def put(self, choice: int, text: str) -> None:
        """Add a piece; from any thread."""
        self._put((choice, text))

    def end(self, done: object) -> None:
        """Add the end, as a callback of the job's future."""
        self._put(None)

    def _put(self, piece: Piece | None) -> None:
        if not self.loop.is_closed():  # as after a second Ctrl-C
            self.loop.call_soon_threadsafe(self.queue.put_nowait, piece)


class EventStream(StreamingResponse):
    """A job's texts as events in OpenAI's form. When it ends, also as the client has left, the job ends."""

    def __init__(self, job: Job, pieces: Pieces, first: Piece | None, head: dict[str, Any]) -> None:
        super().__init__(events(job, pieces, first, head), media_type="text/event-stream")
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancel()


async def events(job: Job, pieces: Pieces, first: Piece | None, head: dict[str, Any]) -> AsyncIterator[str]:
    """Yield an event per piece, then one per choice with its finish reason; an error that comes later is the last."""
    piece, begun = first, set[int]()
    while piece is not None:
        choice, text = piece
        role = {} if choice in begun else {"role": "assistant"}
        yield event({**head, "choices": [{"index": choice, "delta": {**role, "content": text}, "finish_reason": None}]})
        begun.add(choice)
        piece = await pieces.queue.get()
    try:
        written = job.done.result()
    except RequestError as error:
        yield event(error.to_json())
        return
    for choice, one in enumerate(written):
        delta = {} if choice in begun else {"role": "assistant", "content": ""}
        yield event({**head, "choices": [{"index": choice, "delta": delta, "finish_reason": finish_reason(one)}]})
    yield "data: [DONE]\n\n"


def event(content: dict[str, Any]) -> str:
    """Return an event of a stream."""
    return f"data: {json.dumps(content)}\n\n"


def finish_reason(written: Written) -> str:
    """Return OpenAI's word for why a text ended."""
    return "length" if written.is_cut else "stop"


async def before_disconnect(request: Request, wanted: Coroutine[Any, Any, T]) -> T:
    """Return what is awaited. ClientDisconnect if the client leaves first."""
    task, left = asyncio.ensure_future(wanted), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        left.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
