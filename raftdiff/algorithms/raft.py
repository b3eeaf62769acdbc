"""RAFT: Reward rAnked FineTuning (Dong et al., arXiv 2304.06767).

Departures from the paper:
- for images the negative log-likelihood is its surrogate, the denoising error of `Policy.error`, and the log-ratio
  of the KL-regularised ranking is estimated by the difference of denoising errors between reference and current
  model on shared noise and timesteps (a difference of evidence lower bounds, not of likelihoods);
- `hybrid` is the selection of the authors' diffusion notebook, which the paper does not describe;
- `pareto`, of several rewards, `random`, the control, and the filters `min_reward` and `min_margin` are ours.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..config import RunConfig
from ..errors import ConfigError
from ..losses import weighted_error
from ..protocols import Algorithm, Policy
from ..registry import check_choice
from ..selection import (
    best_of_group,
    best_overall,
    by_reward,
    hybrid,
    kl_regularized,
    pareto_front,
    random_of_group,
    ranking,
)
from ..types import Batch, Example, Group, Phase, Scored

logger = logging.getLogger(__name__)

Selection = Literal["local", "global", "hybrid", "pareto", "random"]


@dataclass(frozen=True, kw_only=True)
class Raft(Algorithm):
    """Fine-tune on the best of one's own samples: no reward enters the loss.

    To raise E_{x ~ D, y ~ p_w(.|x)} r(x, y), each round draws y_1..y_K ~ p_w(.|x) for every prompt x, keeps
    y*(x) = argmax_j r(x, y_j), and lowers E_x[-log p_w(y*(x) | x)] over w, from the current w.
    """

    selection: Selection = "local"
    """`local`: the best of each prompt; `global`: the best of the round; `hybrid`: the best of each prompt, then the
    best `hybrid_keep` of those; `pareto`: of each prompt all that no other one dominates in the rewards that have a
    weight; `random`: of each prompt by chance, the control."""
    keep: int = 1
    """Samples to keep for each prompt; `global` keeps as many, but wherever they are best."""
    hybrid_keep: int | None = None
    """Samples that `hybrid` keeps of the whole round; needed there, meaningless elsewhere."""
    kl_beta: float = 0.0
    """Rank by reward - kl_beta * log(p_current / p_reference). Changes the selection, never the loss."""
    min_reward: float | None = None
    """Do not train on a chosen sample with a lower reward."""
    min_margin: float | None = None
    """Do not train on a prompt whose best reward is above its mean reward by less: nothing to learn there."""

    def __post_init__(self) -> None:
        check_choice("selection", self.selection, Selection)
        if self.keep < 1:
            raise ConfigError(f"keep is {self.keep}; at least 1 sample a prompt must be kept")
        if (self.selection == "hybrid") != (self.hybrid_keep is not None):
            raise ConfigError(
                f"selection is {self.selection} and hybrid_keep is {self.hybrid_keep}; "
                "hybrid needs the number of samples to keep of a round, the others do not take it"
            )
        if self.hybrid_keep is not None and (self.hybrid_keep < 1 or self.keep != 1):
            raise ConfigError(
                f"hybrid_keep is {self.hybrid_keep} and keep {self.keep}; hybrid keeps 1 sample of a prompt, "
                "then at least 1 of the round"
            )
        if self.selection == "pareto" and (self.keep != 1 or self.kl_beta):
            raise ConfigError("selection: pareto keeps whole fronts, however many they are: leave out keep and kl_beta")
        if not (math.isfinite(self.kl_beta) and self.kl_beta >= 0):
            raise ConfigError(f"kl_beta is {self.kl_beta}; it must be 0 (off) or positive")
        if self.min_reward is not None and not math.isfinite(self.min_reward):
            raise ConfigError(f"min_reward is {self.min_reward}; give a finite number or leave it out")
        if self.min_margin is not None and not (math.isfinite(self.min_margin) and self.min_margin > 0):
            raise ConfigError(
                f"min_margin is {self.min_margin}; it must be positive, or left out to train on every prompt"
            )

    @property
    def needs_log_ratio(self) -> bool:  # type: ignore[override]
        return self.kl_beta > 0 and self.selection != "random"  # the control ranks nothing

    def validate(self, config: RunConfig) -> None:
        """Raise ConfigError where K leaves this selection no choice."""
        samples_per_prompt = config.sampling.samples_per_prompt
        if self.keep > samples_per_prompt:
            raise ConfigError(
                f"keep is {self.keep} of K = {samples_per_prompt} samples a prompt; "
                "lower keep or raise sampling.samples_per_prompt"
            )
        if self.selection == "pareto" and len(config.trained_rewards) < 2:
            raise ConfigError(
                "selection: pareto compares rewards with each other; give at least two a weight, or local"
            )
        if self.selection in ("local", "hybrid", "pareto") and samples_per_prompt == self.keep:
            raise ConfigError(
                f"K = {samples_per_prompt} with keep = {self.keep} leaves nothing to select of a prompt; "
                f"set sampling.samples_per_prompt >= {self.keep + 1} or selection: random"
            )

    def select(self, groups: Sequence[Group], *, round: int, seed: int, phase: Phase) -> list[Example]:
        """The chosen samples that pass the filters, each with the weight 1; empty where none does."""
        unscored = [group.prompt.text for group in groups if not group.ranked]
        if unscored:
            logger.warning("round %d: no sample has a reward for %d prompts: %s", round, len(unscored), unscored)
        chosen = self._choose(groups, round, seed)
        too_flat = {group.prompt.id for group in groups if not self._has_margin(group)}
        kept = [
            scored.sample
            for scored in chosen
            if scored.sample.prompt.id not in too_flat
            and (self.min_reward is None or by_reward(scored) >= self.min_reward)
        ]
        if len(kept) < len(chosen):
            logger.info("round %d: the filters dropped %d of %d samples", round, len(chosen) - len(kept), len(chosen))
        return [Example(sample=sample) for sample in kept]

    def _choose(self, groups: Sequence[Group], round: int, seed: int) -> list[Scored]:
        key = kl_regularized(self.kl_beta) if self.needs_log_ratio else by_reward
        if self.selection == "random":
            return random_of_group(groups, self.keep, round=round, seed=seed)
        if self.selection == "pareto":
            return pareto_front(groups)
        if self.selection == "global":
            return best_overall(groups, len(groups) * self.keep, key=key)
        if self.hybrid_keep is not None:
            return hybrid(groups, self.hybrid_keep, key=key)
        return best_of_group(groups, self.keep, key=key)

    def _has_margin(self, group: Group) -> bool:
        if self.min_margin is None:
            return True
        rewards = [by_reward(scored) for scored in ranking(group)]
        return not rewards or rewards[0] - math.fsum(rewards) / len(rewards) >= self.min_margin

    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weight times the policy's error: the negative log-likelihood of the kept samples, or its surrogate."""
        return weighted_error(policy.error(batch.samples, batch.draw), batch.weight_B)
