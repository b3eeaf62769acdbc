"""DiffusionNFT (Zheng et al., arXiv 2509.16117): reinforcement learning by the forward process, from good and bad
samples.

No step of sampling is retraced: the clean samples are noised anew, as in RAFT, so any sampler will do. With the
prediction x_hat of the policy and x_old of the policy that sampled, an average of the weights, as clean latents, and
rho = clamp(advantage / (2 A) + 1/2, 0, 1),

    L = A / beta (rho |x_plus - x_0|^2 / w_plus + (1 - rho) |x_minus - x_0|^2 / w_minus)
    x_plus, x_minus = x_old + beta (x_hat - x_old), x_old - beta (x_hat - x_old);   w = mean |x_plus - x_0|

so that a bad sample teaches by the mirror image of the policy in x_old. A sample of no advantage (rho = 1/2) pulls
neither towards itself nor away, and holds the policy at x_old otherwise.

The paper mixes flow velocities. x_0 is linear in the prediction at a given x_t, for velocities as for eps and v, so to
mix the clean latents that they stand for is the same; `Policy.denoised` converts them.

Departures from the paper:
- the average that samples moves with every optimiser step (`training.ema_decay`), not once a round;
- guidance in sampling is allowed: samples then are better than those of either model in the loss, and only the
  differences between them teach;
- dropped prompts (`training.caption_dropout`) are trained as any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config import RunConfig
from ..errors import ConfigError
from ..losses import forward_process
from ..protocols import Algorithm, GivesDenoised
from ..registry import check_choice
from ..selection import Deviation, group_relative
from ..types import Batch, Example, Group, Phase


@dataclass(frozen=True, kw_only=True)
class Nft(Algorithm):
    """DiffusionNFT: denoise towards good samples and away from bad ones, by the plain forward process."""

    beta: float = 1.0
    """How far the policy is extrapolated from the one that sampled: small learns faster, and less steadily."""
    max_advantage: float = 5.0
    """A: advantages are clipped to plus and minus this, where a sample is wholly good or wholly bad."""
    std: Deviation = "group"
    """What advantages are divided by: the deviation of the prompt's rewards (`group`) or of the round's (`batch`)."""
    std_floor: float = 1e-4
    """Added to that deviation, so that a prompt whose rewards almost agree gets no enormous advantage."""
    kl_weight: float = 1e-4
    """Weight of the squared difference from the base model's prediction; 0 for none, which also saves its pass."""

    needs = ("denoised",)

    def __post_init__(self) -> None:
        check_choice("std", self.std, Deviation)
        for name in ("beta", "max_advantage"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}; it must be positive")
        for name in ("std_floor", "kl_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is {value}; it must be 0 (none) or positive")

    def validate(self, config: RunConfig) -> None:
        """Raise ConfigError where there is no average to sample from, or samples would not be its own."""
        refused = {
            "training.ema_decay must be above 0: the average is the policy that samples": not config.training.ema_decay,
            "sampling.samples_per_prompt must be at least 2, to compare": config.sampling.samples_per_prompt < 2,
            "algorithm.teacher must be left out: the policy's own samples are compared": config.algorithm.teacher,
            "algorithm.replay must be 0: older samples are of an older policy": config.algorithm.replay > 0,
            "data must be left out: your own pictures have no advantage": config.data,
        }
        if reasons := [reason for reason, applies in refused.items() if applies]:
            raise ConfigError(f"nft: {'; '.join(reasons)}")

    def select(self, groups: Sequence[Group], *, round: int, seed: int, phase: Phase) -> list[Example]:
        """Every sample that has a reward, weighted by its advantage within its prompt."""
        advantage = group_relative(groups, deviation=self.std, floor=self.std_floor)
        limit = self.max_advantage
        return [
            Example(sample=scored.sample, weight=min(max(advantage[scored.sample.id], -limit), limit))
            for group in groups
            for scored in group.ranked
            if scored.sample.id in advantage
        ]

    def loss(self, policy: GivesDenoised, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of each sample; policy, average and base share noise, timesteps and dropped prompts."""
        with torch.no_grad(), batch.averaged():
            old = policy.denoised(batch.samples, batch.draw)
        new = policy.denoised(batch.samples, batch.draw)
        loss_B, metrics = forward_process(
            new.x0,
            new.predicted_x0,
            old.predicted_x0,
            batch.weight_B,
            beta=self.beta,
            max_advantage=self.max_advantage,
        )
        if self.kl_weight:
            with torch.no_grad(), policy.reference():
                reference = policy.denoised(batch.samples, batch.draw)
            kl_B = (new.prediction - reference.prediction).square().flatten(1).mean(1)
            loss_B = loss_B + self.kl_weight * kl_B
            metrics["kl"] = kl_B.detach()
        return loss_B, metrics
