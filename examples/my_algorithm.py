"""An algorithm of one's own: rank-weighted training. The better half of each prompt's samples is trained on, weighted
by rank as CMA-ES weighs its parents (Hansen, arXiv 1604.00772), so that a reward counts by its order alone: squared,
or with an outlier, it gives the same weights.

    python examples/my_algorithm.py                      # aligns the embedded model with it: runs/my-algorithm
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from raftdiff.build import build
from raftdiff.config import RunConfig
from raftdiff.errors import ConfigError
from raftdiff.losses import weighted_error
from raftdiff.protocols import Algorithm, Policy
from raftdiff.rounds import run_rounds
from raftdiff.selection import best_of_group
from raftdiff.types import Batch, Example, Group, Phase


@dataclass(frozen=True, kw_only=True)
class RankWeighted(Algorithm):
    """Fine-tune on the best half of one's own samples, weighted by their rank within the prompt."""

    share: float = 0.5
    """Of each prompt's scored samples, what is trained on: above 0, at most 1."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"share is {self.share}; it must be above 0 and at most 1")

    def validate(self, config: RunConfig) -> None:
        """Raise ConfigError where K leaves nothing to rank."""
        if config.sampling.samples_per_prompt < 2:
            raise ConfigError("rank-weighted training needs sampling.samples_per_prompt >= 2")

    def select(self, groups: Sequence[Group], *, round: int, seed: int, phase: Phase) -> list[Example]:
        """The best `share` of each prompt, at least one, with weights whose mean is 1."""
        return [example for group in groups for example in self._ranked(group)]

    def _ranked(self, group: Group) -> list[Example]:
        best = best_of_group([group], keep=max(1, int(self.share * len(group.ranked))))
        raw = [math.log(len(best) + 0.5) - math.log(rank) for rank in range(1, len(best) + 1)]
        return [
            Example(sample=scored.sample, weight=weight * len(raw) / math.fsum(raw))
            for scored, weight in zip(best, raw, strict=True)
        ]

    def loss(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weight times the policy's error."""
        return weighted_error(policy.error(batch.samples, batch.draw), batch.weight_B)


def main() -> None:
    config = RunConfig.model_validate(
        {
            "name": "my-algorithm",
            "rounds": 2,
            "algorithm": {"name": "my_algorithm:RankWeighted", "options": {"share": 0.25}},
            "prompts": {"source": "shapes:single/256/1", "per_round": 64},
            "rewards": [{"name": "clip", "options": {"model": "shapes"}}],
            "sampling": {"batch_size": 64, "num_inference_steps": 12, "guidance_scale": 1.0},
            "training": {"learning_rate": 1e-3, "batch_size": 32, "steps": 60},
            "adapter": {"targets": "all"},
            "evaluation": {"prompts": "shapes:single/64/2", "rewards": [{"name": "shapes-oracle"}]},
        }
    )
    result = run_rounds(build(config, allow_code=True))
    print(result.verdict.message)
    print(result.report_path)


if __name__ == "__main__":
    main()
