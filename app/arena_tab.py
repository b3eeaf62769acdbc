"""The tab where people vote on blind pairs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from raftdiff.errors import RaftdiffError

from . import pages
from .arena import Arena
from .follow import Cancels, Made, Told, follow, in_words
from .models import BASE, Cancelled, Contender
from .votes import Pair
from .widgets import PRIVATE, html

logger = logging.getLogger(__name__)

QUESTION = "Which picture is better for the prompt? Click, or use the arrow keys."
BUTTONS = (("left", "← Left"), ("tie", "↑ Tie"), ("bad", "↓ Both bad"), ("right", "Right →"))


class ArenaTab:
    """Args:
    folder: where exports are put for as long as the app runs.
    """

    def __init__(self, arena: Arena, folder: Path):
        self.arena, self.folder = arena, folder
        self._cancels = Cancels()

    def build(self, page: gr.Blocks, tab: gr.Tab) -> None:
        """Put the tab's components and events on the page."""
        if self.arena.refusal is not None:
            html(pages.empty("Nothing to vote on yet", self.arena.refusal), id="rd-arena-empty")
            return
        self.token = gr.State(None)
        self.status = html(pages.status(QUESTION), id="rd-arena-status")
        self.pair = html(id="rd-pair")
        with gr.Row(elem_id="rd-choices"):
            buttons = {
                choice: gr.Button(
                    label,
                    elem_id=f"rd-{choice}",
                    min_width=76,
                    variant="primary" if choice in ("left", "right") else "secondary",
                )
                for choice, label in BUTTONS
            }
        self.reveal = html(id="rd-reveal")
        self.leaderboard = html(self._leaderboard(), id="rd-leaderboard")
        with gr.Row(equal_height=True):
            export = gr.Button("Export the votes as preferences for DPO", elem_id="rd-export")
            self.file = gr.File(
                label="raftdiff train reads this as data.path", interactive=False, visible=False, elem_id="rd-file"
            )

        shown = [self.token, self.pair, self.status]
        first = tab.select(self._first, self.token, [*shown, self.leaderboard], **PRIVATE)
        first.then(self._prepare, None, None, **PRIVATE)
        for choice, button in buttons.items():
            voted = button.click(
                self._vote, [gr.State(choice), self.token], [*shown, self.reveal, self.leaderboard], **PRIVATE
            )
            voted.then(self._prepare, None, None, **PRIVATE)
        export.click(self._export, None, [self.file, self.status], **PRIVATE)
        page.unload(self._cancel)

    def _leaderboard(self) -> str:
        votes = self.arena.votes.all()
        reference = self.arena.models.identity(Contender(name=BASE))
        return pages.leaderboard(votes, reference)

    def _first(self, token: str | None, request: gr.Request) -> Iterator[dict[Any, Any]]:
        yield {self.leaderboard: self._leaderboard()}
        if token is None:
            yield from self._next(request)

    def _vote(self, choice: str, token: str | None, request: gr.Request) -> Iterator[dict[Any, Any]]:
        if token is None:
            yield from self._next(request)
            return
        try:
            vote = self.arena.votes.record(token, choice)
            yield {self.token: None, self.reveal: pages.reveal(vote), self.leaderboard: self._leaderboard()}
        except RaftdiffError as error:
            yield {self.token: None, self.status: pages.status(str(error), "error")}
        yield from self._next(request)

    def _next(self, request: gr.Request) -> Iterator[dict[Any, Any]]:
        if ready := self.arena.take():
            yield self._shown(ready)
            return
        yield {self.status: pages.status("Drawing the next pair"), self.pair: pages.empty("Drawing the next pair")}
        cancel = self._cancels.new(request.session_hash)

        def work(tell: Callable[[Told | Made], None]) -> None:
            def on_wait(ahead: int) -> None:
                tell(Told(text=f"Waiting for the device: {ahead} ahead of you"))

            tell(Made(value=self.arena.draw(on_wait=on_wait, cancel=cancel)))

        try:
            for told in follow(work, cancel):
                if isinstance(told, Made):
                    yield self._shown(told.value)
                else:
                    yield {self.status: pages.status(told.text)}
        except Cancelled:
            return
        except Exception as error:
            if not isinstance(error, RaftdiffError):
                logger.exception("drawing a pair failed")
            yield {self.status: pages.status(f"{in_words(error)}. Press a button to try again.", "error")}

    def _shown(self, pair: Pair) -> dict[Any, Any]:
        return {
            self.token: pair.token,
            self.pair: pages.pair(pair),
            self.status: pages.status(QUESTION),
        }

    def _prepare(self) -> None:
        try:
            self.arena.prepare()
        except RaftdiffError as error:  # whoever asks for the next pair is told
            logger.warning("no pair was prepared: %s", error)

    def _cancel(self, request: gr.Request) -> None:
        self._cancels.stop(request.session_hash)

    def _export(self) -> tuple[Any, Any]:
        path = self.folder / "preferences.parquet"
        try:
            decided = self.arena.votes.export(path)
        except RaftdiffError as error:
            return gr.File(visible=False), pages.status(str(error), "error")
        return gr.File(str(path), visible=True), pages.status(
            f"{decided} preferences are ready to download below", "done"
        )
