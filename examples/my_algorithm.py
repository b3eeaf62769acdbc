"""An algorithm of one's own: reward-weighted regression (Peters and Schaal, 2007; for text-to-image, Lee et al.,
arXiv 2302.12192). Every sample is trained on, the more the better it is, where RAFT trains on the best alone.

    python examples/my_algorithm.py                      # aligns the embedded model with it: runs/my-algorithm
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from raftdiff.build import build
from raftdiff.config import RunConfig
from raftdiff.errors import ConfigError
from raftdiff.losses import weighted_error
from raftdiff.protocols import Policy
from raftdiff.rounds import run_rounds
from raftdiff.types import Draw, Group, Sample, TrainingSet


@dataclass(frozen=True, kw_only=True)
class RewardWeighted:
    """Fine-tune on all of one's own samples, each weighted by exp(reward / temperature) within its prompt."""

    temperature: float = 1.0
    """In units of the combined reward. Small: like RAFT's `local` selection; large: like no selection at all."""
    least_weight: float = 0.05
    """Samples with a smaller share of their prompt's weight are left out: they cost a pass and teach nothing."""

    needs_log_ratio = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be positive")

    def validate(self, samples_per_prompt: int) -> None:
        """Raise ConfigError where K = `samples_per_prompt` leaves nothing to weigh."""
        if samples_per_prompt < 2:
            raise ConfigError("reward-weighted regression needs sampling.samples_per_prompt >= 2")

    def select(self, groups: Sequence[Group], *, round: int, seed: int) -> TrainingSet:
        """Every prompt's samples, their weights summing to 1 before the small ones are left out."""
        chosen: list[Sample] = []
        weights: list[float] = []
        for group in groups:
            shares = _softmax([s.reward / self.temperature for s in group.ranked if s.reward is not None])
            for scored, share in zip(group.ranked, shares, strict=True):
                if share >= self.least_weight:
                    chosen.append(scored.sample)
                    weights.append(share)
        return TrainingSet(samples=tuple(chosen), weights=tuple(weights))

    def loss(
        self, policy: Policy, samples: Sequence[Sample], weight_B: torch.Tensor, draw: Draw
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`weight_B` times the policy's error."""
        return weighted_error(policy.error(samples, draw), weight_B)


def _softmax(values: Sequence[float]) -> list[float]:
    largest = max(values, default=0.0)
    exponentials = [math.exp(value - largest) for value in values]
    return [e / math.fsum(exponentials) for e in exponentials]


def main() -> None:
    config = RunConfig.model_validate(
        {
            "name": "my-algorithm",
            "rounds": 2,
            "prompts": {"source": "shapes:single/256/1", "per_round": 64},
            "rewards": [{"name": "clip", "options": {"model": "shapes"}}],
            "sampling": {"batch_size": 64, "num_inference_steps": 12, "guidance_scale": 1.0},
            "training": {"learning_rate": 1e-3, "batch_size": 32, "steps": 60},
            "adapter": {"targets": "all"},
            "evaluation": {"prompts": "shapes:single/64/2", "rewards": [{"name": "shapes-oracle"}]},
        }
    )
    run = replace(build(config), algorithm=RewardWeighted(temperature=0.5))
    result = run_rounds(run)
    print(result.verdict.message)
    print(result.report_path)


if __name__ == "__main__":
    main()
