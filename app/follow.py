"""Work in a thread of its own, followed from a generator, so that a page shows each step and can stop it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

from raftdiff.errors import RaftdiffError


@dataclass(frozen=True, kw_only=True)
class Told:
    """What is going on: words, and the share that is done where it is known."""

    text: str
    share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Made:
    """What the work has come to."""

    value: Any


def follow(work: Callable[[Callable[[Told | Made], None]], None], cancel: Event) -> Iterator[Told | Made]:
    """What `work` tells, as it tells it; of what is told faster than it is read, the last. When the reader goes away,
    `cancel` is set.

    Raises:
        RaftdiffError: as `work` raised it.
    """
    told: SimpleQueue[Told | Made | Exception | None] = SimpleQueue()

    def run() -> None:
        try:
            work(told.put)
            told.put(None)
        except Exception as error:
            told.put(error)

    Thread(target=run, daemon=True).start()
    try:
        while (latest := _latest(told)) is not None:
            if isinstance(latest, Exception):
                raise latest
            yield latest
    finally:
        cancel.set()


def _latest(told: SimpleQueue) -> Told | Made | Exception | None:
    """The next thing, skipping words that were overtaken."""
    item = told.get()
    while isinstance(item, Told):
        try:
            item = told.get_nowait()
        except Empty:
            break
    return item


class Cancels:
    """The flag by which the drawing of a browser session is stopped."""

    def __init__(self) -> None:
        self._flags: dict[str | None, Event] = {}

    def new(self, session: str | None) -> Event:
        self.stop(session)
        self._flags[session] = Event()
        return self._flags[session]

    def stop(self, session: str | None) -> None:
        if flag := self._flags.pop(session, None):
            flag.set()


def in_words(error: Exception) -> str:
    """An error as a person reads it; anything but our own is a fault of the app's."""
    return (
        str(error)
        if isinstance(error, RaftdiffError)
        else f"the app failed ({type(error).__name__}); its terminal says more"
    )
