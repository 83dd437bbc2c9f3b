"""The server: OpenAI's chat completions over one model, as an ASGI application."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lavis_lite.server.images import image_of
from lavis_lite.server.requests import ChatRequest, RequestError, read_request
from lavis_lite.server.streaming import EventStream, Pieces, before_disconnect, finish_reason
from lavis_lite.server.worker import Worker, Written, num_tokens

BODY_TIMEOUT = 60.0
"""Seconds in which a request's body must arrive."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the requests that a server accepts."""

    max_bytes: int
    """Bytes of a request's body, and of an image that is fetched."""
    allow_urls: bool = False
    """Whether images are fetched from http(s) URLs."""


class Server:
    """The endpoints of a model that is served by a name."""

    def __init__(self, worker: Worker, *, name: str, limits: Limits) -> None:
        self.worker, self.name, self.limits = worker, name, limits
        self.started = int(time.time())

    def app(self) -> Starlette:
        """Return the application."""
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/chat/completions", self.completions, methods=["POST"]),
        ]
        handlers: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
            RequestError: refused,
            HTTPException: not_found,
            ClientDisconnect: left,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    async def health(self, request: Request) -> Response:
        """Say that the server answers, and how many requests wait."""
        return JSONResponse({"status": "ok", "model": self.name, "waiting": self.worker.waiting.qsize()})

    def about(self) -> dict[str, Any]:
        """Return the model as OpenAI describes one."""
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "lavis_lite"}

    async def models(self, request: Request) -> Response:
        """List the one model."""
        return JSONResponse({"object": "list", "data": [self.about()]})

    async def one_model(self, request: Request) -> Response:
        """Describe the model."""
        self.check_name(request.path_params["name"])
        return JSONResponse(self.about())

    def check_name(self, name: str) -> None:
        """Raise RequestError for another model than the server's."""
        if name != self.name:
            problem = f"model {name[:80]!r} does not exist; this server has {self.name}"
            raise RequestError(problem, status=404, param="model", code="model_not_found")

    async def completions(self, request: Request) -> Response:
        """Answer a request."""
        chat = read_request(await self.read_json(request))
        if chat.model is not None:
            self.check_name(chat.model)
        limits = self.limits
        image = await run_in_threadpool(
            image_of, chat.image_url, allow_urls=limits.allow_urls, max_bytes=limits.max_bytes
        )
        pieces = Pieces()
        job = await run_in_threadpool(self.worker.submit, chat, image, pieces.put if chat.stream else None)
        job.done.add_done_callback(pieces.end)
        try:
            first = await before_disconnect(request, pieces.queue.get())
        except BaseException:  # the client has left, or the server ends
            job.cancel()
            raise
        if first is None:
            written = job.done.result()  # an error is the response, as no text was sent
            if not chat.stream:
                return JSONResponse(await run_in_threadpool(self.answer, chat, written))
        return EventStream(job, pieces, first, self.head("chat.completion.chunk"))

    async def read_json(self, request: Request) -> Any:
        """Return the body. RequestError if it is not JSON, too large, or does not arrive."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("content-type: must be application/json", status=415)
        try:
            body = await asyncio.wait_for(self._body(request), BODY_TIMEOUT)
            return json.loads(body)
        except TimeoutError:
            raise RequestError(f"the body did not arrive in {BODY_TIMEOUT:g} seconds", status=408) from None
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is not JSON ({error})") from error

    async def _body(self, request: Request) -> bytes:
        most, parts, size = self.limits.max_bytes, list[bytes](), 0
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > most:
            raise too_large(most)
        try:
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_large(most)
                parts.append(part)
        except ClientDisconnect:
            raise RequestError("the connection was closed before the body had arrived", status=400) from None
        return b"".join(parts)

    def head(self, kind: str) -> dict[str, Any]:
        """Return the fields that a response of a kind begins with."""
        number, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        return {"id": number, "object": kind, "created": created, "model": self.name}

    def answer(self, chat: ChatRequest, written: list[Written]) -> dict[str, Any]:
        """Return the body of the response."""
        lengths = [num_tokens(self.worker.loaded, one.text) for one in written]
        asked = num_tokens(self.worker.loaded, self.worker.prompt(chat))
        usage = {"prompt_tokens": asked, "completion_tokens": sum(lengths), "total_tokens": asked + sum(lengths)}
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": None,
                "finish_reason": finish_reason(one),
            }
            for index, one in enumerate(written)
        ]
        return {**self.head("chat.completion"), "choices": choices, "usage": usage}


def too_large(most: int) -> RequestError:
    """Return the error of a body that has more bytes than the server accepts."""
    return RequestError(f"the body has more than {most:,} bytes; send a smaller image", status=413)


async def refused(request: Request, error: RequestError) -> Response:
    """Return the response to a request that was refused."""
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.to_json(), status_code=error.status, headers=headers)


async def left(request: Request, error: ClientDisconnect) -> Response:
    """Return a response that nobody reads."""
    return Response(status_code=499)


async def not_found(request: Request, error: HTTPException) -> Response:
    """Return the response to another path or method."""
    problem = f"{request.method} {request.url.path}: {error.detail}; this server has POST /v1/chat/completions"
    return await refused(request, RequestError(problem, status=error.status_code))
