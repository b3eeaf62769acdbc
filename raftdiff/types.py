"""What flows through a round, stage by stage. Frozen, keyword-only; nothing is written back.

Prompt -> Sample -> Scored, Group -> TrainingSet -> RoundReport
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt. `metadata` is whatever came with it in its file (GenEval tags, say).

    >>> Prompt(text="a red circle").id
    '92d5b0dc8f6a'
    """

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The same text has the same id in every run: 12 hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One output for a prompt.

    Sample(id="0003-1f00fe3b9a52-05", prompt=Prompt(text="a red circle"), seed=8243721, image=<uint8 [3, 32, 32]>,
           latents=<float32 [16, 8, 8]>)
    """

    id: str
    """`round-prompt-k`, unique in a run."""
    prompt: Prompt
    seed: int
    """Of the noise that the sample began with."""
    image: torch.Tensor | None = None
    """uint8 [3, height, width], RGB, on the CPU."""
    latents: torch.Tensor | None = None
    """x_0 as the scheduler's last step left it, float32, in the layout the pipeline denoises in, on the CPU."""
    text: str | None = None
    """The completion, from a language model."""
    flaw: str | None = None
    """Why the sample must not be scored or trained on (a black image), or None."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A sample with its rewards.

    Scored(sample=<Sample>, parts={"clip": 27.1, "aesthetic": 5.4}, reward=1.31)
    """

    sample: Sample
    parts: Mapping[str, float]
    """The raw value of each reward; one that failed is absent."""
    reward: float | None
    """The combined reward that selection ranks by; None where a part that it needs failed."""
    log_ratio: float = 0.0
    """An estimate of log p_current(sample) / p_reference(sample), where the algorithm asked for it."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The samples of one prompt in one round, in the order of k. Those without a reward stay, for the count."""

    prompt: Prompt
    samples: tuple[Scored, ...]

    @property
    def ranked(self) -> list[Scored]:
        """Those that have a reward, in the order of k."""
        return [s for s in self.samples if s.reward is not None]


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """What selection hands to training: samples, each with a weight on its loss.

    TrainingSet(samples=(<Sample>, <Sample>), weights=(1.0, 1.0))
    """

    samples: tuple[Sample, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.samples) == len(self.weights)

    def __len__(self) -> int:
        return len(self.samples)

    @classmethod
    def uniform(cls, samples: Sequence[Sample]) -> TrainingSet:
        return cls(samples=tuple(samples), weights=(1.0,) * len(samples))

    def __add__(self, other: TrainingSet) -> TrainingSet:
        return TrainingSet(samples=self.samples + other.samples, weights=self.weights + other.weights)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The chance of one training step, drawn apart from the model so that policy and reference, winner and loser,
    and any number of processes can share it. All on the CPU; the first axis is the batch."""

    noise: torch.Tensor
    """float32, the shape of the latents, [B, ...]"""
    quantile_B: torch.Tensor
    """float32 in [0, 1): where in the distribution of timesteps each row's timestep lies."""
    dropped_B: torch.Tensor
    """bool: rows trained on the empty prompt instead of their own, so that guidance keeps working."""

    def rows(self, index: slice | Sequence[int]) -> Draw:
        return Draw(noise=self.noise[index], quantile_B=self.quantile_B[index], dropped_B=self.dropped_B[index])


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95% confidence interval.

    Interval(mean=0.42, low=0.31, high=0.55, count=128)
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model on the held-out prompts and seeds, at one guidance scale.

    Evaluation(guidance_scale=1.0, metrics={"reward": Interval(...)}, gains={"reward": Interval(...)},
               per_sample={"reward": (...)}, failed=0)
    """

    guidance_scale: float
    metrics: Mapping[str, Interval]
    gains: Mapping[str, Interval]
    """Paired differences from the base model on the same prompts and seeds; empty for the base itself."""
    per_sample: Mapping[str, tuple[float, ...]]
    """The values behind `metrics`, in the order of prompt, then seed; NaN where a sample failed."""
    failed: int


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One line of the ledger: a stage's wall-clock seconds, and the denoiser passes it took (one row through the
    denoiser once is one pass; for language models, one token)."""

    stage: str
    seconds: float
    passes: int


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """What one round did, as it is written to metrics.jsonl.

    Always `requested == scored + failed + skipped`: a flawed sample is skipped, one that a reward could not score
    has failed.
    """

    round: int
    requested: int
    scored: int
    failed: int
    skipped: int
    selected: int
    rewards: Mapping[str, float]
    """Mean over the round's samples of the combined reward, of each part, and of the best of each group."""
    training: Mapping[str, float]
    """Mean loss and gradient norm, optimiser steps, learning rate."""
    evaluations: tuple[Evaluation, ...] = ()
    ledger: tuple[StageCost, ...] = ()
