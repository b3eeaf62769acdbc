"""Policy gradients through the denoising steps: DDPO (Black et al., arXiv 2305.13301) and, for flow-matching models,
Flow-GRPO (Liu et al., arXiv 2505.05470).

Sampling is a chain of Gaussian steps, and each is an action a = x_{t-1} in the state s = (prompt, t, x_t), with the
reward of the picture. With the ratio r = p(x_{t-1} | x_t) / p_old(x_{t-1} | x_t) and the advantage A of the picture
within its prompt,

    clipped:  L = -min(r A, clamp(r, 1 - clip, 1 + clip) A),   several updates on one round's samples (DDPO-IS)
    score:    L = -A log p(x_{t-1} | x_t),                     one update (DDPO-SF)

log p is the mean over the latent dimensions, as in both authors' code: the clip range of 1e-4 depends on that.
Guidance is part of the policy: the steps are retraced with that of sampling, with gradients through both predictions.

Departures from the papers:
- the mean and deviation of a prompt's rewards are those of its K samples in the round, not a running record of DDPO;
- the Kullback-Leibler penalty is estimated from log-densities (Schulman's k3, times the dimensions D, so that it is on
  the scale of a mean over them); Flow-GRPO has the difference of the two means, which is that same quantity for small
  changes;
- a step without noise, such as DDIM's last to alpha_bar = 1, has no density and is not trained on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from ..config import RunConfig
from ..errors import ConfigError, TrainingError
from ..losses import clipped_ratio, kl_estimate
from ..protocols import Algorithm, GivesLogProb
from ..registry import nearest
from ..selection import Deviation, group_relative
from ..types import Batch, Example, Group, Phase, Sample, Trajectory

logger = logging.getLogger(__name__)

Form = Literal["clipped", "score"]


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Algorithm):
    """DDPO and Flow-GRPO: make the denoising steps that led to better pictures more likely, the others less."""

    noise_level: float = 1.0
    """Of the steps: DDIM's eta; for flow-matching models set .7, the a of Flow-GRPO."""
    form: Form = "clipped"
    """`clipped`: importance sampling, several updates a round; `score`: one update a round."""
    clip: float = 1e-4
    """How far a ratio may leave 1 before its gradient stops; on log-densities that are means over dimensions."""
    std: Deviation = "group"
    """What advantages are divided by: the deviation of the prompt's rewards (`group`) or of the round's (`batch`)."""
    std_floor: float = 1e-4
    """Added to that deviation, so that a prompt whose rewards almost agree gets no enormous advantage."""
    max_advantage: float = 5.0
    """Advantages are clipped to plus and minus this."""
    kl_beta: float = 0.0
    """Weight of the penalty for leaving the base model; 0 for none, which also saves its pass."""
    steps_per_sample: int | None = None
    """Steps of each trajectory to train on, drawn anew for each sample; all if absent."""

    needs = ("log_prob", "log_prob_rounding")

    def __post_init__(self) -> None:
        for name, kinds in (("form", Form), ("std", Deviation)):
            value, known = getattr(self, name), get_args(kinds)
            if value not in known:
                raise ConfigError(f"{name} is {value!r}{nearest(str(value), known)} (there are {', '.join(known)})")
        for name in ("noise_level", "clip", "max_advantage"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}; it must be positive")
        for name in ("std_floor", "kl_beta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is {value}; it must be 0 (none) or positive")
        if self.steps_per_sample is not None and self.steps_per_sample < 1:
            raise ConfigError(f"steps_per_sample is {self.steps_per_sample}; at least 1 step must be trained on")

    def validate(self, config: RunConfig) -> None:
        """Raise ConfigError where the policy would not be the one that sampled, or would have nothing to learn."""
        steps = config.sampling.trajectory_steps or config.sampling.num_inference_steps
        refused = {
            "sampling.samples_per_prompt must be at least 2, to compare": config.sampling.samples_per_prompt < 2,
            f"steps_per_sample must be at most the {steps} steps of sampling": (self.steps_per_sample or 0) > steps,
            "training.ema_decay must be 0: the average would sample": config.training.ema_decay > 0,
            "adapter.dropout must be 0: it would change the ratios": config.adapter.dropout > 0,
            "algorithm.teacher must be left out: another model's samples have other ratios": config.algorithm.teacher,
            "algorithm.replay must be 0: older samples are of an older policy": config.algorithm.replay > 0,
            "data must be left out: your own pictures have no trajectory": config.data,
            "training.steps must be 1 with form: score, which is right for one update alone; set "
            "training.batch_size to the round's samples times steps": self.form == "score"
            and config.training.steps != 1,
        }
        if reasons := [reason for reason, applies in refused.items() if applies]:
            raise ConfigError(f"policy gradients: {'; '.join(reasons)}")

    def select(self, groups: Sequence[Group], *, round: int, seed: int, phase: Phase) -> list[Example]:
        """Each step to train on of each sample, weighted by the sample's advantage; none of those whose advantage is
        0, which would teach nothing."""
        advantage = group_relative(groups, deviation=self.std, floor=self.std_floor)
        samples = [scored.sample for group in groups for scored in group.ranked if advantage.get(scored.sample.id)]
        if without := len(advantage) - len(samples):
            logger.info("round %d: %d of %d samples have no advantage over others", round, without, len(advantage))
        limit = self.max_advantage
        return [
            Example(sample=sample, weight=min(max(advantage[sample.id], -limit), limit), step=step)
            for sample in samples
            for step in self._steps(sample, round, seed)
        ]

    def _steps(self, sample: Sample, round: int, seed: int) -> list[int]:
        steps = _trajectory(sample).log_prob_T.isfinite().nonzero().flatten().tolist()
        if self.steps_per_sample is None or self.steps_per_sample >= len(steps):
            return steps
        rng = np.random.default_rng([seed, round, sample.seed])
        return sorted(rng.choice(steps, self.steps_per_sample, replace=False).tolist())

    def loss(self, policy: GivesLogProb, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of each step, and how far its ratio has moved.

        Raises:
            TrainingError: before the first update the ratio is not 1, so these are not the steps that were sampled.
        """
        log_prob_B = policy.log_prob(batch.samples, batch.steps)
        walks = [_trajectory(sample) for sample in batch.samples]
        old_B = torch.stack([walk.log_prob_T[step] for walk, step in zip(walks, batch.steps, strict=True)])
        loss_B, metrics = clipped_ratio(log_prob_B, old_B.to(log_prob_B.device), batch.weight_B, clip=self.clip)
        if batch.updates == 0:
            _check_ratio(metrics["ratio"], policy.log_prob_rounding)
        metrics["ratio_change"] = (metrics["ratio"] - 1).abs()
        if self.form == "score":
            loss_B = -batch.weight_B * log_prob_B
        if self.kl_beta:
            with torch.no_grad(), policy.reference():
                reference_B = policy.log_prob(batch.samples, batch.steps)
            kl_B = walks[0].states[0].numel() * kl_estimate(log_prob_B, reference_B)
            loss_B = loss_B + self.kl_beta * kl_B
            metrics["kl"] = kl_B.detach()
        return loss_B, metrics


def _trajectory(sample: Sample) -> Trajectory:
    assert sample.trajectory is not None  # sampled with a noise level
    return sample.trajectory


def _check_ratio(ratio_B: torch.Tensor, tolerance: float) -> None:
    off = float((ratio_B - 1).abs().max())
    if not off <= tolerance:
        raise TrainingError(
            f"before the first update a ratio of densities is off 1 by {off:.1e}, where rounding explains at most "
            f"{tolerance:.0e}: the model in training is not the one that sampled. Likely causes: a moving average or "
            "another adapter was sampled, dropout is on, the samples in the run folder were made on another device or "
            "with other versions, or the pipeline does more to its guided predictions than u + g (c - u), which "
            "sampling.guidance_scale: 1 avoids"
        )
