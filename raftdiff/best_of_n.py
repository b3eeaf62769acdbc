"""Best-of-N: draw N candidates for each picture and keep the one with the highest reward. Nothing is trained.

How far that moves the model is bounded: KL(best of N || model) <= log N - (N - 1)/N (arXiv 2009.01325; that it is a
bound, arXiv 2401.01879).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from rich.table import Table

from .build import as_reward, build_reward, default_device
from .config import RewardConfig
from .errors import ScoringError
from .evaluation import paired_interval
from .pipelines.best_of import BestOf, check_n
from .protocols import Modality, Policy, Reward
from .scoring import WeightedReward, check_rewards, score
from .selection import best_of_group, by_reward
from .types import Group, Prompt, Sample, Scored

COMBINED = "combined"


def best_of(
    pipeline: Any, reward: str | Callable | Reward | Mapping[str, float] = "clip", n: int = 8, *, batch_size: int = 1
) -> BestOf:
    """A diffusers pipeline that gives the best of n pictures in place of one.

        best = raftdiff.best_of(pipe, "clip", n=8)
        image = best("a red circle", num_inference_steps=25).images[0]

    Args:
        pipeline: any text-to-image pipeline, on its device.
        reward: a registered name, a callable `f(images, prompts) -> scores` over PIL images, a Reward, or a mapping
            of registered names to weights, which are combined as by `rank`.
        n: candidates for each picture, 2 or more.
        batch_size: candidates of a picture in one call of the pipeline.

    Raises:
        ConfigError: an unknown name, or n out of range.
    """
    check_n(n)
    if not isinstance(reward, str | Mapping):
        return BestOf(pipeline, Ranking([WeightedReward(reward=as_reward(reward))]), n, batch_size=batch_size)
    weights = {reward: 1.0} if isinstance(reward, str) else reward
    configs = [RewardConfig(name=name, weight=weight) for name, weight in weights.items()]
    rewards = [build_reward(config, device=default_device()) for config in configs]
    return BestOf(pipeline, Ranking(rewards), n, batch_size=batch_size)


class Ranking:
    """What `rank` ranks by, as one reward; a sample on which a reward fails has none."""

    name = "ranking"
    modality: Modality = "image"

    def __init__(self, rewards: Sequence[WeightedReward]):
        check_rewards(rewards)
        self._rewards = rewards

    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B], NaN for a sample without a reward. Raises ScoringError where none has one."""
        return torch.tensor([math.nan if s.reward is None else s.reward for s in rank(samples, self._rewards)])


def rank(samples: Sequence[Sample], rewards: Sequence[WeightedReward]) -> list[Scored]:
    """The samples with the reward to rank them by: of one reward the raw value, of several the mean, by their weights,
    of their values standardised over all the samples.

    Raises:
        ConfigError: rewards that share a name, no reward with a weight.
        ScoringError: not one sample could be scored.
    """
    total = sum(abs(weighted.weight) for weighted in rewards) or 1.0
    shares = [replace(weighted, weight=weighted.weight / total) for weighted in rewards]
    # However many fail: the pictures are drawn, and those that could be scored are worth keeping.
    scored = score(samples, shares, combine="standardized" if len(rewards) > 1 else "sum", max_failed=1.0)
    if all(s.reward is None for s in scored):
        flaws = [f"the first is flawed: {s.flaw}" for s in samples if s.flaw]
        why = flaws[0] if flaws else "each reward's error is in the warnings"
        raise ScoringError(f"not one of {len(samples)} candidates could be scored; {why}")
    return scored


def draw(
    policy: Policy,
    prompts: Sequence[Prompt],
    rewards: Sequence[WeightedReward],
    *,
    n: int,
    seeds: int,
    first_seed: int = 0,
) -> list[Group]:
    """`seeds` groups of n ranked candidates for each prompt. The k-th group of a prompt has the seeds
    first_seed + k * n to first_seed + k * n + n - 1.

    Raises:
        ConfigError, ScoringError: as `rank`; n out of range.
    """
    check_n(n)
    jobs = [(prompt, first_seed + i) for prompt in prompts for i in range(seeds * n)]
    samples = policy.sample([prompt for prompt, _ in jobs], [seed for _, seed in jobs])
    scored = rank([replace(sample, latents=None) for sample in samples], rewards)
    rows = [scored[start : start + n] for start in range(0, len(scored), n)]
    return [Group(prompt=row[0].sample.prompt, samples=tuple(row)) for row in rows]


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best of a group, and the group it is the best of.

    Best(scored=<Scored>, group=<Group>)
    """

    scored: Scored
    group: Group

    @property
    def record(self) -> dict[str, Any]:
        """What a metadata.jsonl says of it: its scores, and the rewards it was the best of."""
        rewards = [by_reward(s) for s in self.group.ranked]
        return {
            "scores": dict(self.scored.parts),
            "reward": by_reward(self.scored),
            "candidates": len(self.group.samples),
            "scored": len(rewards),
            "mean_reward": fmean(rewards),
            "worst_reward": min(rewards),
        }


def best(groups: Sequence[Group]) -> list[Best]:
    """The best of each group; a group in which nothing has a reward is left out."""
    return [Best(scored=scored, group=group) for group in groups for scored in best_of_group([group])]


def kl_bound(n: int) -> float:
    """The most nats that best-of-n can be from the model: log n - (n - 1)/n.

    >>> round(kl_bound(8), 3)
    1.204
    """
    return math.log(n) - (n - 1) / n


def table(found: Sequence[Best]) -> Table:
    """The mean of all candidates and that of the best in each reward, and in the combined one where there are several;
    the interval is the gain's, over prompts."""
    shown = Table("reward", "mean of all", "mean of the best", "gain", "95% interval", box=None, pad_edge=False)
    prompts = [one.group.prompt.id for one in found]
    names = list(found[0].scored.parts)
    for name in [*names, COMBINED] if len(names) > 1 else names:
        top = [_value(one.scored, name) for one in found]
        every = [fmean(_value(scored, name) for scored in one.group.ranked) for one in found]
        gain = paired_interval([t - e for t, e in zip(top, every, strict=True)], prompts)
        interval = f"{gain.low:.4g} to {gain.high:.4g}" if gain.count > 1 else "one prompt: none"
        mean = round(fmean(every), 9) + 0.0  # that of standardized values is 0 but for its last bit
        shown.add_row(name, f"{mean:.4g}", f"{fmean(top):.4g}", f"{gain.mean:+.4g}", interval)
    return shown


def _value(scored: Scored, name: str) -> float:
    return by_reward(scored) if name == COMBINED else scored.parts.get(name, math.nan)


def summary(groups: Sequence[Group]) -> str:
    """What was drawn, what could not be scored, and the bound."""
    n = len(groups[0].samples)
    failed = sum(n - len(group.ranked) for group in groups)
    empty = sum(not group.ranked for group in groups)
    parts = [f"best of {n}, {len(groups)} times: {n * len(groups)} candidates"]
    if failed:
        parts.append(f"{failed} without a score")
    if empty:
        parts.append(f"{empty} of the {len(groups)} pictures without any, left out")
    bound = f"KL(best of {n} || model) <= log {n} - {n - 1}/{n} = {kl_bound(n):.3f} nats"
    return f"{', '.join(parts)}; {bound}"
