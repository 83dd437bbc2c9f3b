"""A quick test that the Hugging Face hub answers, before its library repeats requests for up to a minute."""

import functools
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from huggingface_hub import constants

from lavis_lite.common.sources import download

PROBE_SECONDS = 10
"""Time for the hub's first answer."""


def may_ask() -> bool:
    """Return whether no variable keeps the hub's library off the network."""
    return not (download.is_offline() or constants.HF_HUB_OFFLINE)


def hub_problem() -> str | None:
    """Return why the hub cannot be asked: a variable forbids it, or it does not answer; None if it can.

    Only an answer is remembered, for the life of the process.
    """
    if not may_ask():
        return f"{'LAVIS_LITE_OFFLINE' if download.is_offline() else 'HF_HUB_OFFLINE'} is set"
    try:
        _probe(constants.ENDPOINT)
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        return f"{constants.ENDPOINT} cannot be reached ({reason})"
    return None


@functools.cache
def _probe(endpoint: str) -> None:
    """Raise an error if the hub does not answer. Note: errors are not cached."""
    try:
        urlopen(endpoint, timeout=PROBE_SECONDS).close()
    except HTTPError:
        return  # an answer
