"""Whose turn it is on the device: one drawing at a time, in the order of asking, with a bounded line."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, Event

from raftdiff.errors import RaftdiffError

POLL = 0.2  # seconds between looks at whether a waiting drawing was given up


class Busy(RaftdiffError):
    """The line is full."""


class Cancelled(RaftdiffError):
    """The person who asked for the drawing gave it up."""


class Turns:
    """The line before one device.

    Args:
        most: how many may wait, beside the one whose turn it is.
    """

    def __init__(self, most: int = 8):
        self.most = most
        self.closed = Event()
        """Set when the app ends: what draws must stop too."""
        self._line: deque[object] = deque()
        self._changed = Condition()

    @property
    def waiting(self) -> int:
        """How many wait, without the one whose turn it is."""
        return max(0, len(self._line) - 1)

    @property
    def busy(self) -> bool:
        return bool(self._line)

    @contextmanager
    def turn(self, cancel: Event | None = None, on_wait: Callable[[int], None] = lambda ahead: None) -> Iterator[None]:
        """Wait for the turn and hold it. `on_wait` is told how many are ahead, each time that changes.

        Raises:
            Busy: the line is full.
            Cancelled: `cancel` was set while waiting, or the app ends.
        """
        ticket = object()
        with self._changed:
            if self.closed.is_set():
                raise Cancelled("the app ends")
            if len(self._line) > self.most:
                raise Busy(f"{self.waiting} drawings wait already, and the line is full; try again in a minute")
            self._line.append(ticket)
        try:
            told = 0
            while ahead := self._ahead(ticket, told):
                if self.closed.is_set() or (cancel is not None and cancel.is_set()):
                    raise Cancelled("cancelled while waiting")
                if ahead != told:
                    on_wait(ahead)
                told = ahead
            yield
        finally:
            with self._changed:
                self._line.remove(ticket)
                self._changed.notify_all()

    def close(self, most_s: float = 20.0) -> None:
        """Stop what waits and what draws, and wait until the device is free, but not for ever: a process that ends
        while a thread computes is aborted by torch."""
        self.closed.set()
        with self._changed:
            self._changed.wait_for(lambda: not self._line, most_s)

    def _ahead(self, ticket: object, told: int) -> int:
        """How many stand before the ticket; if that is what was told, after the next change or a moment."""
        with self._changed:
            if self._line.index(ticket) == told != 0:
                self._changed.wait(POLL)
            return self._line.index(ticket)
