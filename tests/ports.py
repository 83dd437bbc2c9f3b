"""Ports for process groups on this machine."""

import itertools
import os
import socket

_FIRST, _LAST = 12000, 32000  # below the range from which Linux gives ports to whoever asks for any
_numbers = itertools.count(os.getpid() * 97)


def free_port() -> int:
    """A port that nobody listens on, and that no other call in this or a neighbouring process is likely to return.

    A port that the system picked and that was closed again may be given to another test before rank 0 opens it; rank 0
    then fails, and the other ranks wait for it until their timeout.
    """
    for number in itertools.islice(_numbers, _LAST - _FIRST):
        port = _FIRST + number % (_LAST - _FIRST)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise OSError(f"every port from {_FIRST} to {_LAST} of this machine is taken")
