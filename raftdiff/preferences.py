"""Preferences between samples: how they are split, how well scores predict them, and what objectives weigh in them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit
from scipy.stats import binomtest

from .errors import DataError
from .types import Interval, Sample

LEAST_SCALE, MOST_SCALE = 1e-3, 1e3


@dataclass(frozen=True, kw_only=True)
class Preference:
    """One of two samples of a prompt is better.

    Preference(chosen=<Sample>, rejected=<Sample>, margin=1.7)
    """

    chosen: Sample
    rejected: Sample
    margin: float = 0.0
    """By how many nats, where the judge gave probabilities."""


def split_by_prompt(
    preferences: Sequence[Preference], share: float, seed: int = 0
) -> tuple[list[Preference], list[Preference]]:
    """What to train on and what to hold out: about `share` of the prompts, each with all its pairs, and at least one
    prompt on either side. Beyond that a prompt's side depends on the seed alone, so that the models of several
    principles hold out the same prompts.

    Raises:
        DataError: there are fewer than two prompts.
    """

    def place(prompt: str) -> float:
        return int.from_bytes(hashlib.sha256(f"{seed} {prompt}".encode()).digest()[:8]) / 2**64

    places = sorted((place(prompt), prompt) for prompt in {p.chosen.prompt.id for p in preferences})
    if len(places) < 2:
        raise DataError(
            f"there are preferences for {len(places)} prompts; it takes at least 2, one to train on and one to hold"
            " out: label more pairs"
        )
    count = min(max(1, sum(place < share for place, _ in places)), len(places) - 1)
    held_out = {prompt for _, prompt in places[:count]}
    train = [p for p in preferences if p.chosen.prompt.id not in held_out]
    return train, [p for p in preferences if p.chosen.prompt.id in held_out]


def accuracy(difference_N: np.ndarray) -> Interval:
    """The share of differences of scores, chosen less rejected, that are above 0, with its 95% Wilson interval."""
    count = len(difference_N)
    if not count:
        return Interval(mean=math.nan, low=math.nan, high=math.nan, count=0)
    right = int((difference_N > 0).sum())
    interval = binomtest(right, count).proportion_ci(method="wilson")
    return Interval(mean=right / count, low=float(interval.low), high=float(interval.high), count=count)


def calibration(difference_N: np.ndarray) -> float:
    """The factor c by which sigmoid(c * difference) is the probability that the chosen one is preferred, as likely as
    can be. With Platt's target of (N + 1)/(N + 2) in place of 1, it is finite also where every difference is right."""
    target = (len(difference_N) + 1) / (len(difference_N) + 2)

    def negative_log_likelihood(log_scale: float) -> float:
        z_N = math.exp(log_scale) * difference_N
        return float((np.logaddexp(0, -z_N) + (1 - target) * z_N).mean())

    bounds = (math.log(LEAST_SCALE), math.log(MOST_SCALE))
    return math.exp(minimize_scalar(negative_log_likelihood, bounds=bounds, method="bounded").x)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """What one objective weighs in overall preferences.

    Weight(name="color", weight=1.2, low=0.8, high=1.6, deviation=3.4)
    """

    name: str
    weight: float
    """On the standardized difference: the change in log-odds for one deviation."""
    low: float
    high: float
    """The 95% interval of `weight`, from the curvature of the likelihood."""
    deviation: float
    """Root mean square of the differences."""

    @property
    def raw(self) -> float:
        """On the scores as they are: the change in log-odds for one unit."""
        return self.weight / self.deviation


def objective_weights(names: Sequence[str], difference_NR: np.ndarray) -> list[Weight]:
    """Logistic regression, without penalty, of overall preferences on the objectives (MORLAIF, arXiv:2406.07295).

    There is no intercept, and differences are divided by their root mean square rather than by their deviation around
    a mean: to call the samples of a pair by each other's name then changes nothing.

    Args:
        names: of the R objectives.
        difference_NR: of N pairs, the scores of the one that is preferred overall, less those of the other.

    Raises:
        DataError: an objective that does not differ in any pair, or pairs so few or so clear that no finite weights
            are the most likely ones.
    """
    deviation_R = np.sqrt((difference_NR**2).mean(axis=0)) if len(difference_NR) else np.zeros(len(names))
    if constant := [name for name, deviation in zip(names, deviation_R, strict=True) if not deviation > 0]:
        raise DataError(f"{', '.join(constant)}: the scores of no pair differ; leave it out, or label more pairs")
    x_NR = difference_NR / deviation_R

    def loss(w_R: np.ndarray) -> float:
        return float(np.logaddexp(0, -x_NR @ w_R).sum())

    def gradient(w_R: np.ndarray) -> np.ndarray:
        return -x_NR.T @ expit(-x_NR @ w_R)

    def curvature(w_R: np.ndarray) -> np.ndarray:
        p_N = expit(x_NR @ w_R)
        return (x_NR * (p_N * (1 - p_N))[:, None]).T @ x_NR

    w_R = minimize(loss, np.zeros(len(names)), jac=gradient, hess=curvature, method="trust-exact").x
    if (x_NR @ w_R).min() > 0:
        raise DataError(
            f"some weights explain every one of the {len(x_NR)} overall preferences, so that larger ones always fit"
            " better: label more pairs"
        )
    half_R = 1.96 * np.sqrt(np.diag(np.linalg.pinv(curvature(w_R))))
    return [
        Weight(name=name, weight=float(w), low=float(w - half), high=float(w + half), deviation=float(deviation))
        for name, w, half, deviation in zip(names, w_R, half_R, deviation_R, strict=True)
    ]


def cross_validated(
    names: Sequence[str], difference_NR: np.ndarray, groups: Sequence[str], folds: int = 5
) -> np.ndarray:
    """The weighted sum of each pair's differences, [N], by weights that were fitted without the pairs of its group.

    Args:
        names, difference_NR: as for `objective_weights`.
        groups: of N pairs, what is left out together: their prompts.

    Raises:
        DataError: as `objective_weights`; pairs of fewer than two groups.
    """
    ordered = list(dict.fromkeys(groups))
    if len(ordered) < 2:
        raise DataError(f"there are held-out pairs of {len(ordered)} prompts; it takes at least 2: label more pairs")
    fold_N = np.array([ordered.index(group) % folds for group in groups])
    sum_N = np.empty(len(groups))
    for fold in np.unique(fold_N):
        weights = objective_weights(names, difference_NR[fold_N != fold])
        sum_N[fold_N == fold] = difference_NR[fold_N == fold] @ np.array([weight.raw for weight in weights])
    return sum_N
