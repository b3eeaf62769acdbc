"""ReST: Reinforced Self-Training (Gulcehre et al., arXiv 2308.08998).

Grow: D_g = {(x, y): x ~ D, y ~ pi(.|x)} united with the user's own data D, scored once. Improve, for i = 1..I on the
same D_g, from the policy of the last Improve and at a lower learning rate:

    minimise E_{D_g}[1{R > tau_i} * L],   tau_1 < ... < tau_I,   while the reward on held-out prompts rises

One round of a run is one Improve; the first on a D_g is also its Grow. The losses are weights on -log pi(y|x), A = r -
V(x):

    bc       1
    vmpo     psi = softmax(A / eta) over the better half by A, eta minimising eta * eps + eta * log mean exp(A / eta)
    bvmpo    psi + lambda: KL(behaviour || pi) is, up to a constant, the -log pi of the behaviour's samples;
             lambda falls from 1 to 1e-5 over the Improve steps
    oac      A
    gold     Q max(pi(y_t|x), u) for each token y_t, of which no gradient is taken, Q = r

Departures from the paper:
- for images -log pi is its surrogate, the denoising error of `Policy.error`, and V(x) is the mean of the prompt's
  rewards in D_g, as an image is a one-step bandit: `vmpo`, `bvmpo` and `oac` are surrogates in both. psi is scaled to
  the mean 1. There is no target network and no learned value;
- the filter stands before the losses, as in the formula above: the better half, and the behaviour of `bvmpo`, are of
  what is above the threshold;
- `oac` divides A by its deviation over D_g and clips it: a negative weight pushes away from a sample without bound;
- `gold` needs the likelihood of each token, so that images do not have it. Its Q is the reward of the whole text, the
  return of each of its tokens, scaled to [0, 1] by the extremes of D_g: the paper's rewards lie there by themselves;
- the per-prompt rules always keep the best of a prompt, also where a strict > would keep nothing (equal rewards, a
  single sample, gamma = 1), and `global` keeps everything at the threshold 0;
- the default rule is `percentile`: scaling to [0, 1] by the extremes of D_g leaves few pictures above .9.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch

from ..config import RunConfig
from ..errors import ConfigError
from ..losses import gold, weighted_error
from ..protocols import Algorithm
from ..registry import check_choice
from ..selection import above_global, above_interpolation, above_percentile, advantages, scaled, vmpo_weights
from ..types import Batch, Example, Group, Phase, RoundReport, Scored

logger = logging.getLogger(__name__)

Rule = Literal["global", "percentile", "interpolation"]
RestLoss = Literal["bc", "vmpo", "bvmpo", "oac", "gold"]

RULES = {"global": above_global, "percentile": above_percentile, "interpolation": above_interpolation}
LAST_LAMBDA = 1e-5  # of bvmpo, in the last Improve


@dataclass(frozen=True, kw_only=True)
class Rest(Algorithm):
    """Grow a set of one's own samples, then improve on it several times, above rising thresholds."""

    rule: Rule = "percentile"
    """`global`: rewards scaled to [0, 1] over the whole set; `percentile`: each prompt's own quantile;
    `interpolation`: t * max + (1 - t) * mean of each prompt's rewards."""
    thresholds: Sequence[float] = (0.7, 0.8, 0.9, 0.95)
    """One for each Improve of a Grow, rising, 0 to 1: the scaled reward, the quantile, or t."""
    gate: bool = True
    """Grow anew as soon as an Improve did not raise the trained reward on the held-out prompts."""
    learning_rate_decay: float = 0.5
    """Factor on the learning rate from each Improve to the next; a Grow begins at the configured one."""
    loss_type: RestLoss = "bc"
    """`bc`: plain training on what is above the threshold; `vmpo`, `bvmpo`, `oac`: weighted by advantage; `gold`, of
    texts: by reward, and each token by its likelihood."""
    epsilon: float = 0.1
    """How far, in nats, the weights of `vmpo` and `bvmpo` are from uniform."""
    advantage_clip: float = 2.0
    """`oac`: bounds of the weights, in deviations of the advantage."""
    least_importance: float = 0.1
    """`gold`: what an unlikely token counts at least, u, 0 to 1; 1 is `bc` weighted by reward."""

    scores_data = True

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("token_log_prob",) if self.loss_type == "gold" else ()

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, Rule)
        check_choice("loss_type", self.loss_type, RestLoss)
        self._check_thresholds()
        limits = {"learning_rate_decay": 1.0, "epsilon": math.inf, "advantage_clip": math.inf, "least_importance": 1.0}
        for name, most in limits.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 < value <= most):
                raise ConfigError(f"{name} is {value}; it must be positive" + (" and at most 1" if most == 1 else ""))

    def _check_thresholds(self) -> None:
        taus = self.thresholds
        if not isinstance(taus, Sequence) or not taus or not all(isinstance(tau, int | float) for tau in taus):
            raise ConfigError(f"thresholds is {taus!r}; give a list of numbers, one for each Improve: [0.7, 0.9]")
        if not all(0 <= tau <= 1 for tau in taus):
            raise ConfigError(f"thresholds are {list(taus)}; they lie between 0 and 1: 0.9 for the 90th percentile")
        if not all(low < high for low, high in pairwise(taus)):
            raise ConfigError(f"thresholds are {list(taus)}; each Improve needs a higher one than the last")
        if self.rule == "global" and taus[-1] == 1:
            raise ConfigError(f"thresholds are {list(taus)}; nothing is above 1, the best of all: leave it out")

    def validate(self, config: RunConfig) -> None:
        """Raise ConfigError where a prompt has no group to compare in, or with replay."""
        if config.sampling.samples_per_prompt < 2 and (self.rule != "global" or self.loss_type not in ("bc", "gold")):
            raise ConfigError(
                f"ReST with rule {self.rule} and loss_type {self.loss_type} compares the samples of a prompt: set "
                "sampling.samples_per_prompt >= 2, or rule: global with loss_type: bc or gold"
            )
        if config.algorithm.replay:
            raise ConfigError("ReST trains on the last Grow, in every Improve again: leave out algorithm.replay")

    def phase(self, round: int, reports: Sequence[RoundReport]) -> Phase:
        """The next Improve on the last Grow, or a new Grow where that has had all its steps or the gate is closed."""
        last = reports[-1]
        improve = last.phase.improve + 1
        if last.round == 0 or improve >= len(self.thresholds) or not self._improved(reports):
            return Phase(grown=round)
        return Phase(grown=last.phase.grown, improve=improve, learning_rate=self.learning_rate_decay**improve)

    def _improved(self, reports: Sequence[RoundReport]) -> bool:
        """Whether the last round raised the trained reward over the one before; yes where one was not evaluated."""
        if not self.gate or not all(report.evaluations for report in reports[-2:]):
            return True
        before, after = (report.evaluations[0].metrics["reward"].mean for report in reports[-2:])
        return after > before

    def select(self, groups: Sequence[Group], *, round: int, seed: int, phase: Phase) -> list[Example]:
        """What is above the threshold of this Improve, with the weights of the loss; none has the weight 0."""
        threshold = self.thresholds[phase.improve]
        kept = RULES[self.rule](groups, threshold)
        weights = self._weights(groups, kept, phase.improve)
        examples = [Example(sample=s.sample, weight=w) for s, w in zip(kept, weights, strict=True) if w]
        if not examples:
            ranked = sum(len(group.ranked) for group in groups)
            logger.warning("round %d: %s > %g keeps nothing of %d scored samples", round, self.rule, threshold, ranked)
        return examples

    def _weights(self, groups: Sequence[Group], kept: Sequence[Scored], improve: int) -> list[float]:
        if self.loss_type == "bc" or not kept:
            return [1.0] * len(kept)
        if self.loss_type == "gold":
            return_of = scaled(groups)
            return [return_of[scored.sample.id] for scored in kept]
        advantage = advantages(groups)
        advantage_N = [advantage[scored.sample.id] for scored in kept]
        if self.loss_type == "oac":
            deviation = float(np.std(list(advantage.values()))) or 1.0
            return np.clip(np.divide(advantage_N, deviation), -self.advantage_clip, self.advantage_clip).tolist()
        behavior = self._lambda(improve) if self.loss_type == "bvmpo" else 0.0
        return [weight + behavior for weight in vmpo_weights(advantage_N, self.epsilon)]

    def _lambda(self, improve: int) -> float:
        """From 1 in the first Improve to LAST_LAMBDA in the last, by the same factor each time."""
        return LAST_LAMBDA ** (improve / max(1, len(self.thresholds) - 1))

    def loss(self, policy: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weight times the error, the negative log-likelihood or its surrogate; or `gold` of the tokens."""
        if self.loss_type == "gold":
            return gold(policy.token_log_prob(batch.samples), batch.weight_B, least=self.least_importance)
        return weighted_error(policy.error(batch.samples, batch.draw), batch.weight_B)
