"""Requests in the form of OpenAI's chat completions, checked, and errors in its form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_TEXT = 8_000
"""Characters of all texts of a request; more than any of the models reads."""
MAX_CHOICES = 16
MAX_TOKENS = 4_096
IGNORED = frozenset({"user", "metadata", "store", "stream_options", "service_tier", "safety_identifier"})
"""Fields that do not change the answer."""
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "stop": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}
"""Fields that are not supported, with values that change nothing."""


class RequestError(Exception):
    """A request that is refused: the status of HTTP, and the fields of OpenAI's error."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_json(self) -> dict[str, Any]:
        """Return the body of the response; halves of surrogate pairs, which UTF-8 cannot encode, are escaped."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {
            "error": {key: value and value.encode(errors="backslashreplace").decode() for key, value in error.items()}
        }


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A question about an image, with the questions and answers before it."""

    model: str | None
    image_url: str
    text: str
    rounds: list[tuple[str, str]]
    num_choices: int = 1
    max_tokens: int | None = None
    stream: bool = False
    seed: int | None = None
    decoding: dict[str, Any] = field(default_factory=dict)
    """Settings of `generate`; without any the model decodes in its own way."""

    @property
    def samples(self) -> bool:
        """Whether the answer is drawn at random."""
        return bool(self.decoding.get("use_nucleus_sampling"))


def read_request(body: Any) -> ChatRequest:
    """Return the request of a JSON body. RequestError names the field that is wrong."""
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    fields = Fields(body)
    names = ("model", "messages", "n", "max_tokens", "max_completion_tokens", "min_tokens", "temperature", "top_p")
    for name, value in body.items():
        if name not in (*names, "stream", "seed") and name not in IGNORED and value is not None:
            if name not in NEUTRAL:
                raise RequestError(f"{name[:80]}: unknown field; leave it out", param=name[:80])
            if value not in NEUTRAL[name]:
                raise RequestError(f"{name}: these models do not support it; leave it out", param=name)
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise RequestError(f"model: must be a text, got {model!r}", param="model")
    image_url, text, rounds = read_messages(body.get("messages"))
    most = fields.whole("max_completion_tokens", 1, MAX_TOKENS)
    max_tokens = fields.whole("max_tokens", 1, MAX_TOKENS) if most is None else most
    decoding = _decoding(fields) | ({} if max_tokens is None else {"max_new_tokens": max_tokens})
    if (least := fields.whole("min_tokens", 0, MAX_TOKENS)) is not None:
        decoding["min_new_tokens"] = least
    request = ChatRequest(
        model=model,
        image_url=image_url,
        text=text,
        rounds=rounds,
        num_choices=fields.whole("n", 1, MAX_CHOICES) or 1,
        max_tokens=max_tokens,
        stream=fields.truth("stream"),
        seed=fields.whole("seed", 0, 2**63 - 1),
        decoding=decoding,
    )
    if max_tokens is not None and least is not None and least > max_tokens:
        raise RequestError(f"min_tokens: must be at most max_tokens, {max_tokens:,}, got {least:,}", param="min_tokens")
    if request.num_choices > 1 and not request.samples:
        raise RequestError("n: several choices would be equal; set temperature above 0", param="n")
    return request


def _decoding(fields: Fields) -> dict[str, Any]:
    """Return what temperature and top_p mean: 0 is greedy, neither is the model's own way."""
    temperature, top_p = fields.number("temperature", 0.0, 2.0), fields.number("top_p", 0.0, 1.0)
    if temperature is None and top_p in (None, 1.0):
        return {}
    if temperature == 0.0 or top_p == 0.0:
        return {"num_beams": 1}
    values = {"temperature": 1.0 if temperature is None else temperature, "top_p": 1.0 if top_p is None else top_p}
    return {"use_nucleus_sampling": True, **{name: max(1e-6, value) for name, value in values.items()}}


class Fields:
    """The numbers of a body; a field that is null counts as absent."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = body

    def number(self, name: str, least: float, most: float) -> float | None:
        """Return a number. RequestError for another value or one out of bounds."""
        value = self.body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise RequestError(f"{name}: must be a number from {least:g} to {most:g}, got {_shown(value)}", param=name)
        return float(value)

    def whole(self, name: str, least: int, most: int) -> int | None:
        """Return a whole number. RequestError as `number`."""
        value = self.body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            problem = f"must be a whole number from {least:,} to {most:,}, got {_shown(value)}"
            raise RequestError(f"{name}: {problem}", param=name)
        return value

    def truth(self, name: str) -> bool:
        """Return a truth value, False if it is absent."""
        value = self.body.get(name)
        if value is not None and not isinstance(value, bool):
            raise RequestError(f"{name}: must be true or false, got {_shown(value)}", param=name)
        return bool(value)


def read_messages(messages: Any) -> tuple[str, str, list[tuple[str, str]]]:
    """Return the address of the one image, the last question, and the questions and answers before it."""
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages: must be a list with a message of the role user", param="messages")
    images: list[str] = []
    turns: list[tuple[str, str]] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise RequestError(f"{where}: must be an object, got {_shown(message)}", param=where)
        role = message.get("role")
        expected = "user" if len(turns) % 2 == 0 else "assistant"
        if role in ("system", "developer"):
            problem = "the models were not trained with instructions of a system: write them into the question"
            raise RequestError(f"{where}.role: {problem}", param=f"{where}.role")
        if role != expected:
            problem = f"must be {expected}, as user and assistant take turns, got {_shown(role)}"
            raise RequestError(f"{where}.role: {problem}", param=f"{where}.role")
        text, urls = _content(message.get("content"), f"{where}.content", with_images=role == "user")
        images += urls
        turns.append((expected, text))
    if len(turns) % 2 == 0:
        raise RequestError("messages: the last one must be of the role user", param="messages")
    if len(images) != 1:
        problem = f"must have one image (a part of the type image_url) in all, got {len(images)}"
        raise RequestError(f"messages: {problem}", param="messages")
    if (length := sum(len(text) for _, text in turns)) > MAX_TEXT:
        raise RequestError(f"messages: {length:,} characters, at most {MAX_TEXT:,} are read", param="messages")
    texts = [text for _, text in turns]
    return images[0], texts[-1], list(zip(texts[0:-1:2], texts[1::2], strict=True))


def _content(content: Any, where: str, *, with_images: bool) -> tuple[str, list[str]]:
    """Return the text and the addresses of images of a message."""
    if isinstance(content, str):
        return content.strip(), []
    if not isinstance(content, list):
        raise RequestError(f"{where}: must be a text or a list of parts, got {_shown(content)}", param=where)
    texts, images = [], []
    for number, part in enumerate(content):
        at = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"].strip())
        elif kind == "image_url" and with_images:
            address = part.get("image_url")
            address = address.get("url") if isinstance(address, dict) else address
            if not isinstance(address, str) or not address:
                raise RequestError(f"{at}.image_url.url: missing; give a data: URL", param=f"{at}.image_url")
            images.append(address)
        else:
            raise RequestError(f"{at}: must be a part of the type text or image_url, got {_shown(kind)}", param=at)
    return "\n".join(text for text in texts if text), images


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
