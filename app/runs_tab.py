"""The tab that shows runs, live while they train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from raftdiff.errors import RaftdiffError

from . import pages
from .runs import RunFolder, Runs
from .widgets import PRIVATE, html

NONE, ALL, LAST = "(none)", "(all)", "(last)"
SECONDS = 3  # between looks at the folder


class RunsTab:
    """The runs in one folder."""

    def __init__(self, runs: Runs):
        self.runs = runs

    def build(self, page: gr.Blocks, tab: gr.Tab) -> None:
        """Put the tab's components and events on the page."""
        with gr.Row():
            self.name = gr.Dropdown([], label="Run", elem_id="rd-run", min_width=140)
            self.other = gr.Dropdown([NONE], value=NONE, label="Compare with", elem_id="rd-other", min_width=140)
            self.prompt = gr.Dropdown([ALL], value=ALL, label="Prompt", elem_id="rd-prompt", min_width=140)
            self.round = gr.Dropdown(
                [LAST], value=LAST, label="Best and worst of round", elem_id="rd-round", min_width=140
            )
        self.view = html(pages.status("Reading the runs"), id="rd-view")
        self.seen = gr.State(None)
        timer = gr.Timer(SECONDS, active=False)
        chosen = [self.name, self.other, self.prompt, self.round]
        outputs = [*chosen, self.view, self.seen]
        gr.on([tab.select, timer.tick], self._refresh, [*chosen, self.seen], outputs, **PRIVATE)
        gr.on([box.input for box in chosen], self._refresh, [*chosen, self.seen], outputs, **PRIVATE)
        tab.select(lambda: gr.Timer(active=True), None, timer, **PRIVATE)

    def _refresh(self, name: str | None, other: str, prompt: str, round: Any, seen: Any) -> dict[Any, Any]:
        """What has changed, in the folder or in what was chosen."""
        names = self.runs.names()
        name = name if name in names else next(iter(names), None)
        if name is None:
            text = pages.empty(
                "No runs yet",
                f"There is no run in {self.runs.folder}.",
                "`raftdiff demo` makes one in minutes; this page shows it while it trains.",
            )
            return {self.view: text, self.seen: None} if seen is not None or not names else {}
        try:
            shown = [self.runs.open(one) for one in dict.fromkeys([name, *([other] if other in names else [])])]
            signature = (names, [run.signature for run in shown], prompt, round)
            if signature == seen:
                return {self.seen: gr.skip()}
            return {
                **self._choices(names, shown, prompt, round),
                self.view: self._view(shown, prompt, round),
                self.seen: signature,
            }
        except RaftdiffError as error:
            return {
                self.name: gr.Dropdown(names, value=name),
                self.view: pages.status(str(error), "error"),
                self.seen: None,
            }

    def _choices(self, names: list[str], shown: Sequence[RunFolder], prompt: str, round: Any) -> dict[Any, Any]:
        prompts = list(dict.fromkeys(text for run in shown for text in run.prompts()))
        rounds = sorted({number for run in shown for number in run.rounds})
        others = [NONE, *(one for one in names if one != shown[0].name)]
        return {
            self.name: gr.Dropdown(names, value=shown[0].name),
            self.other: gr.Dropdown(others, value=shown[1].name if len(shown) > 1 else NONE),
            self.prompt: gr.Dropdown([ALL, *prompts], value=prompt if prompt in prompts else ALL),
            self.round: gr.Dropdown(
                [(LAST, LAST), *((str(n), n) for n in rounds)], value=round if round in rounds else LAST
            ),
        }

    def _view(self, shown: Sequence[RunFolder], prompt: str, round: Any) -> str:
        return pages.run_view(shown, None if prompt == ALL else prompt, round if isinstance(round, int) else None)
