"""The programmatic side: five endpoints for gradio_client. Everything else that the page calls is private."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import gradio as gr

from raftdiff.errors import RaftdiffError

from .arena import Arena
from .comparison import data_address, draw, parse, plain
from .leaderboard import agreements, standings
from .models import BASE, Contender, Models
from .security import ENDPOINTS

logger = logging.getLogger(__name__)


def add_endpoints(models: Models, arena: Arena) -> None:
    """Put the endpoints on the page that is being built."""

    def list_models() -> dict:
        """The base, the LoRAs and the rewards that are loaded."""
        return {"base": models.model.path, "loras": list(models.loras), "rewards": models.reward_names}

    def compare(settings: dict) -> list:
        """Draw a comparison; its settings are those of `raftdiff.app.comparison.Comparison`."""
        *_, rows = draw(parse(settings), models)
        return plain(rows)

    def pair() -> dict:
        """A blind pair with the token to vote on it."""
        issued = arena.take() or arena.draw()
        pictures = {"left": data_address(issued.left.png), "right": data_address(issued.right.png)}
        return {"token": issued.token, "prompt": issued.prompt, **pictures}

    def vote(token: str, choice: str) -> dict:
        """Vote `left`, `right`, `tie` or `bad` on a pair; tells which models they were."""
        counted = arena.votes.record(token, choice)
        sides = {
            side: {"model": getattr(counted, side), "scores": getattr(counted, f"{side}_scores")}
            for side in ("left", "right")
        }
        return {"counted": counted.choice, **sides}

    def leaderboard() -> dict:
        """Standings and agreements."""
        votes = arena.votes.all()
        found = standings(votes, models.identity(Contender(name=BASE)))
        return {
            "standings": [vars(s) for s in found],
            "agreements": [vars(a) | {"share": a.share} for a in agreements(votes)],
        }

    functions: tuple[Callable[..., Any], ...] = (list_models, compare, pair, vote, leaderboard)
    for name, function in zip(ENDPOINTS, functions, strict=True):
        gr.api(in_words(function), api_name=name, concurrency_limit=None)


def in_words(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with errors that a client reads."""

    @wraps(function)
    def called(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except RaftdiffError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return called
