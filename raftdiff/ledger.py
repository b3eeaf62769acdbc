"""What each stage costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .types import StageCost


class Ledger:
    """Seconds and denoiser passes per stage; `passes` reads the counter of the policy."""

    def __init__(self, passes: Callable[[], int]):
        self._passes = passes
        self._costs: dict[str, StageCost] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add what the block takes to the stage `name`."""
        began, passes = time.perf_counter(), self._passes()
        try:
            yield
        finally:
            before = self._costs.get(name, StageCost(stage=name, seconds=0.0, passes=0))
            self._costs[name] = StageCost(
                stage=name,
                seconds=before.seconds + time.perf_counter() - began,
                passes=before.passes + self._passes() - passes,
            )

    @property
    def passes(self) -> int:
        """Of all stages since the last `take`."""
        return sum(cost.passes for cost in self._costs.values())

    def take(self) -> tuple[StageCost, ...]:
        """The stages since the last call, in the order in which they began."""
        costs, self._costs = tuple(self._costs.values()), {}
        return costs
