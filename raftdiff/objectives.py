"""Several rewards of one sample made into one (MORLAIF, arXiv 2406.07295), and what the samples of a round say of the
rewards together: pure functions.

A scalarizer takes z_R of one sample, z_i = weight_i * (reward_i - mean_i) / deviation_i, and gives one number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np
import torch
from scipy.special import softmax

from .config import Combine
from .types import Group, Moments, Scored

STD_FLOOR = 1e-4  # a reward that hardly varies is not blown up to count as much as the others

Scalarizer = Callable[[Sequence[float]], float]


def soft_max_min(z_R: Sequence[float], temperature: float = 1.0) -> float:
    """sum_i softmax(-z / temperature)_i z_i: between the mean (hot) and the worst (cold)."""
    z = np.array(z_R, dtype=np.float64)
    return float(softmax(-z / temperature) @ z)


def uncertainty_weighted(z_R: Sequence[float]) -> float:
    """UWO: the mean less half the population variance of the objectives."""
    return fmean(z_R) - 0.5 * float(np.var(z_R))


def lower_quantile(z_R: Sequence[float]) -> float:
    """The mean of the floor(R / 3) smallest, at least of one."""
    return fmean(sorted(z_R)[: max(1, len(z_R) // 3)])


def bernoulli_nash(z_R: Sequence[float]) -> float:
    """(prod_i softplus(z_i))^(1/R); softplus, log(1 + e^z), makes each positive and keeps the order."""
    return math.exp(fmean(z if z < -30 else math.log(np.logaddexp(0, z)) for z in z_R))  # far down both are e^z


SCALARIZERS: Mapping[Combine, Scalarizer] = {
    "sum": sum,
    "standardized": sum,
    "weighted-linear": sum,
    "worst-case": min,
    "soft-max-min": soft_max_min,
    "uncertainty-weighted": uncertainty_weighted,
    "lower-quantile": lower_quantile,
    "max-median": median,
    "bernoulli-nash": bernoulli_nash,
}


def scalarize(z: Mapping[str, float], weights: Mapping[str, float], how: Combine) -> float | None:
    """One number of the weighted rewards of a sample; None where one whose weight is not 0 is absent.

    >>> scalarize({"clip": 20.0, "aesthetic": -5.0}, {"clip": 0.5, "aesthetic": 1.0}, "worst-case")
    -5.0
    """
    needed = [name for name, weight in weights.items() if weight]
    return SCALARIZERS[how]([z[name] for name in needed]) if all(name in z for name in needed) else None


# ------------------------------------------------------------------------------------------------ running statistics


def moments(value_N: torch.Tensor) -> Moments:
    """Of the values that are not NaN, in float64."""
    present = value_N.double()
    present = present[~present.isnan()]
    if not len(present):
        return Moments(count=0, mean=0.0, variance=0.0)
    return Moments(count=len(present), mean=present.mean().item(), variance=present.var(correction=0).item())


def merged(a: Moments, b: Moments) -> Moments:
    """The moments of both samples together (Chan et al., 1979)."""
    if not (a.count and b.count):
        return a if a.count else b
    count, delta = a.count + b.count, b.mean - a.mean
    squares = a.variance * a.count + b.variance * b.count + delta**2 * a.count * b.count / count
    return Moments(count=count, mean=a.mean + delta * b.count / count, variance=squares / count)


def with_values(running: Mapping[str, Moments], values: Mapping[str, torch.Tensor]) -> dict[str, Moments]:
    """The running moments of each reward with the values of a round, [N] with NaN for missing ones, in them."""
    return dict(running) | {
        name: merged(running[name], moments(value_N)) if name in running else moments(value_N)
        for name, value_N in values.items()
    }


# ------------------------------------------------------------------------------------------------ floors


def below_floors(reward_N: Sequence[float | None], missed_N: Sequence[bool]) -> list[float | None]:
    """The rewards, with those of samples that miss a floor moved down together so that they rank below all others: the
    best of them comes one deviation of all rewards (at least STD_FLOOR) below the worst of the others."""
    present = [(reward, missed) for reward, missed in zip(reward_N, missed_N, strict=True) if reward is not None]
    above = [reward for reward, missed in present if not missed]
    below = [reward for reward, missed in present if missed]
    if not (above and below):
        return list(reward_N)
    gap = max(float(np.std([reward for reward, _ in present])), STD_FLOOR)
    shift = min(0.0, min(above) - max(below) - gap)
    return [
        reward if reward is None or not missed else reward + shift
        for reward, missed in zip(reward_N, missed_N, strict=True)
    ]


# ------------------------------------------------------------------------------------------------ what a round says


@dataclass(frozen=True, kw_only=True)
class Together:
    """What the samples of a round say of its objectives together.

    Together(names=("clip", "aesthetic"), correlation=((1.0, 0.2), (0.2, 1.0)), disagreement=0.4, missed={"clip": 0.1})
    """

    names: tuple[str, ...]
    correlation: tuple[tuple[float, ...], ...]
    """Pearson's, over the samples that have all; NaN for one that does not vary."""
    disagreement: float
    """The share of prompts whose objectives do not agree on the best sample; NaN without prompts."""
    missed: Mapping[str, float]
    """The share of samples below each floor."""

    @property
    def rows(self) -> list[tuple[str, tuple[float, ...]]]:
        """Each objective with its correlations."""
        return list(zip(self.names, self.correlation, strict=True))

    @property
    def watched(self) -> dict[str, float]:
        """`missed` of the rewards that have a floor and no weight."""
        return {name: share for name, share in self.missed.items() if name not in self.names}


def together(groups: Sequence[Group], floors: Sequence[str] = ()) -> Together | None:
    """None where fewer than two rewards have a weight, or no sample has them."""
    ranked = [scored for group in groups for scored in group.ranked]
    names = tuple(ranked[0].objectives) if ranked else ()
    if len(names) < 2:
        return None
    z_NR = np.array([[scored.objectives[name] for name in names] for scored in ranked])
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation_RR = np.corrcoef(z_NR, rowvar=False)
    judged = [group for group in groups if group.ranked]
    return Together(
        names=names,
        correlation=tuple(map(tuple, correlation_RR.tolist())),
        disagreement=sum(not _agree(group.ranked) for group in judged) / len(judged),
        missed={name: sum(name in scored.missed for scored in ranked) / len(ranked) for name in floors},
    )


def _agree(samples: Sequence[Scored]) -> bool:
    """Whether one sample is the best, or as good as the best, in every objective."""
    best = {name: max(s.objectives[name] for s in samples) for name in samples[0].objectives}
    return any(dict(s.objectives) == best for s in samples)
