"""Stop signals: a run that is asked to stop finishes its step, saves, and says how to resume.

SIGTERM (schedulers, Kubernetes, torchrun), SIGUSR1 (Slurm's `--signal=USR1@120`) and SIGINT (Ctrl-C) ask once; the
second signal ends the process at once.
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
"""Seconds in which the main thread must stop where nothing is deferred; then the process ends in whatever it waits."""


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
        return exit_code(self.signum)


class StopSignals:
    """Catches the stop signals of the process while it is entered; from another than the main thread it catches none.

    A signal raises Stopped in the main thread: at once, or where the body of `deferred` allows it.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._deferred, self._at_once_since = False, 0.0
        self._put_off = False  # a signal came where an exception would be lost
        self._before: dict[int, Any] = {}
        self._wakeup = (-1, None, None)  # the file descriptor there was before, and our two sockets

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        self._wakeup = (before, receiver, sender)
        threading.Thread(target=self._watch, args=(receiver,), daemon=True).start()
        for signum in SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup leaves it
                self._before[signum] = signal.signal(signum, self._handle)
        os.register_at_fork(after_in_child=self._in_child)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        before, _, sender = self._wakeup
        if sender is not None:
            signal.set_wakeup_fd(before)
            sender.shutdown(socket.SHUT_RDWR)  # ends the watching thread, also if a child has a copy
            sender.close()
        self._before, self._wakeup = {}, (-1, None, None)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """In the body a signal only sets `signum`, and the body decides where to stop; after it, Stopped is raised."""
        self._deferred = True
        try:
            yield
        finally:
            self._end_deferral()
        self._raise_if_asked()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """In the body, which is part of one of `deferred`, a signal raises Stopped at once."""
        self._end_deferral()
        self._raise_if_asked()
        try:
            yield
        finally:
            self._deferred = True
        self._raise_if_asked()  # a destructor may have swallowed the signal's exception

    def _end_deferral(self) -> None:
        self._deferred, self._at_once_since = False, time.monotonic()

    def _raise_if_asked(self) -> None:
        if self.signum is not None:
            raise Stopped(self.signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and not self._put_off:
            return  # the watching thread ends the process
        self.signum = self.signum or signum
        self._put_off = not self._deferred and _would_be_lost(frame)
        if self._deferred:
            self._say(signum)
        elif not self._put_off:
            raise Stopped(self.signum)

    def _say(self, signum: int) -> None:
        os.write(2, f"{signal.Signals(signum).name}: stopping after this step; once more ends at once\n".encode())

    def _watch(self, receiver: socket.socket) -> None:
        """Act on what the main thread, perhaps waiting in C, does not see: a second signal, or a first one put off."""
        first, asked_at, sent = None, 0.0, 0
        with receiver:
            while received := _receive(receiver):
                if received == TICK and first is not None:
                    self._end_if_stuck(first)
                    if self._put_off:
                        sent += 1
                        _thread.interrupt_main(first)  # calls `_handle` again
                elif sent:  # what it has put into the socket
                    sent -= 1
                elif received[0] in SIGNALS and first is None:
                    first, asked_at = received[0], time.monotonic()
                    self._at_once_since = asked_at
                    receiver.settimeout(1.0)
                elif received[0] == signal.SIGINT or (received[0] in SIGNALS and time.monotonic() - asked_at > TWICE):
                    _end(received[0], "again, so the process ends at once")

    def _end_if_stuck(self, signum: int) -> None:
        if not self._deferred and time.monotonic() - self._at_once_since > GRACE:
            _end(signum, f"came {GRACE:g} seconds ago and the process still waits, so it ends at once")

    def _in_child(self) -> None:
        """A forked process must not write to the watching thread's socket."""
        if self._wakeup[2] is not None:
            signal.set_wakeup_fd(-1)


def _would_be_lost(frame: FrameType | None) -> bool:
    """Whether Python ignores exceptions where the main thread is: in a destructor, or a hook around a fork."""
    while frame is not None and frame.f_code.co_name not in ("__del__", "_launch"):
        frame = frame.f_back
    return frame is not None


def _receive(receiver: socket.socket) -> bytes:
    """The next signal's number, TICK after the socket's timeout, nothing at its end."""
    try:
        return receiver.recv(1)
    except TimeoutError:
        return TICK


def _end(signum: int, why: str) -> None:
    os.write(2, f"{signal.Signals(signum).name} {why}\n".encode())
    os._exit(exit_code(signum))


def exit_code(signum: int) -> int:
    """The exit code of a process that stopped because of a signal."""
    return 130 if signum == signal.SIGINT else 143


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Let no stop signal reach this thread in the body, nor the loader workers that it starts, until they are ready."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_signals(worker_id: int) -> None:
    """Let a loader worker live on when a stop signal reaches the whole process group or job: its parent ends it.

    A second SIGTERM ends it, since a parent that gives up on a worker sends one too. For `worker_init_fn`; the workers
    are started in `held_back`.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_next_time)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _end_next_time(signum: int, frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_DFL)
