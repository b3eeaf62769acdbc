"""The three contracts. Whatever satisfies them goes through the same rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from .types import Draw, Group, Prompt, Sample, TrainingSet

Modality = Literal["image", "text"]


@runtime_checkable
class Policy(Protocol):
    """A model being aligned."""

    modality: Modality
    passes: int
    """Rows that went through the denoiser (tokens, for text) since the policy was made; the ledger reads it."""

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], *, guidance_scale: float | None = None
    ) -> list[Sample]:
        """One sample for each prompt and seed. The same prompt and seed give the same sample in any batch size on
        the same machine, up to the rounding of batched arithmetic. `guidance_scale` replaces the configured one."""
        ...

    def draw(self, samples: Sequence[Sample], generator: torch.Generator) -> Draw:
        """The noise, timesteps and prompt dropout of one training step on `samples`."""
        ...

    def error(self, samples: Sequence[Sample], draw: Draw) -> torch.Tensor:
        """Per-sample negative log-likelihood, float32 [B]; for images its surrogate, the weighted denoising or
        flow-matching error (mean over the latent dimensions). Carries gradients to `parameters()`."""
        ...

    def parameters(self) -> list[torch.nn.Parameter]:
        """What training changes, in a fixed order."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within it the policy is the model it began as: the adapter is off."""
        ...

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """Name to tensor of everything that training changes, on the CPU."""
        ...

    def load_adapter(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what `adapter_state` gave. Raises WeightsError on missing or unexpected names and shapes."""
        ...

    def export(self, path: Path) -> None:
        """Write the adapter to the folder `path` in the format that the model's own library loads in one line."""
        ...

    def fingerprint(self) -> str:
        """A short hash that tells this base model from another one."""
        ...


@runtime_checkable
class Reward(Protocol):
    """Judges samples; higher is better."""

    name: str
    modality: Modality
    differentiable: bool

    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B] on the CPU, NaN for a sample that could not be judged (never 0 for a failure)."""
        ...


@runtime_checkable
class Algorithm(Protocol):
    """How scored samples become a loss."""

    needs_log_ratio: bool
    """Whether selection needs `Scored.log_ratio`."""

    def validate(self, samples_per_prompt: int) -> None:
        """Raise ConfigError where so many samples for each prompt make no sense."""
        ...

    def select(self, groups: Sequence[Group], *, round: int, seed: int) -> TrainingSet: ...

    def loss(
        self, policy: Policy, samples: Sequence[Sample], weight_B: torch.Tensor, draw: Draw
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Per-sample losses [B] with gradients, and metrics [B] to log."""
        ...


def describe(unit: Any) -> str:
    """The first line of a unit's docstring, for listings."""
    return (unit.__doc__ or "").strip().split("\n")[0]
