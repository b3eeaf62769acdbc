"""Which samples of a round are kept, and with what weights: pure functions.

The selections go from scored groups to the scored samples that they choose. All but the control rank by `key`, the
larger the better, which is the reward unless said. Samples without a reward, or whose key is not finite, are never
chosen; a group with no other gives nothing. Ties go to the earlier group, then to the smaller k. What comes back is in
the order of the groups and, in a group, of the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax

from .types import Group, Scored

Key = Callable[[Scored], float]
Deviation = Literal["group", "batch"]


def by_reward(scored: Scored) -> float:
    """The combined reward; only for samples that have one."""
    assert scored.reward is not None
    return scored.reward


def kl_regularized(beta: float) -> Key:
    """Rank by r - beta * log(p_current(y|x) / p_reference(y|x)): RAFT's KL-regularised ranking (arXiv 2304.06767)."""
    return lambda scored: by_reward(scored) - beta * scored.log_ratio


def ranking(group: Group, key: Key = by_reward) -> list[Scored]:
    """The group's samples that have a finite key, the best first."""
    return sorted((s for s in group.samples if _has_finite(s, key)), key=key, reverse=True)  # stable: ties stay by k


def best_of_group(groups: Sequence[Group], keep: int = 1, *, key: Key = by_reward) -> list[Scored]:
    """RAFT's `local` selection: the best `keep` samples of each prompt."""
    return [scored for group in groups for scored in ranking(group, key)[:keep]]


def best_overall(groups: Sequence[Group], keep: int, *, key: Key = by_reward) -> list[Scored]:
    """RAFT's `global` selection: the best `keep` samples of the whole round, whatever their prompts."""
    return _best([ranking(group, key) for group in groups], keep, key)


def hybrid(groups: Sequence[Group], keep: int, *, key: Key = by_reward) -> list[Scored]:
    """The best sample of each prompt, then the best `keep` of those (the RAFT authors' diffusion notebook)."""
    return _best([ranking(group, key)[:1] for group in groups], keep, key)


def pareto_front(groups: Sequence[Group]) -> list[Scored]:
    """Of each prompt the samples that no other one dominates: is as good as in every objective, and better in one.
    Samples that miss a floor count only where all of the prompt do."""
    chosen = []
    for group in groups:
        ranked = ranking(group)
        candidates = [scored for scored in ranked if not scored.missed] or ranked
        chosen += [s for s in candidates if not any(_dominates(other, s) for other in candidates)]
    return chosen


def _dominates(a: Scored, b: Scored) -> bool:
    pairs = [(a.objectives[name], b.objectives[name]) for name in b.objectives]
    return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)


def above_threshold(groups: Sequence[Group], threshold: float, *, key: Key = by_reward) -> list[Scored]:
    """Every sample whose key is greater than `threshold` (the filter of ReST, arXiv 2308.08998)."""
    return [scored for group in groups for scored in ranking(group, key) if key(scored) > threshold]


def above_global(groups: Sequence[Group], threshold: float) -> list[Scored]:
    """ReST's `global` rule: every sample whose reward is above `threshold`, 0 to below 1, where the rewards of all
    groups together are `scaled` to [0, 1]. 0 keeps all, the worst included."""
    of_sample = scaled(groups)
    return above_threshold(groups, threshold or -math.inf, key=lambda scored: of_sample[scored.sample.id])


def scaled(groups: Sequence[Group]) -> dict[str, float]:
    """Sample id to its reward, scaled to [0, 1] over all groups together; 0 where all are equal."""
    reward_of = {scored.sample.id: by_reward(scored) for group in groups for scored in ranking(group)}
    low = min(reward_of.values(), default=0.0)
    spread = max(reward_of.values(), default=0.0) - low or 1.0
    return {sample_id: (reward - low) / spread for sample_id, reward in reward_of.items()}


def above_percentile(groups: Sequence[Group], share: float) -> list[Scored]:
    """ReST's `percentile` rule: of each prompt what is above its quantile `share`, 0 to 1 (linear between samples)."""
    return _above_own(groups, lambda rewards: float(np.quantile(rewards, share)))


def above_interpolation(groups: Sequence[Group], gamma: float) -> list[Scored]:
    """ReST's `interpolation` rule: of each prompt what is above gamma * max + (1 - gamma) * mean of its rewards."""
    return _above_own(groups, lambda r: gamma * max(r) + (1 - gamma) * math.fsum(r) / len(r))


def _above_own(groups: Sequence[Group], threshold_of: Callable[[list[float]], float]) -> list[Scored]:
    """What is above the threshold that each prompt's rewards give; always the best, so that no prompt is lost."""
    chosen = []
    for group in groups:
        if ranked := ranking(group):
            threshold = threshold_of([by_reward(scored) for scored in ranked])
            chosen += [scored for scored in ranked if by_reward(scored) > threshold] or ranked[:1]
    return chosen


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


