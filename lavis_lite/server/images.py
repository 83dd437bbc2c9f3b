"""The image of a request: a data: URL, or if the server allows it an http(s) URL of the public internet."""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import socket
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import IO
from urllib.parse import unquote_to_bytes, urlsplit

from PIL import Image

from lavis_lite.common.errors import InputError
from lavis_lite.common.image_io import BROKEN, formats, open_file, to_rgb
from lavis_lite.common.records import StoredImage
from lavis_lite.server.requests import RequestError

MAX_PIXELS = 50_000_000
"""Images with more pixels are refused before decoding."""
TIMEOUT = 10.0
"""Seconds that another server has for each part of an image."""
PARAM = "messages"


@dataclass(frozen=True)
class Uploaded(StoredImage):
    """The bytes of an image file."""

    content: bytes

    def read(self) -> bytes:
        return self.content


def image_of(url: str, *, allow_urls: bool, max_bytes: int) -> Image.Image:
    """Return the image that a request names, as RGB. RequestError if it cannot be had."""
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        return decode(data_of(url))
    if scheme not in ("http", "https"):
        problem = f"must be a data: URL, got {url[:40]!r}" if not allow_urls else f"unknown address {url[:40]!r}"
        raise RequestError(f"image_url: {problem}", param=PARAM, code="invalid_image_url")
    if not allow_urls:
        problem = "this server does not fetch images: send a data: URL, or start it with --allow-urls"
        raise RequestError(f"image_url: {problem}", param=PARAM, code="invalid_image_url")
    return decode(fetch(url, max_bytes=max_bytes))


def data_of(url: str) -> bytes:
    """Return the content of a data: URL. RequestError if it is not base64."""
    head, comma, content = url.partition(",")
    if not comma:
        raise RequestError("image_url: a data: URL is data:image/png;base64,...", param=PARAM, code="invalid_image_url")
    try:
        if head.lower().endswith(";base64"):
            return base64.b64decode("".join(content.split()), validate=True)
        return unquote_to_bytes(content)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"image_url: not base64 ({error})", param=PARAM, code="invalid_base64") from error


def decode(content: bytes) -> Image.Image:
    """Return an image as RGB, its first frame. RequestError if it is broken, of another kind or too large."""
    advice = f"at most {MAX_PIXELS:,} are decoded; send a smaller image"
    try:
        opened = open_file(Uploaded(content))
    except InputError as error:
        raise RequestError(f"image_url: too many pixels, {advice}", param=PARAM, code="image_too_large") from error
    except BROKEN as error:
        raise unreadable() from error
    with opened as image:
        if (pixels := image.width * image.height) > MAX_PIXELS:
            raise RequestError(f"image_url: {pixels:,} pixels, {advice}", param=PARAM, code="image_too_large")
        try:
            return to_rgb(image)
        except InputError as error:  # numbers out of range
            raise RequestError(f"image_url: {error}", param=PARAM, code="invalid_image_format") from error
        except BROKEN as error:
            raise unreadable() from error


def unreadable() -> RequestError:
    """Return the error of a file that is broken or no image."""
    problem = f"broken, truncated or of another kind; send one of {', '.join(formats())}"
    return RequestError(f"image_url: {problem}", param=PARAM, code="invalid_image_format")


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: they may lead to an address that was not checked."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> None:
        return None


def fetch(url: str, *, max_bytes: int) -> bytes:
    """Return the content of an http(s) URL. RequestError if it has no public address, or does not answer with it."""
    check_public(url)
    opener = urllib.request.build_opener(NoRedirects, urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers={"User-Agent": "lavis_lite"}), timeout=TIMEOUT) as answer:
            content: bytes = answer.read(max_bytes + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else "no answer"
        problem = f"{url[:200]} cannot be fetched ({reason})"
        raise RequestError(f"image_url: {problem}", param=PARAM, code="invalid_image_url") from error
    if len(content) > max_bytes:
        problem = f"{url[:200]} has more than {max_bytes:,} bytes"
        raise RequestError(f"image_url: {problem}", param=PARAM, code="image_too_large")
    return content


def check_public(url: str) -> None:
    """Raise RequestError unless all addresses of a URL's host are of the public internet: a request must not reach
    what only this machine reaches.
    """
    try:
        parts = urlsplit(url)
        found = socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise RequestError(f"image_url: {url[:200]}: unknown host", param=PARAM, code="invalid_image_url") from error
    addresses = {ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in found}
    if not addresses or not all(address.is_global for address in addresses):
        problem = f"{parts.hostname} is not an address of the public internet"
        raise RequestError(f"image_url: {problem}", param=PARAM, code="invalid_image_url")
