"""Reward-weighted regression (Peters and Schaal, 2007; for text-to-image, Lee et al., arXiv 2302.12192, and the
baseline RWR of DDPO, arXiv 2305.13301).

Every sample is trained on, the more the better it is:

    minimise E_x sum_k w_k * -log pi(y_k|x),   w_k = K * softmax_k(r(x, y_k) / beta)

Departures from the papers:
- the weights are normalised within each prompt, not over the batch, so that no prompt is trained on more than another.
  A prompt's weights sum to the number of its scored samples: their mean is 1, that of a plain sample;
- for images -log pi is its surrogate, the denoising error of `Policy.error`.

As beta falls this becomes RAFT's `local` selection, as it grows, training on all of one's own samples alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config import RunConfig
from ..errors import ConfigError
from ..losses import weighted_error
from ..protocols import Algorithm, Policy
from ..selection import by_reward, ranking, softmax_weights
from ..types import Batch, Example, Group, Phase


@dataclass(frozen=True, kw_only=True)
class Rwr(Algorithm):
    """Fine-tune on all of one's own samples, each weighted by exp(reward / beta) within its prompt."""

    beta: float = 1.0
    """Temperature, in units of the combined reward: by default of its deviation over the round."""
    min_weight: float = 0.0
    """Leave out samples with a smaller weight, where 1 is the mean: each costs a pass and teaches little."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ConfigError(f"beta is {self.beta}; it must be positive")
        if not 0 <= self.min_weight <= 1:
            raise ConfigError(f"min_weight is {self.min_weight}; it must lie between 0 (all are kept) and 1, the mean")

    def validate(self, config: RunConfig) -> None:
        """Raise ConfigError where K leaves nothing to weigh."""
        if config.sampling.samples_per_prompt < 2:
            raise ConfigError("reward-weighted regression weighs a prompt's samples: set samples_per_prompt >= 2")

    def select(self, groups: Sequence[Group], *, round: int, seed: int, phase: Phase) -> list[Example]:
        """All samples of each prompt, the best first, but those under `min_weight`."""
        return [example for group in groups for example in self._weighted(group) if example.weight >= self.min_weight]

    def _weighted(self, group: Group) -> list[Example]:
        ranked = ranking(group)
        if not ranked:
            return []
        weights = softmax_weights([by_reward(scored) for scored in ranked], self.beta)
        return [Example(sample=s.sample, weight=weight) for s, weight in zip(ranked, weights, strict=True)]

    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weight times the policy's error."""
        return weighted_error(policy.error(batch.samples, batch.draw), batch.weight_B)
