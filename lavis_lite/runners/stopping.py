"""Stop signals: a run that gets one finishes its step, saves, and says how to resume.

The first SIGTERM (schedulers, Kubernetes, torchrun), SIGUSR1 (Slurm's `--signal=USR1@120`) or SIGINT (Ctrl-C) requests
a stop; the second signal ends the process at once.
"""

import _thread
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TWICE = 1.0
"""Seconds in which a second SIGTERM or SIGUSR1 is the same request, from a scheduler and forwarded by torchrun."""
TICK = b"\0"
GRACE = 10.0
"""Seconds that the main thread has for stopping where nothing is deferred; then the process ends, even in C code."""


class Stopped(BaseException):
    """The run ends because of a signal. `step` and `job_id` say what can be resumed, if anything was saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.step: int | None = None
        self.job_id: str | None = None

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, as from a shell; 143 after the others."""
        return 130 if self.signum == signal.SIGINT else 143


class StopSignals:
    """Catches the stop signals of the process while it is entered; outside the main thread it catches none.

    A signal raises Stopped in the main thread: at once, or where the body of `deferred` allows it.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._is_deferred, self._at_once_since = False, 0.0
        self._is_pending = False  # a signal came where an exception would be lost
        self._handlers_before: dict[int, Any] = {}
        self._wakeup_before = -1
        self._sender: socket.socket | None = None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self
        receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(receiver,), daemon=True).start()
        for signum in SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup leaves it
                self._handlers_before[signum] = signal.signal(signum, self._handle)
        os.register_at_fork(after_in_child=self._in_child)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._handlers_before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        if self._sender is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            self._sender.shutdown(socket.SHUT_RDWR)  # ends the watching thread, also if a child has a copy
            self._sender.close()
        self._handlers_before, self._sender = {}, None

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """In the body a signal only sets `signum`, and the body decides where to stop; after it, raise Stopped."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._end_deferral()
        self._raise_if_signalled()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the body of `deferred`: let a signal raise Stopped at once."""
        self._end_deferral()
        self._raise_if_signalled()
        try:
            yield
        finally:
            self._is_deferred = True
        self._raise_if_signalled()  # a destructor may have swallowed the signal's exception

    def _end_deferral(self) -> None:
        self._is_deferred, self._at_once_since = False, time.monotonic()

    def _raise_if_signalled(self) -> None:
        if self.signum is not None:
            raise Stopped(self.signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and not self._is_pending:
            return  # the watching thread ends the process
        self.signum = self.signum or signum
        self._is_pending = not self._is_deferred and _would_be_lost(frame)
        if self._is_deferred:
            name = signal.Signals(signum).name
            os.write(2, f"{name}: stopping after this step; once more ends at once\n".encode())
        elif not self._is_pending:
            raise Stopped(self.signum)

    def _watch(self, receiver: socket.socket) -> None:
        """Act on what the main thread, perhaps waiting in C, does not notice: a second signal, or a pending first."""
        first: signal.Signals | None = None
        first_at, num_sent = 0.0, 0
        with receiver:
            while received := _receive(receiver):
                if received == TICK and first is not None:
                    if not self._is_deferred and time.monotonic() - self._at_once_since > GRACE:
                        _end(first, f"came {GRACE:g} seconds ago and the process still waits, so it ends at once")
                    if self._is_pending:
                        num_sent += 1
                        _thread.interrupt_main(first)  # calls `_handle` again
                elif num_sent:  # the byte that interrupt_main has put into the socket
                    num_sent -= 1
                elif received[0] in SIGNALS and first is None:
                    first, first_at = signal.Signals(received[0]), time.monotonic()
                    self._at_once_since = first_at
                    receiver.settimeout(1.0)
                elif received[0] == signal.SIGINT or (received[0] in SIGNALS and time.monotonic() - first_at > TWICE):
                    _end(received[0], "again, so the process ends at once")

    def _in_child(self) -> None:
        """Keep a forked process from writing to the watching thread's socket."""
        if self._sender is not None:
            signal.set_wakeup_fd(-1)


def _would_be_lost(frame: FrameType | None) -> bool:
    """Return whether Python ignores exceptions where the main thread is: in a destructor, or a hook around a fork."""
    while frame is not None and frame.f_code.co_name not in ("__del__", "_launch"):
        frame = frame.f_back
    return frame is not None


def _receive(receiver: socket.socket) -> bytes:
    """Return the next signal's number, TICK after the socket's timeout, nothing at its end."""
    try:
        return receiver.recv(1)
    except TimeoutError:
        return TICK


def _end(signum: int, why: str) -> None:
    os.write(2, f"{signal.Signals(signum).name} {why}\n".encode())
    os._exit(Stopped(signum).exit_code)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block stop signals in this thread, and in the loader workers that the body starts until they are ready."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals(worker_id: int) -> None:
    """Keep a loader worker alive when a stop signal reaches the whole process group or job: its parent ends it.

    A second SIGTERM ends it, since a parent that gives up on a worker sends one too. For `worker_init_fn`; start the
    workers in `signals_blocked`.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_next_time)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _end_next_time(signum: int, frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_DFL)
