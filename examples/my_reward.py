"""A reward of one's own: how colorful a picture is (Hasler and Süsstrunk, 2003, "Measuring colorfulness in natural
images", eq. 2).

    python examples/my_reward.py                         # aligns the embedded model with it: runs/my-reward
    PYTHONPATH=examples raftdiff train run.yaml --allow-code

where run.yaml has

    rewards: [{name: "my_reward:ColorfulnessReward", weight: 1.0, options: {scale: 0.5}}]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline

import raftdiff
from raftdiff.protocols import Modality
from raftdiff.shapes import WEIGHTS
from raftdiff.types import Sample


class ColorfulnessReward:
    """How colorful the picture is: 0 for gray, above 100 for extremely colorful."""

    modality: Modality = "image"

    def __init__(self, *, scale: float = 1.0, name: str = "colorfulness") -> None:
        """`scale` multiplies the value; `name` is what reports call the reward."""
        self.name = name
        self._scale = scale

    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B], `scale` times the colorfulness."""
        return torch.tensor([self._scale * _colorfulness(sample) for sample in samples], dtype=torch.float32)


def _colorfulness(sample: Sample) -> float:
    assert sample.image is not None  # the modality is "image"
    red, green, blue = sample.image.double()
    opponents = torch.stack([red - green, (red + green) / 2 - blue]).flatten(1)
    deviation, mean = opponents.std(dim=1, correction=0), opponents.mean(dim=1)
    return float(deviation.norm() + 0.3 * mean.norm())


def main() -> None:
    result = raftdiff.align(
        DiffusionPipeline.from_pretrained(WEIGHTS / "pipeline", use_safetensors=True),
        prompts="shapes:single/256/1",
        held_out="shapes:single/64/2",
        reward=ColorfulnessReward(),
        judge=["shapes-oracle"],  # measured, never trained on
        name="my-reward",
        rounds=2,
        prompts_per_round=64,
        sampling={"batch_size": 64, "num_inference_steps": 12, "guidance_scale": 1.0},
        training={"learning_rate": 1e-3, "batch_size": 32, "steps": 60},
        adapter={"targets": "all"},
    )
    print(result.verdict.message)
    print(result.report_path)


if __name__ == "__main__":
    main()