def advantages(groups: Sequence[Group]) -> dict[str, float]:
    """Sample id to A = r - V(x), with the mean of the prompt's rewards for V(x): an image is a one-step bandit."""
    found: dict[str, float] = {}
    for group in groups:
        ranked = ranking(group)
        total = math.fsum(map(by_reward, ranked))
        found |= {scored.sample.id: by_reward(scored) - total / len(ranked) for scored in ranked}
    return found


def group_relative(groups: Sequence[Group], *, deviation: Deviation, floor: float) -> dict[str, float]:
    """Sample id to A = (r - mean) / (deviation + floor), with the mean of the prompt's rewards and their deviation, or
    that of all rewards of the round (GRPO, arXiv 2402.03300; Flow-GRPO, arXiv 2505.05470).

    Where a prompt's rewards are all equal, A is 0; where they almost are, its own deviation makes as much of the
    difference as of any other, but for the floor.
    """
    relative = advantages(groups)
    everyone = [by_reward(scored) for group in groups for scored in ranking(group)]
    found: dict[str, float] = {}
    for group in groups:
        rewards = {scored.sample.id: by_reward(scored) for scored in ranking(group)}
        if len(set(rewards.values())) <= 1:
            found |= dict.fromkeys(rewards, 0.0)
            continue
        spread = float(np.std(everyone if deviation == "batch" else list(rewards.values())))
        found |= {sample_id: relative[sample_id] / (spread + floor) for sample_id in rewards}
    return found


def gae(rewards: Sequence[float], values: Sequence[float], *, gamma: float, decay: float) -> list[float]:
    """Generalised advantage estimation over the tokens of one completion (arXiv 1506.02438, eq. 16):

    A_t = sum_k (gamma decay)^k delta_{t+k},   delta_t = r_t + gamma V_{t+1} - V_t,   V = 0 after the last token
    """
    advantage = value_after = 0.0
    found = []
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        advantage = reward + gamma * value_after - value + gamma * decay * advantage
        value_after = value
        found.append(advantage)
    return found[::-1]


def whitened(rows: Sequence[Sequence[float]]) -> list[np.ndarray]:
    """The values of all rows less their mean, over their deviation; 0 where all are equal."""
    together = np.concatenate(rows) if rows else np.zeros(0)
    return [(np.array(row) - together.mean()) / (together.std() + 1e-8) for row in rows]


def softmax_weights(values: Sequence[float], temperature: float) -> list[float]:
    """softmax(values / temperature) times their number: weights whose mean is 1. At least one value."""
    return (softmax(np.array(values) / temperature) * len(values)).tolist()


def vmpo_weights(advantage_N: Sequence[float], epsilon: float) -> list[float]:
    """V-MPO (arXiv 1909.12238): psi = softmax(A / eta) over the better half, times its size; 0 for the others. An odd
    one counts to the better half."""
    better = np.argsort(-np.array(advantage_N), kind="stable")[: (len(advantage_N) + 1) // 2]
    top = [advantage_N[i] for i in better]
    weight_N = np.zeros(len(advantage_N))
    weight_N[better] = softmax_weights(top, vmpo_temperature(top, epsilon))
    return weight_N.tolist()


def vmpo_temperature(advantage_N: Sequence[float], epsilon: float) -> float:
    """The eta that minimises V-MPO's dual, eta * epsilon + eta * log mean exp(A / eta): there softmax(A / eta) is
    `epsilon` nats from uniform. It is looked for between a thousandth and a thousand times the range of A."""
    relative_N = np.array(advantage_N) - max(advantage_N)  # moves the dual by a constant
    spread = -relative_N.min()

    def dual(log_eta: float) -> float:
        eta = spread * math.exp(log_eta)
        return eta * (epsilon + logsumexp(relative_N / eta) - math.log(len(relative_N)))

    limit = math.log(1000)
    return spread * math.exp(minimize_scalar(dual, bounds=(-limit, limit), method="bounded").x) if spread else 1.0


def _has_finite(scored: Scored, key: Key) -> bool:
    return scored.reward is not None and math.isfinite(key(scored))


def _best(rankings: Sequence[Sequence[Scored]], keep: int, key: Key) -> list[Scored]:
    """The best `keep` of all rankings together, in their order."""
    places = [(g, rank) for g, ranked in enumerate(rankings) for rank in range(len(ranked))]
    best = sorted(places, key=lambda place: key(rankings[place[0]][place[1]]), reverse=True)[:keep]
    return [rankings[g][rank] for g, rank in sorted(best)]
