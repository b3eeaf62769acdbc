"""DPO: Direct Preference Optimization (Rafailov et al., arXiv 2305.18290), for images as Diffusion-DPO (Wallace et al.,
arXiv 2311.12908).

With e = -log p(y|x), of the policy and of the reference that it began as, and a pair of which y_w is preferred to y_l,

    L = -log sigmoid(beta h),   h = (e_ref(y_w) - e(y_w)) - (e_ref(y_l) - e(y_l))

For images e is the denoising error of `Policy.error`, as in Diffusion-DPO. Winner and loser, policy and reference
share the timestep, the noise and whether the prompt is dropped.

`beta` is for that error, a mean over latent dimensions. The authors' code has the same mean and a factor of one half:
its `beta_dpo` of 5000 is our 2500 (the paper's range of 2000 to 5000 our 1000 to 2500). By the sum over SD-1.5's
16,384 dimensions, 2500 is .153: a latent of D dimensions has the same strength at .153 D. For text, where e is a sum
over tokens, .1 is usual.

Departures from the papers:
- pairs may be made of the run's own scored samples, anew in each round; the reference stays the first model;
- own pictures are encoded to the mean of the VAE's posterior, not to a draw, and are never flipped;
- `ipo` (arXiv 2310.12036) has the factor beta^2, so that one learning rate fits all losses.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch

from ..config import RunConfig
from ..errors import ConfigError
from ..losses import DpoLoss, preference
from ..protocols import Algorithm, Policy
from ..registry import check_choice
from ..selection import by_reward, ranking
from ..types import Batch, Example, Group, Phase

logger = logging.getLogger(__name__)

Source = Literal["online", "offline"]
Pairing = Literal["best-worst", "all"]


@dataclass(frozen=True, kw_only=True)
class Dpo(Algorithm):
    """Prefer the better of two samples: by their rewards, or by people's choices."""

    source: Source = "online"
    """`online`: pairs of the round's own samples, by reward; `offline`: the preferences of `data.path` alone."""
    beta: float = 2500.0
    """How strongly the reference holds, in units of one over the mean error: large stays close to it."""
    loss_type: DpoLoss = "sigmoid"
    """`sigmoid`: DPO; `cdpo`: labels that may be wrong; `ipo`: a margin of 1/2 is aimed at, not ever more."""
    label_smoothing: float | None = None
    """Share of labels taken to be wrong, below .5; needed by `cdpo`, meaningless elsewhere."""
    pairing: Pairing = "best-worst"
    """Online: `best-worst`: one pair of each prompt; `all`: every pair of a prompt's samples."""
    min_margin: float = 0.0
    """Online: do not pair samples whose rewards differ by less. Equal rewards never make a pair."""

    pairs = True

    def __post_init__(self) -> None:
        check_choice("source", self.source, Source)
        check_choice("loss_type", self.loss_type, DpoLoss)
        check_choice("pairing", self.pairing, Pairing)
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ConfigError(f"beta is {self.beta}; it must be positive (docs/dpo.md has a table)")
        if (self.loss_type == "cdpo") != (self.label_smoothing is not None):
            raise ConfigError(
                f"loss_type is {self.loss_type} and label_smoothing is {self.label_smoothing}; "
                "cdpo needs the share of wrong labels, the others do not take it"
            )
        if self.label_smoothing is not None and not 0 < self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing is {self.label_smoothing}; it must lie between 0 and .5")
        if not (math.isfinite(self.min_margin) and self.min_margin >= 0):
            raise ConfigError(f"min_margin is {self.min_margin}; it must be 0 (every difference counts) or positive")
        if not self.samples and (self.min_margin or self.pairing != "best-worst"):
            raise ConfigError("source is offline: pairing and min_margin are for pairs of the run's own samples")

    @property
    def samples(self) -> bool:  # type: ignore[override]
        return self.source == "online"

    def validate(self, config: RunConfig) -> None:
        """Raise ConfigError where there can be no pairs, or where offline training is given what it cannot use."""
        if self.samples and config.sampling.samples_per_prompt < 2:
            raise ConfigError("DPO pairs the samples of a prompt: set sampling.samples_per_prompt >= 2")
        if not self.samples and (config.algorithm.replay or config.algorithm.teacher):
            raise ConfigError("source is offline, so nothing is sampled: leave out algorithm.replay and .teacher")

    def select(self, groups: Sequence[Group], *, round: int, seed: int, phase: Phase) -> list[Example]:
        """The pairs of each prompt, the better sample first; empty where all rewards are equal."""
        pairs = [self._pairs(group) for group in groups]
        if without := sum(not of_prompt for of_prompt in pairs):
            logger.info("round %d: %d of %d prompts gave no pair", round, without, len(groups))
        return [example for of_prompt in pairs for example in of_prompt]

    def _pairs(self, group: Group) -> list[Example]:
        ranked = ranking(group)
        best_worst = zip(ranked[:1], ranked[-1:], strict=True)
        candidates = combinations(ranked, 2) if self.pairing == "all" else best_worst
        return [
            Example(sample=better.sample, rejected=worse.sample)
            for better, worse in candidates
            if (margin := by_reward(better) - by_reward(worse)) > 0 and margin >= self.min_margin
        ]

    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted loss of each pair, both sides of it in one batch on one draw."""
        both = [*batch.samples, *batch.rejected]
        draw = batch.draw.rows([*range(len(batch.samples))] * 2)
        with torch.no_grad(), policy.reference():
            reference = policy.error(both, draw).chunk(2)
        loss_B, metrics = preference(
            *policy.error(both, draw).chunk(2),
            *reference,
            beta=self.beta,
            kind=self.loss_type,
            label_smoothing=self.label_smoothing or 0.0,
        )
        return batch.weight_B * loss_B, metrics
