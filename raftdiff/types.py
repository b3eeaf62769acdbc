"""What flows through a round, stage by stage. Frozen, keyword-only; nothing is written back.

Prompt -> Sample -> Scored, Group -> Example, Batch -> RoundReport
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from .errors import DataError

Modality = Literal["image", "text"]


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
class Trajectory:
    """How a stochastic sampler came to a sample: each step is Gaussian around what the model predicted.

    Trajectory(states=<float32 [11, 16, 8, 8]>, times=<float32 [11]>, log_prob_T=<float32 [10]>, noise_level=1.0)
    """

    states: torch.Tensor
    """x at every step, float32 [T + 1, ...], from noise to x_0, on the CPU."""
    times: torch.Tensor
    """The training timestep of each state, float32 [T + 1], as the pipeline hands it to its denoiser."""
    log_prob_T: torch.Tensor
    """Log-density of each step under the model that sampled, mean over the latent dimensions, float32 [T]."""
    noise_level: float
    """How much noise the steps added: eta of DDIM, a of the flow-matching SDE."""
    guidance_scale: float = 1.0
    """That the steps were predicted with."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a language model wrote, token by token. All tensors are on the CPU.

    Completion(tokens_T=<int64 [12]>, log_prob_T=<float32 [12]>, temperature=0.7, finished=True)
    """

    tokens_T: torch.Tensor
    """int64 [T], the end token among them where it ended by itself."""
    log_prob_T: torch.Tensor
    """Of each token under the model that sampled, at `temperature` over the whole vocabulary, float32 [T]."""
    temperature: float = 1.0
    finished: bool = True
    """Whether it ended by itself; False where it was cut off."""
    value_T: torch.Tensor | None = None
    """What the value head expected of the rewards before each token, float32 [T], where there is one."""
    reference_log_prob_T: torch.Tensor | None = None
    """As `log_prob_T`, under the model that training began at, where the value head's algorithm needs it."""

    @property
    def log_ratio(self) -> float:
        """log p(text) - log p_reference(text); 0 where the reference's is not kept."""
        if self.reference_log_prob_T is None:
            return 0.0
        return float((self.log_prob_T - self.reference_log_prob_T).double().sum())


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One output for a prompt.

    Sample(id="0003-1f00fe3b9a52-05", prompt=Prompt(text="a red circle"), seed=8243721, image=<uint8 [3, 32, 32]>,
           latents=<float32 [16, 8, 8]>)
    Sample(id="0003-77ab09d1c2e4-01", prompt=Prompt(text="French: un rond. English:"), seed=8243722, text="a circle",
           completion=<Completion>)
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
    completion: Completion | None = None
    """The tokens of the text."""
    trajectory: Trajectory | None = None
    """The steps that led to it, where the algorithm needs them."""
    flaw: str | None = None
    """Why the sample must not be scored or trained on (a black image), or None."""

    @property
    def steps(self) -> list[int | None]:
        """What of the sample is one row of policy-gradient training: each denoising step that has a density, or all
        tokens of a completion at once."""
        if self.trajectory is None:
            return [None]
        return self.trajectory.log_prob_T.isfinite().nonzero().flatten().tolist()

    def log_prob_T(self, step: int | None) -> torch.Tensor:
        """Log-probabilities under the model that sampled, float32 [T]: of one denoising step, T = 1, or of the tokens.

        Raises:
            DataError: it was sampled without.
        """
        if step is not None and self.trajectory is not None:
            return self.trajectory.log_prob_T[step : step + 1]
        if step is None and self.completion is not None:
            return self.completion.log_prob_T
        raise DataError(f"sample {self.id} has no log-probabilities; sample it anew")


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
    objectives: Mapping[str, float] = field(default_factory=dict)
    """The rewards that have a weight as they enter the combination: standardized where it does that, times the
    weight, so that higher is better."""
    missed: tuple[str, ...] = ()
    """The rewards whose floor it is below."""


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
class Example:
    """What selection hands to training: one row of its batches.

    Example(sample=<Sample>)                             # trained on
    Example(sample=<Sample>, weight=-0.3, step=4)        # one denoising step of a rollout, with its advantage
    Example(sample=<Sample>, rejected=<Sample>)          # preferred to another one
    Example(sample=<Sample>, advantage_T=<[12]>, return_T=<[12]>)   # a completion, for a model with a value head
    """

    sample: Sample
    weight: float = 1.0
    """On its loss: 1, a normalised weight, an advantage."""
    rejected: Sample | None = None
    """The sample that `sample` is preferred to."""
    step: int | None = None
    """The step of the sample's trajectory; a completion has none."""
    advantage_T: torch.Tensor | None = None
    """Of each token of a completion, float32 [T], where they differ."""
    return_T: torch.Tensor | None = None
    """What the value head should have expected before each token, float32 [T]."""


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
class Batch:
    """Some rows of one training step, as a loss gets them."""

    examples: Sequence[Example]
    weight_B: torch.Tensor
    """float32 [B], the examples' weights on the device of the policy."""
    draw: Draw
    updates: int = 0
    """Optimiser steps since the training on these examples began: at 0 the policy is as it sampled them."""
    averaged: Callable[[], AbstractContextManager[None]] = nullcontext
    """Within it the policy has the moving average of its weights, by which it samples, where there is one."""

    @property
    def samples(self) -> list[Sample]:
        return [example.sample for example in self.examples]

    @property
    def rejected(self) -> list[Sample]:
        """The other side of each pair; only where every example has one."""
        rejected = [example.rejected for example in self.examples if example.rejected is not None]
        assert len(rejected) == len(self.examples)
        return rejected

    @property
    def steps(self) -> list[int | None]:
        """The step of each rollout, None for the whole of a completion."""
        return [example.step for example in self.examples]

    def sampled_log_prob(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`Sample.log_prob_T` of each rollout, `padded`, on the device of the policy: what `log_prob` of the policy was
        when it sampled."""
        log_prob_BT, mask_BT = padded([s.log_prob_T(step) for s, step in zip(self.samples, self.steps, strict=True)])
        return log_prob_BT.to(self.weight_B.device), mask_BT.to(self.weight_B.device)


def padded(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [T] of several lengths as one tensor [B, T], 0 beyond their ends, and the mask of what is theirs, bool."""
    mask_BT = torch.arange(max(map(len, rows))) < torch.tensor([[len(row)] for row in rows])
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True), mask_BT


