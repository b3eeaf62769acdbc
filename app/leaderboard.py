"""What the votes say: strengths of the models, and how often each reward agrees with the people.

Bradley and Terry (1952): P(i is preferred to j) = 1 / (1 + exp(s_j - s_i)). "Tie" and "both bad" count as half a win
for each side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from scipy.stats import binomtest, norm

from .votes import Vote

WEAK_PRIOR = 3.0  # deviation of a strength around the reference: one who won every vote is not infinitely strong
ELO = 400 / math.log(10)  # points in a unit of strength: 400 points are odds of 10 to 1


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A model on the leaderboard. Points are over the reference, which has 0; `low` and `high` end their 95% interval.

    Standing(model="demo@92d5b0dc", points=212.0, low=120.1, high=303.9, wins=31, losses=9, ties=4)
    """

    model: str
    points: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int

    @property
    def votes(self) -> int:
        return self.wins + self.losses + self.ties


def standings(votes: Sequence[Vote], reference: str | None = None) -> list[Standing]:
    """The models that have votes, the strongest first. The reference is the model with the most votes if it is not
    given or has none. A model that no chain of votes connects to it stays near 0, with a wide interval."""
    models = sorted({model for vote in votes for model in (vote.left, vote.right)})
    if not models:
        return []
    counts = {model: _counts(votes, model) for model in models}
    if reference not in models:
        reference = max(models, key=lambda model: sum(counts[model]))
    strength, deviation = fit(_wins(votes, models), models.index(reference))
    reach = norm.ppf(0.975) * deviation
    found = [
        Standing(
            model=model,
            points=ELO * strength[i],
            low=ELO * (strength[i] - reach[i]),
            high=ELO * (strength[i] + reach[i]),
            wins=counts[model][0],
            losses=counts[model][1],
            ties=counts[model][2],
        )
        for i, model in enumerate(models)
    ]
    return sorted(found, key=lambda standing: -standing.points)


def fit(wins_MM: np.ndarray, reference: int) -> tuple[np.ndarray, np.ndarray]:
    """Strengths and their standard deviations, both [M] and 0 at `reference`: the mode of the posterior under a normal
    prior of deviation `WEAK_PRIOR`, and the Laplace approximation around it.

    Args:
        wins_MM: how often the row was preferred to the column; halves for ties.
    """
    free = np.delete(np.arange(len(wins_MM)), reference)
    games_MM = wins_MM + wins_MM.T

    def full(x: np.ndarray) -> np.ndarray:
        return np.insert(x, reference, 0.0)

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        difference_MM = np.subtract.outer(full(x), full(x))
        gradient_M = (games_MM * expit(difference_MM) - wins_MM).sum(1)
        return -(wins_MM * log_expit(difference_MM)).sum() + (x**2).sum() / (2 * WEAK_PRIOR**2), (
            gradient_M[free] + x / WEAK_PRIOR**2
        )

    strength = full(minimize(loss, np.zeros(len(free)), jac=True, method="BFGS", options={"gtol": 1e-8}).x)
    difference_MM = np.subtract.outer(strength, strength)
    curvature_MM = games_MM * expit(difference_MM) * expit(-difference_MM)
    information = np.diag(curvature_MM.sum(1)) - curvature_MM
    information = information[np.ix_(free, free)] + np.eye(len(free)) / WEAK_PRIOR**2
    return strength, np.insert(np.sqrt(np.diag(np.linalg.inv(information))), reference, 0.0)


def _wins(votes: Sequence[Vote], models: Sequence[str]) -> np.ndarray:
    wins = np.zeros((len(models), len(models)))
    place = {model: i for i, model in enumerate(models)}
    for vote in votes:
        left, right = place[vote.left], place[vote.right]
        share = {"left": 1.0, "right": 0.0}.get(vote.choice, 0.5)
        wins[left, right] += share
        wins[right, left] += 1 - share
    return wins


def _counts(votes: Sequence[Vote], model: str) -> tuple[int, int, int]:
    """Wins, losses and undecided votes of a model."""
    won = sum(
        (vote.left, vote.choice) == (model, "left") or (vote.right, vote.choice) == (model, "right") for vote in votes
    )
    lost = sum(
        (vote.left, vote.choice) == (model, "right") or (vote.right, vote.choice) == (model, "left") for vote in votes
    )
    undecided = sum(model in (vote.left, vote.right) and vote.choice in ("tie", "bad") for vote in votes)
    return won, lost, undecided


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How often a reward prefers the picture that people preferred; the interval is Wilson's, 95%.

    Agreement(reward="clip", agreed=31, votes=40, low=0.625, high=0.877)
    """

    reward: str
    agreed: int
    votes: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.agreed / self.votes


def agreements(votes: Sequence[Vote]) -> list[Agreement]:
    """For each reward, over the votes with a winner whose pictures have different scores; the most agreeing first."""
    found = []
    for name in sorted({name for vote in votes for name in vote.left_scores}):
        agrees = [
            (vote.left_scores[name] > vote.right_scores[name]) == (vote.choice == "left")
            for vote in votes
            if vote.choice in ("left", "right")
            and name in vote.left_scores
            and name in vote.right_scores
            and vote.left_scores[name] != vote.right_scores[name]
        ]
        if agrees:
            interval = binomtest(sum(agrees), len(agrees)).proportion_ci(method="wilson")
            found.append(
                Agreement(
                    reward=name,
                    agreed=sum(agrees),
                    votes=len(agrees),
                    low=float(interval.low),
                    high=float(interval.high),
                )
            )
    return sorted(found, key=lambda one: -one.share)


def shown_names(models: Sequence[str]) -> dict[str, str]:
    """Model to the name to show: without the hash of its weights, except where two would be the same.

    >>> shown_names(["base@1f00fe3b", "demo@92d5b0dc", "demo@0a1b2c3d"])
    {'base@1f00fe3b': 'base', 'demo@92d5b0dc': 'demo@92d5b0dc', 'demo@0a1b2c3d': 'demo@0a1b2c3d'}
    """
    short = {model: model.rpartition("@")[0] or model for model in models}
    plain = list(short.values())
    return {model: name if plain.count(name) == 1 else model for model, name in short.items()}
