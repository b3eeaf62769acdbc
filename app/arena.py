"""Blind pairs for people to vote on: drawn, given random sides, issued with a token, one prepared while they look."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Sequence
from itertools import combinations
from threading import Event, Lock

from raftdiff.errors import ConfigError

from .comparison import png
from .models import Contender, Drawing, Models
from .votes import Pair, Side, Votes

READY = 2  # pairs that are prepared ahead


class Arena:
    """Where pairs come from.

    Args:
        prompts: drawn from evenly, at random.
        drawing: how every picture is drawn.
    """

    def __init__(self, models: Models, votes: Votes, prompts: Sequence[str], drawing: Drawing):
        self.models, self.votes, self.prompts, self.drawing = models, votes, list(prompts), drawing
        self._matches = list(combinations(models.contenders(), 2))
        self._identities: dict[str, str] = {}
        self._round: list[tuple[Contender, Contender]] = []
        self._ready: deque[Pair] = deque()
        self._lock = Lock()
        self._chance = secrets.SystemRandom()

    @property
    def refusal(self) -> str | None:
        """Why there can be no vote here, or None."""
        if not self._matches:
            return "A vote needs two models, and there is no LoRA here yet: `raftdiff demo` makes one in minutes."
        if not self.prompts:
            return "A vote needs prompts: start the app with --prompts FILE."
        return None

    def take(self) -> Pair | None:
        """A pair that is ready and that nobody has seen, if there is one."""
        with self._lock:
            return self._ready.popleft() if self._ready else None

    def prepare(self) -> None:
        """Draw one pair ahead, unless enough are ready or others wait for the device."""
        if self.refusal is None and len(self._ready) < READY and not self.models.turns.busy:
            pair = self.draw()
            with self._lock:
                self._ready.append(pair)

    def draw(self, *, on_wait: Callable[[int], None] = lambda ahead: None, cancel: Event | None = None) -> Pair:
        """A new pair: two models, a prompt and a seed by chance.

        Raises:
            ConfigError: there is nothing to vote on.
            Busy, Cancelled, WeightsError: as for a comparison.
        """
        if self.refusal is not None:
            raise ConfigError(self.refusal)
        prompt, seed = self._chance.choice(self.prompts), self._chance.randrange(2**31)
        sides = self._match()
        with self.models.turns.turn(cancel, on_wait):
            left, right = (self._side(contender, prompt, seed, cancel) for contender in sides)
        settings = {"base": self.models.model.path, **vars(self.drawing)}
        return self.votes.issue(prompt, seed, left, right, settings)

    def _match(self) -> list[Contender]:
        """Two models on random sides; each two meet equally often, in random order."""
        with self._lock:
            if not self._round:
                self._round = self._chance.sample(self._matches, len(self._matches))
            return self._chance.sample(self._round.pop(), 2)

    def _side(self, contender: Contender, prompt: str, seed: int, cancel: Event | None) -> Side:
        [drawn] = self.models.draw(contender, prompt, [seed], self.drawing, cancel=cancel)
        if contender.name not in self._identities:  # the weights that were loaded, whatever the files become
            self._identities[contender.name] = self.models.identity(contender)
        return Side(model=self._identities[contender.name], scores=drawn.scores, png=png(drawn))
