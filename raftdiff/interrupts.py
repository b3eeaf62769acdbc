"""SIGTERM and Ctrl-C: stop at the next safe point, within seconds, with everything durable."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GRACE_S = 6.0  # how long a stage may take to reach its next safe point


class Interrupted(BaseException):
    """The process was asked to stop. `exit_code` is 128 + the signal, as shells have it."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class StopRequest:
    """Whether the process was asked to stop; stages ask at their safe points."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def check(self) -> None:
        """Raise Interrupted if a stop was asked for."""
        if self.signum is not None:
            raise Interrupted(self.signum)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While open, the first SIGTERM or SIGINT is noted for the next safe point; a second one, or GRACE_S without a
    safe point, stops at once. What is on disk is whole at every instant, so nothing is lost but the stage's part.

    Only the main thread of a process gets signals: in any other, the request is never set from here."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(signum: int, frame: object) -> None:
        if request:
            raise Interrupted(signum)
        request.signum = signum
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)

    def at_once(signum: int, frame: object) -> None:
        assert request.signum is not None
        raise Interrupted(request.signum)

    handlers = {signal.SIGALRM: at_once, signal.SIGTERM: note, signal.SIGINT: note}
    previous: dict[int, Callable | int | None] = {s: signal.signal(s, handler) for s, handler in handlers.items()}
    try:
        yield request
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for signum, handler in previous.items():
            signal.signal(signum, handler)
