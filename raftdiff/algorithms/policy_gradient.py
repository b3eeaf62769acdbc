"""Policy gradients through the denoising steps: DDPO (Black et al., arXiv 2305.13301) and, for flow-matching models,
Flow-GRPO (Liu et al., arXiv 2505.05470); through the tokens of a text: GRPO (Shao et al., arXiv 2402.03300).

Sampling is a chain of Gaussian steps, and each is an action a = x_{t-1} in the state s = (prompt, t, x_t), with the
reward of the picture. With the ratio r = p(x_{t-1} | x_t) / p_old(x_{t-1} | x_t) and the advantage A of the picture
within its prompt,

    clipped:  L = -min(r A, clamp(r, 1 - clip, 1 + clip) A),   several updates on one round's samples (DDPO-IS)
    score:    L = -A log p(x_{t-1} | x_t),                     one update (DDPO-SF)

log p is the mean over the latent dimensions, as in both authors' code: the clip range of 1e-4 depends on that.
Guidance is part of the policy: the steps are retraced with that of sampling, with gradients through both predictions.

A text is a chain of tokens, and each is an action in the state of all before it. log p is that of the token itself,
all tokens of a text have its advantage, and its loss is the mean over them. All of them are one row of training.

Departures from the papers:
- the mean and deviation of a prompt's rewards are those of its K samples in the round, not a running record of DDPO;
- the Kullback-Leibler penalty is estimated from log-densities (Schulman's k3, times the dimensions D, so that it is on
  the scale of a mean over them); Flow-GRPO has the difference of the two means, which is that same quantity for small
  changes;
- a step without noise, such as DDIM's last to alpha_bar = 1, has no density and is not trained on;
- ratios of tokens are those of the whole distribution at the temperature of sampling, also where top-p has cut it.
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
from ..losses import clipped_ratio, kl_estimate, masked_mean
from ..protocols import Algorithm, GivesLogProb
from ..registry import nearest
from ..selection import Deviation, group_relative
from ..types import Batch, Example, Group, Phase, Sample

logger = logging.getLogger(__name__)

Form = Literal["clipped", "score"]

STEP_CLIP, TOKEN_CLIP = 1e-4, 0.2


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Algorithm):
    """DDPO, Flow-GRPO and GRPO: make the denoising steps or tokens of better samples more likely, the others less."""

    noise_level: float = 1.0
    """Of the denoising steps: DDIM's eta; for flow-matching models set .7, the a of Flow-GRPO."""
    form: Form = "clipped"
    """`clipped`: importance sampling, several updates a round; `score`: one update a round."""
    clip: float | None = None
    """How far a ratio may leave 1 before its gradient stops. If absent, 1e-4 for denoising steps, whose log-densities
    are means over dimensions, and .2 for tokens."""
    std: Deviation = "group"
    """What advantages are divided by: the deviation of the prompt's rewards (`group`) or of the round's (`batch`)."""
    std_floor: float = 1e-4
    """Added to that deviation, so that a prompt whose rewards almost agree gets no enormous advantage."""
    max_advantage: float = 5.0
    """Advantages are clipped to plus and minus this."""
    kl_beta: float = 0.0
    """Weight of the penalty for leaving the base model; 0 for none, which also saves its pass."""
    steps_per_sample: int | None = None
    """Denoising steps of each trajectory to train on, drawn anew for each sample; all if absent."""

    needs = ("log_prob", "log_prob_rounding")

    def __post_init__(self) -> None:
        for name, kinds in (("form", Form), ("std", Deviation)):
            value, known = getattr(self, name), get_args(kinds)
            if value not in known:
                raise ConfigError(f"{name} is {value!r}{nearest(str(value), known)} (there are {', '.join(known)})")
        for name in ("noise_level", "clip", "max_advantage"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
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
            "training.steps must be 1 with form: score, which is right for one update alone; set "
            "training.batch_size to the round's samples times steps": self.form == "score"
            and config.training.steps != 1,
        }
        if reasons := [reason for reason, applies in refused.items() if applies] + off_policy(config):
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

    def _steps(self, sample: Sample, round: int, seed: int) -> list[int | None]:
        steps = sample.steps
        if self.steps_per_sample is None or self.steps_per_sample >= len(steps):
            return steps
        rng = np.random.default_rng([seed, round, sample.seed])
        return [steps[i] for i in sorted(rng.choice(len(steps), self.steps_per_sample, replace=False))]

    def loss(self, policy: GivesLogProb, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of each step or completion, and how far its ratios have moved.

        Raises:
            TrainingError: before the first update a ratio is not 1, so these are not the steps that were sampled.
        """
        log_prob_BT = policy.log_prob(batch.samples, batch.steps)
        old_BT, mask_BT = batch.sampled_log_prob()
        if batch.updates == 0:
            check_ratio(log_prob_BT, old_BT, policy.log_prob_rounding)
        loss_B, metrics = clipped_ratio(log_prob_BT, old_BT, batch.weight_B[:, None], mask_BT, clip=self._clip(batch))
        if self.form == "score":
            loss_B = -batch.weight_B * masked_mean(log_prob_BT, mask_BT)
        if self.kl_beta:
            with torch.no_grad(), policy.reference():
                reference_BT = policy.log_prob(batch.samples, batch.steps)
            kl_B = _dimensions(batch.samples[0]) * masked_mean(kl_estimate(log_prob_BT, reference_BT), mask_BT)
            loss_B = loss_B + self.kl_beta * kl_B
            metrics["kl"] = kl_B.detach()
        return loss_B, metrics

    def _clip(self, batch: Batch) -> float:
        return self.clip or (TOKEN_CLIP if batch.steps[0] is None else STEP_CLIP)


def _dimensions(sample: Sample) -> int:
    """How many a log-density is the mean over."""
    return sample.trajectory.states[0].numel() if sample.trajectory else 1


def off_policy(config: RunConfig) -> list[str]:
    """Which settings of a run would train a policy that is not the one that sampled, and what to do about them."""
    refused = {
        "training.ema_decay must be 0: the average would sample": config.training.ema_decay > 0,
        "adapter.dropout must be 0: it would change the ratios": config.adapter.dropout > 0,
        "algorithm.teacher must be left out: another model's samples have other ratios": config.algorithm.teacher,
        "algorithm.replay must be 0: older samples are of an older policy": config.algorithm.replay > 0,
        "data must be left out: the policy did not sample your own": config.data,
    }
    return [reason for reason, applies in refused.items() if applies]


def check_ratio(log_prob_BT: torch.Tensor, old_log_prob_BT: torch.Tensor, tolerance: float) -> None:
    """Raise TrainingError where the ratio of a step or token is off 1 by more than rounding explains."""
    off = float(((log_prob_BT.detach() - old_log_prob_BT).exp() - 1).abs().max())
    if not off <= tolerance:
        raise TrainingError(
            f"before the first update a ratio of densities is off 1 by {off:.1e}, where rounding explains at most "
            f"{tolerance:.0e}: the model in training is not the one that sampled. Likely causes: a moving average or "
            "another adapter was sampled, dropout is on, the samples in the run folder were made on another device or "
            "with other versions, or the pipeline does more to its guided predictions than u + g (c - u), which "
            "sampling.guidance_scale: 1 avoids"
        )
