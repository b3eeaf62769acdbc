"""The three contracts. Whatever satisfies them goes through the same rounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from .config import RunConfig
from .types import Batch, Denoised, Draw, Example, Group, Modality, Phase, Prompt, RoundReport, Sample


@runtime_checkable
class Policy(Protocol):
    """A model being aligned. `log_prob` and `denoised` (below) may be missing."""

    modality: Modality
    passes: int
    """Rows that went through the denoiser (tokens, for text) since the policy was made, those with gradients three
    times; the ledger reads it."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        guidance_scale: float | None = None,
        noise_level: float | None = None,
    ) -> list[Sample]:
        """One sample for each prompt and seed. The same prompt and seed give the same sample in any batch size on
        the same machine, up to the rounding of batched arithmetic. `guidance_scale` replaces the configured one.
        With a `noise_level` every step is Gaussian and the samples keep their trajectories."""
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

    def export(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the adapter to the folder `path` in the format that the model's own library loads in one line, with
        `metadata` where the format has room for it. Raises WeightsError where what was written is not the adapter."""
        ...

    def fingerprint(self) -> str:
        """A short hash that tells this base model from another one."""
        ...


@runtime_checkable
class Reward(Protocol):
    """Judges samples; higher is better."""

    name: str

    @property
    def modality(self) -> Modality | None:
        """What it judges; None for whatever the samples hold."""
        ...

    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B] on the CPU, NaN for a sample that could not be judged (never 0 for a failure)."""
        ...


class Writer(Protocol):
    """Writes the prompts of a round."""

    def __call__(self, openings: Sequence[Prompt], *, round: int) -> list[Prompt]:
        """Distinct prompts, at most one from each opening: a function of the openings and the round. Raises DataError
        where there are none."""
        ...


class GivesLogProb(Policy, Protocol):
    """A policy whose steps or tokens have a likelihood: what policy gradients need."""

    log_prob_rounding: float
    """How far, by rounding alone, the ratio of densities may be from 1 right after sampling."""

    def log_prob(self, samples: Sequence[Sample], steps: Sequence[int | None]) -> torch.Tensor:
        """Log-probabilities of what was sampled, float32 [B, T], with gradients: of one denoising step of each sample,
        T = 1, the mean over the latent dimensions; of the tokens of each completion, whose step is None, at its
        temperature, and 0 beyond its end. Right after sampling they are `Batch.sampled_log_prob`."""
        ...


class GivesTokenLogProb(Policy, Protocol):
    """A policy whose samples are made of tokens: what losses that weight them one by one need."""

    def token_log_prob(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Log-probabilities of the tokens at temperature 1, float32 [B, T], with gradients; 0 beyond the end of a
        completion. Their sum is minus `error`."""
        ...


class GivesValue(GivesLogProb, Protocol):
    """A policy with a value head, whose completions keep `value_T` and `reference_log_prob_T`: what PPO needs."""

    def log_prob_and_value(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """`log_prob` of the tokens of each completion and, of the same pass, what the head expects of the rewards
        before each token; both float32 [B, T], with gradients, 0 beyond its end. Right after sampling they are those
        that the completion keeps."""
        ...


class GivesDenoised(Policy, Protocol):
    """A policy that says what it takes noised latents for: what forward-process losses need."""

    def denoised(self, samples: Sequence[Sample], draw: Draw) -> Denoised: ...


class Algorithm(ABC):
    """How scored samples become a loss: `select` says what is trained on, `loss` how. An algorithm is a subclass, and
    overrides the rest where it is not like RAFT."""

    needs: tuple[str, ...] = ()
    """Methods that the policy must have beside those that all have: `log_prob`, `denoised`, ..."""
    needs_log_ratio: bool = False
    """Whether selection reads `Scored.log_ratio`."""
    noise_level: float | None = None
    """What to sample with where the trajectories are needed: 1 for DDIM's eta, about 0.7 for flow matching."""
    samples: bool = True
    """Whether it draws samples of the policy; without, it trains on the user's own data alone."""
    pairs: bool = False
    """Whether the user's own data are preferences rather than pictures with captions."""
    scores_data: bool = False
    """Whether the user's own data are scored and selected from like the round's samples."""

    def validate(self, config: RunConfig) -> None:
        """Raise ConfigError where the settings of a run do not fit the algorithm."""
        return None

    def phase(self, round: int, reports: Sequence[RoundReport]) -> Phase:
        """What the round is, after what the earlier ones (and the base, as round 0) reported."""
        return Phase(grown=round)

    @abstractmethod
    def select(self, groups: Sequence[Group], *, round: int, seed: int, phase: Phase) -> list[Example]:
        """What to train on. A function of its arguments; none is a round without training."""

    @abstractmethod
    def loss(self, policy: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Per-sample losses [B] with gradients, and metrics [B] to log."""
