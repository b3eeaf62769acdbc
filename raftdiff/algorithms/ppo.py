"""PPO for texts: Proximal Policy Optimization (Schulman et al., arXiv 1707.06347) with a value head and a penalty for
leaving the base model (Ziegler et al., arXiv 1909.08593).

Each token is an action in the state of all before it. Its reward is the penalty, and that of the last token has the
reward r of the text beside it:

    r_t = -beta (log p_old(y_t) - log p_ref(y_t)) + [t = T] r,
    A_t = sum_k (gamma lambda)^k delta_{t+k},   delta_t = r_t + gamma V_old(t+1) - V_old(t),   R_t = A_t + V_old(t)

With the advantages A less their mean, over their deviation, on all tokens of the round, and rho = p / p_old, a token's
loss is

    L = max(-rho A, -clamp(rho, 1 - clip, 1 + clip) A) + value_coefficient max((V - R)^2, (V_clipped - R)^2) / 2,
    V_clipped = V_old + clamp(V - V_old, -value_clip, value_clip)

and that of a batch is its mean over tokens. After a round of N texts, whose mean log p_old(y) - log p_ref(y) is KL,

    beta <- beta (1 + N / horizon clamp(KL / target - 1, -.2, .2))

Departures from the papers:
- the mean over tokens is by the mean length of the round's texts, not by that of each batch, so that batches can be
  divided at will;
- the penalty is that of the policy that sampled, at the temperature of sampling, over the whole vocabulary, also where
  top-p has cut it;
- a text that was cut off at its longest ends there, like one that ended by itself;
- rewards are scaled, where asked for, by their deviation in the round, not by a running one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..config import RunConfig
from ..errors import ConfigError, DataError
from ..losses import adapted_kl, clipped_ratio, clipped_value_error, masked_mean
from ..protocols import Algorithm, GivesValue
from ..selection import by_reward, gae, whitened
from ..types import Batch, Example, Group, Phase, RoundReport, Sample, Scored, padded
from .policy_gradient import check_ratio, off_policy


@dataclass(frozen=True, kw_only=True)
class Ppo(Algorithm):
    """Make each token of a text more likely by how much better the rest went than a value head expected."""

    clip: float = 0.2
    """How far a token's ratio may leave 1 before its gradient stops."""
    value_clip: float = 0.2
    """How far a value may leave that of sampling before its gradient stops, in units of the reward."""
    value_coefficient: float = 0.1
    """Weight of the value head's loss."""
    gamma: float = 1.0
    """Discount of later rewards, by token."""
    gae_lambda: float = 0.95
    """How far advantages rely on rewards that came (1) rather than on the values expected after the token (0)."""
    kl_coefficient: float = 0.05
    """Weight of the penalty for leaving the base model: of all rounds, or of the first where it adapts."""
    kl_target: float | None = 6.0
    """What that weight adapts to: the divergence of a text from the base model, in nats. None: it stays."""
    kl_horizon: float = 10_000.0
    """Texts in which the weight adapts by as much as the error is, which counts as at most a fifth."""
    scale_rewards: bool = False
    """Divide the rewards of texts by their deviation in the round."""
    max_reward: float | None = None
    """Rewards of texts, scaled where that is asked for, are clipped to plus and minus this."""

    needs = ("log_prob_and_value", "log_prob_rounding")

    def __post_init__(self) -> None:
        for name in ("clip", "value_clip", "kl_target", "kl_horizon", "max_reward"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}; it must be positive")
        for name in ("value_coefficient", "kl_coefficient"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is {value}; it must be 0 (none) or positive")
        for name in ("gamma", "gae_lambda"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value}; it must lie between 0 and 1")

    def validate(self, config: RunConfig) -> None:
        """Raise ConfigError where the policy would not be the one that sampled."""
        if reasons := off_policy(config):
            raise ConfigError(f"PPO: {'; '.join(reasons)}")

    def phase(self, round: int, reports: Sequence[RoundReport]) -> Phase:
        """A round of its own samples, with the penalty's weight as the divergence of the earlier ones has left it."""
        coefficient = self.kl_coefficient
        for report in reports:
            if self.kl_target is not None and report.scored:
                kl, share = report.rewards["log_ratio"], report.scored / self.kl_horizon
                coefficient = adapted_kl(coefficient, kl, target=self.kl_target, share=share)
        return Phase(grown=round, kl_coefficient=coefficient)

    def select(self, groups: Sequence[Group], *, round: int, seed: int, phase: Phase) -> list[Example]:
        """All texts that have a reward, with the advantage and the return of each token, weighted by their length.

        Raises:
            DataError: a text was sampled without a value head.
        """
        ranked = [scored for group in groups for scored in group.ranked]
        if not ranked:
            return []
        values, advantages = [], []
        for scored, reward in zip(ranked, self._rewards(ranked), strict=True):
            value_T, reference_T = _as_sampled(scored.sample)
            reward_T = phase.kl_coefficient * (reference_T - scored.sample.log_prob_T(None))
            reward_T[-1] += reward
            values.append(value_T)
            advantages.append(gae(reward_T.tolist(), value_T.tolist(), gamma=self.gamma, decay=self.gae_lambda))
        mean_length = sum(map(len, values)) / len(values)
        return [
            Example(
                sample=scored.sample,
                weight=len(value_T) / mean_length,
                advantage_T=torch.tensor(white_T, dtype=torch.float32),
                return_T=torch.tensor(advantage_T) + value_T,
            )
            for scored, value_T, advantage_T, white_T in zip(
                ranked, values, advantages, whitened(advantages), strict=True
            )
        ]

    def _rewards(self, ranked: Sequence[Scored]) -> list[float]:
        """The rewards of texts, scaled and clipped."""
        reward_N = np.array([by_reward(scored) for scored in ranked])
        if self.scale_rewards:
            reward_N = reward_N / (reward_N.std() or 1.0)  # equal rewards stay as they are
        limit = self.max_reward or math.inf
        return reward_N.clip(-limit, limit).tolist()

    def loss(self, policy: GivesValue, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted loss of each text over its tokens, and how far ratios and values have moved.

        Raises:
            TrainingError: before the first update a ratio is not 1, so these are not the texts that were sampled.
        """
        log_prob_BT, value_BT = policy.log_prob_and_value(batch.samples)
        old_BT, mask_BT = batch.sampled_log_prob()
        if batch.updates == 0:
            check_ratio(log_prob_BT, old_BT, policy.log_prob_rounding)

        def together(rows: Iterable[torch.Tensor | None]) -> torch.Tensor:
            return padded([row_T for row_T in rows if row_T is not None])[0].to(log_prob_BT.device)

        old_value_BT, reference_BT = map(together, zip(*map(_as_sampled, batch.samples), strict=True))
        advantage_BT = together(example.advantage_T for example in batch.examples)
        return_BT = together(example.return_T for example in batch.examples)
        policy_B, metrics = clipped_ratio(log_prob_BT, old_BT, advantage_BT, mask_BT, clip=self.clip)
        value_B, of_values = clipped_value_error(value_BT, old_value_BT, return_BT, mask_BT, clip=self.value_clip)
        kl_B = masked_mean(log_prob_BT.detach() - reference_BT, mask_BT)
        loss_B = batch.weight_B * (policy_B + self.value_coefficient * value_B)
        return loss_B, metrics | of_values | {"policy_loss": policy_B.detach(), "kl": kl_B}


def _as_sampled(sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """The value and the base model's log-probability of each token while sampling, float32 [T]."""
    completion = sample.completion
    if completion is None or completion.value_T is None or completion.reference_log_prob_T is None:
        raise DataError(f"sample {sample.id} has no values of its tokens; sample it anew")
    return completion.value_T, completion.reference_log_prob_T
