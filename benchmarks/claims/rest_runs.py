"""Runs that several of ReST's claims share; each is made once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.common import configured, run
from raftdiff.rounds import Result

METRICS = ("reward", "shapes-oracle", "shapes-rating", "diversity")


def rest(
    output: str,
    name: str,
    *,
    grows: int,
    thresholds: tuple[float, ...],
    rule: str = "percentile",
    loss_type: str = "bc",
    **changes: Any,
) -> Result:
    """ReST with so many Grows of one Improve for each threshold."""
    options: Mapping[str, Any] = {
        "rule": rule,
        "thresholds": list(thresholds),
        "loss_type": loss_type,
        "gate": False,
        "learning_rate_decay": 0.8,
    }
    settings = {
        "seed": 1,
        "rounds": grows * len(thresholds),
        "evaluation.every": 1,
        "training.steps": 40,
        "algorithm": {"name": "rest", "options": dict(options)},
    }
    return run(configured("claims", output, f"rest-{name}", settings | changes))


def one_grow_no_filter(output: str) -> Result:
    """G1 I0: trained on all that was grown. A percentile of 0 would leave out the worst of each prompt."""
    return rest(output, "g1i0", grows=1, thresholds=(0.0,), rule="global")


def one_grow(output: str) -> Result:
    """G1 I4."""
    return rest(output, "g1i4", grows=1, thresholds=(0.5, 0.75, 0.875, 0.9))


def two_grows(output: str) -> Result:
    """G2 I3."""
    return rest(output, "g2i3", grows=2, thresholds=(0.5, 0.75, 0.875))