@dataclass(frozen=True, kw_only=True)
class Denoised:
    """What a denoiser makes of noised latents. All of shape [B, ...], float32, on the device of the policy."""

    x0: torch.Tensor
    """The clean latents that were noised."""
    predicted_x0: torch.Tensor
    """The clean latents that the prediction stands for, with gradients."""
    prediction: torch.Tensor
    """In the model's own terms (noise, v, or flow velocity), with gradients."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What one round is in an algorithm: most sample anew in every round; ReST grows once, then improves several
    times on what it grew.

    Phase(grown=5, improve=2, learning_rate=0.5)         # the third Improve step on the samples of round 5
    """

    grown: int
    """The round whose samples are selected from."""
    improve: int = 0
    """How many earlier rounds selected from the same samples."""
    learning_rate: float = 1.0
    """Factor on the configured learning rate."""
    kl_coefficient: float = 0.0
    """Weight of the penalty for leaving the base model in the rewards of tokens."""


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
class Moments:
    """What running standardization needs of the values that there were.

    Moments(count=512, mean=27.4, variance=2.1)
    """

    count: int
    mean: float
    variance: float
    """Of the population."""

    @property
    def deviation(self) -> float:
        return math.sqrt(self.variance)


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
    modality: Modality = "image"
    """Of the samples. Models of texts know no guidance: the scale is 1."""
    statistics: Mapping[str, Moments] = field(default_factory=dict)
    """Of the pictures, where a sentinel watches the run: plain statistics, how far apart they are from one another
    (`spread`) and, of a trained model, from the base's of the same prompt and seed (`drift`)."""


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """One line of the ledger: a stage's wall-clock seconds, and the denoiser passes it took: one row through the
    denoiser forward is one pass, forward and backward three (for language models, a row is a token)."""

    stage: str
    seconds: float
    passes: int


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """What one round did, as it is written to metrics.jsonl.

    Always `requested == scored + failed + skipped`: a flawed sample is skipped, one that a reward could not score
    has failed. Counts and rewards are of the samples of the round `phase.grown`, without the user's own pictures.
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
    phase: Phase = Phase(grown=0)
    moments: Mapping[str, Moments] = field(default_factory=dict)
    """Of each reward over all samples that the run has scored so far."""
