"""What the app shows beside gradio's own components: HTML from templates that escape everything that is put in."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from raftdiff.report import SMALL_SIDE, Chart, environment, picture, totals

from .comparison import Row, best_by_reward, data_address
from .leaderboard import agreements, shown_names, standings
from .runs import RunFolder, charts, training_charts
from .votes import Pair, Vote

TEMPLATES = Path(__file__).parent / "templates"
CSS, JS = TEMPLATES / "app.css", TEMPLATES / "app.js"
VERDICTS = {"left": "the left one is better", "right": "the right one is better", "tie": "a tie", "bad": "both are bad"}


def header(base: str, device: str, *, busy: bool, waiting: int, notes: Sequence[str]) -> str:
    return _page("header", base=base, device=device, busy=busy, waiting=waiting, notes=notes)


def status(text: str, kind: str = "", share: float | None = None) -> str:
    """A line on what is going on; kind `error` or `done`, and a bar for a share of 0 to 1."""
    return _page("status", text=text, kind=kind, share=share)


def empty(title: str, *lines: str) -> str:
    """What to do where there is nothing to show yet."""
    return _page("empty", title=title, lines=lines)


def board(rows: Sequence[Row]) -> str:
    return _page("board", rows=rows)


def pair(shown: Pair) -> str:
    """Two pictures without a word on where they come from."""
    with Image.open(io.BytesIO(shown.left.png), formats=["PNG"]) as image:
        small = max(image.size) <= SMALL_SIDE
    left, right = data_address(shown.left.png), data_address(shown.right.png)
    return _page("pair", prompt=shown.prompt, left=left, right=right, small=small)


def reveal(vote: Vote) -> str:
    winners = best_by_reward([vote.left_scores, vote.right_scores])
    return _page(
        "reveal",
        vote=vote,
        verdict=VERDICTS[vote.choice],
        names=shown_names([vote.left, vote.right]),
        best_left=[name for name, place in winners.items() if place == 0],
        best_right=[name for name, place in winners.items() if place == 1],
    )


def leaderboard(votes: Sequence[Vote], reference: str | None) -> str:
    found = standings(votes, reference)
    return _page(
        "leaderboard",
        standings=found,
        reference=next((s.model for s in found if s.points == s.low == s.high == 0), None),
        names=shown_names([s.model for s in found]),
        agreements=agreements(votes),
    )


def run_view(runs: Sequence[RunFolder], prompt: str | None, round: int | None) -> str:
    """One run, or two over one another."""
    prompts = [prompt] if prompt else []
    of = [f" of {run.name}" if len(runs) > 1 else "" for run in runs]
    grids, extremes = [], []
    for run, name in zip(runs, of, strict=True):
        rounds, rows = run.grid(prompts)
        grids.append({"title": f"The same seeds, round by round{name}", "rounds": rounds, "rows": rows})
        if run.rounds:
            wanted = round if round in run.rounds else run.rounds[-1]
            title = f"Best and worst of each prompt{name}, round {wanted}"
            extremes.append({"title": title, "rows": run.extremes(wanted, prompts)})
    curves = {"charts": charts(runs), "training": training_charts(runs), "chart_box": Chart}
    return _page("run", runs=runs, grids=grids, extremes=extremes, **curves)


def _page(template: str, **values: Any) -> str:
    return environment(TEMPLATES).get_template(f"{template}.html.jinja").render(shown=picture, totals=totals, **values)
