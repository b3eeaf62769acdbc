"""Simulated feedback: the embedded world's exact oracle behind the interface of a judge, with noise at a stated rate.

It judges pictures and reviews of the embedded world and nothing else. What is learned from it says how the method
works, not how good a judge some model is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

from raftdiff.errors import ConfigError
from raftdiff.principles import Principle
from raftdiff.registry import nearest
from raftdiff.shapes import oracle
from raftdiff.shapes.captions import Caption, parse
from raftdiff.shapes.reviews import polarity
from raftdiff.types import Sample

from . import images
from .judge import Judge
from .texts import completion

LONG_REVIEW = 20  # words, above which more count for nothing
NATS = 4.0  # log-odds of a preference for all of a quality over nothing of it


class OracleJudge(Judge):
    """Simulated feedback for the embedded world: its exact oracle, wrong on purpose at the rate `noise`."""

    def __init__(self, *, noise: float = 0.0, position_bias: float = 0.0, seed: int = 0) -> None:
        """`noise` is the share of pairs of which the wrong one is preferred, in both orders (of single samples, of
        grades drawn at random); `position_bias` the share of questions answered by whatever is shown first. Both are
        functions of `seed` and the samples, so the same question has the same answer.

        Raises:
            ConfigError: a rate that is not within 0 and 1.
        """
        for name, rate in (("noise", noise), ("position_bias", position_bias)):
            if not 0 <= rate <= 1:
                raise ConfigError(f"{name} of the judge `oracle` is {rate}; it is a share, 0 to 1")
        self._noise, self._position_bias, self._seed = noise, position_bias, seed

    def _prefer(self, pairs: Sequence[tuple[Sample, Sample]], principle: Principle) -> list[float]:
        amount = _measure(principle)
        sign = 1 if principle.direction == "more" else -1
        good = {s.id: sign * amount(s) for s in {s.id: s for pair in pairs for s in pair}.values()}
        return [self._log_odds(a, b, principle, good[a.id] - good[b.id]) for a, b in pairs]

    def _log_odds(self, a: Sample, b: Sample, principle: Principle, better: float) -> float:
        if self._chance("place", principle.name, a.id, b.id) < self._position_bias:
            return NATS
        wrong = self._chance("noise", principle.name, *sorted((a.id, b.id))) < self._noise
        return NATS * (-better if wrong else better)

    def _grade(self, samples: Sequence[Sample], principle: Principle) -> list[float]:
        amount = _measure(principle)
        return [1 + 8 * self._amount(sample, amount, principle) for sample in samples]

    def _amount(self, sample: Sample, amount: Amount, principle: Principle) -> float:
        if self._chance("noise", principle.name, sample.id) < self._noise:
            return self._chance("grade", principle.name, sample.id)
        return amount(sample)

    def _chance(self, *about: str) -> float:
        """A number of 0 to 1 that is a function of the seed and what it is about."""
        return chance(str(self._seed), *about)


def chance(*about: str) -> float:
    """A number of 0 to 1, uniform, that is a function of the words."""
    return int.from_bytes(hashlib.blake2b("\0".join(about).encode(), digest_size=8).digest()) / 2**64


Amount = Callable[[Sample], float]
"""How much of a quality a sample has, 0 to 1; NaN where its prompt is no caption of the embedded world."""


def _measure(principle: Principle) -> Amount:
    if principle.name not in MEASURES:
        raise ConfigError(
            f"the judge `oracle` cannot judge {principle.name!r}{nearest(principle.name, MEASURES)}: it knows the"
            f" embedded world alone ({', '.join(MEASURES)}); use --principles shapes or shapes-text, or another judge"
        )
    return MEASURES[principle.name]


def _asked(*names: str) -> Amount:
    """The share of these things that is true of the picture, of those that the caption asks for; 1 if it asks none."""

    def amount(sample: Sample) -> float:
        caption = _caption(sample)
        if caption is None:
            return math.nan
        verdict = oracle.judge(images.array(sample), caption)
        asked = [verdict[name] for name in names if name in verdict]
        return sum(asked) / len(asked) if asked else 1.0

    return amount


def _caption(sample: Sample) -> Caption | None:
    try:
        return parse(sample.prompt.text)
    except ValueError:
        return None


def _aesthetic(sample: Sample) -> float:
    return (oracle.rating(images.array(sample)) - 1) / 9


def _tone(sample: Sample) -> float:
    return (1 + polarity(completion(sample))) / 2


def _length(sample: Sample) -> float:
    return min(len(completion(sample).split()), LONG_REVIEW) / LONG_REVIEW


def _overall(sample: Sample) -> float:
    if sample.image is None:
        return (_tone(sample) + _length(sample)) / 2
    caption = _caption(sample)
    if caption is None:
        return math.nan
    return (oracle.partial(images.array(sample), caption) + _aesthetic(sample)) / 2


MEASURES: dict[str, Amount] = {
    "count": _asked("count"),
    "color": _asked("color"),
    "shape": _asked("shape"),
    "placement": _asked("size", "position", "relation"),
    "background": _asked("background"),
    "aesthetic": _aesthetic,
    "overall": _overall,
    "tone": _tone,
    "length": _length,
    "coin": lambda sample: chance("coin", sample.id),  # a quality that means nothing, as a control
}
