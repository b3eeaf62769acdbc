"""Which samples of a round are kept: pure functions from scored groups to the scored samples they choose.

All but the control rank by `key`, the larger the better, which is the reward unless said. Samples without a reward, or
whose key is not finite, are never chosen; a group with no other gives nothing. Ties go to the earlier group, then to
the smaller k. What comes back is in the order of the groups and, in a group, of the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from .types import Group, Scored

Key = Callable[[Scored], float]


def by_reward(scored: Scored) -> float:
    """The combined reward; only for samples that have one."""
    assert scored.reward is not None
    return scored.reward


def kl_regularized(beta: float) -> Key:
    """Rank by r - beta * log(p_current(y|x) / p_reference(y|x)): RAFT's KL-regularised ranking (arXiv 2304.06767)."""
    return lambda scored: by_reward(scored) - beta * scored.log_ratio


def best_of_group(groups: Sequence[Group], keep: int = 1, *, key: Key = by_reward) -> list[Scored]:
    """RAFT's `local` selection: the best `keep` samples of each prompt."""
    return [scored for group in groups for scored in _ranking(group, key)[:keep]]


def best_overall(groups: Sequence[Group], keep: int, *, key: Key = by_reward) -> list[Scored]:
    """RAFT's `global` selection: the best `keep` samples of the whole round, whatever their prompts."""
    return _best([_ranking(group, key) for group in groups], keep, key)


def hybrid(groups: Sequence[Group], keep: int, *, key: Key = by_reward) -> list[Scored]:
    """The best sample of each prompt, then the best `keep` of those (the RAFT authors' diffusion notebook)."""
    return _best([_ranking(group, key)[:1] for group in groups], keep, key)


def above_threshold(groups: Sequence[Group], threshold: float, *, key: Key = by_reward) -> list[Scored]:
    """Every sample whose key is greater than `threshold` (the filter of ReST, arXiv 2308.08998)."""
    return [scored for group in groups for scored in _ranking(group, key) if key(scored) > threshold]


def random_of_group(groups: Sequence[Group], keep: int = 1, *, round: int, seed: int) -> list[Scored]:
    """The control: `keep` samples of each prompt, uniformly among those that have a finite reward, in the order drawn.

    The choice is a function of the seed, the round and the prompt, and of no reward.
    """
    chosen = []
    for group in groups:
        candidates = [scored for scored in group.samples if _has_finite(scored, by_reward)]
        rng = np.random.default_rng([seed, round, int(group.prompt.id, 16)])
        chosen += [candidates[index] for index in rng.permutation(len(candidates))[:keep]]
    return chosen


def _ranking(group: Group, key: Key) -> list[Scored]:
    """The group's samples that have a finite key, the best first."""
    return sorted((s for s in group.samples if _has_finite(s, key)), key=key, reverse=True)  # stable: ties stay by k


def _has_finite(scored: Scored, key: Key) -> bool:
    return scored.reward is not None and math.isfinite(key(scored))


def _best(rankings: Sequence[Sequence[Scored]], keep: int, key: Key) -> list[Scored]:
    """The best `keep` of all rankings together, in their order."""
    places = [(g, rank) for g, ranking in enumerate(rankings) for rank in range(len(ranking))]
    best = sorted(places, key=lambda place: key(rankings[place[0]][place[1]]), reverse=True)[:keep]
    return [rankings[g][rank] for g, rank in sorted(best)]
