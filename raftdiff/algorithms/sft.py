"""Supervised fine-tuning, also called behavior cloning (BC): the user's own pictures and nothing else.

    minimise E_{(x, y) ~ D}[-log pi(y|x)]

The first step of ReST and the baseline of RAFT. For images -log pi is its surrogate, the denoising error of
`Policy.error`. Rewards are measured on the held-out prompts, never trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config import RunConfig
from ..errors import ConfigError
from ..losses import weighted_error
from ..protocols import Algorithm, Policy
from ..types import Batch, Example, Group, Phase


@dataclass(frozen=True, kw_only=True)
class Sft(Algorithm):
    """Fine-tune on the user's own captioned pictures alone; rewards only judge."""

    samples = False

    def validate(self, config: RunConfig) -> None:
        """Raise ConfigError for settings of samples, as there are none."""
        if config.algorithm.replay or config.algorithm.teacher:
            raise ConfigError("sft draws no samples: leave out algorithm.replay and algorithm.teacher")

    def select(self, groups: Sequence[Group], *, round: int, seed: int, phase: Phase) -> list[Example]:
        """Nothing beside the user's own pictures."""
        return []

    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The policy's error: the negative log-likelihood, or its surrogate."""
        return weighted_error(policy.error(batch.samples, batch.draw), batch.weight_B)
