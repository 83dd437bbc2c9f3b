"""Addresses at which servers listen."""

import socket

from lavis_lite.common.bounds import check_number
from lavis_lite.common.errors import InputError

LOCAL = "127.0.0.1"


def is_local(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    return host in (LOCAL, "localhost", "::1")


def check_address(host: str, port: int) -> None:
    """Raise InputError if no server can be started at an address."""
    check_number("--port", port, 1, 65_535)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"--host {host} --port {port}: no server can be started there ({reason}); choose another --port, or end "
            "the program that uses it"
        ) from error
