"""Rewards over samples: failures found, contained and counted, and the rewards combined into the one that counts.

A failure is never a score: a sample that a reward could not judge has no value for it, and no combined reward.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from accelerate import Accelerator

from .batches import Batches
from .config import Combine, RunConfig
from .errors import ConfigError, ScoringError
from .interrupts import StopRequest
from .objectives import STD_FLOOR, below_floors, moments, scalarize
from .prompts import sample_seed
from .protocols import Policy, Reward
from .store import SampleStore
from .types import Draw, Group, Moments, RoundReport, Sample, Scored

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called after each batch with the reward's name, the samples done and the samples in all."""


@dataclass(frozen=True, kw_only=True)
class WeightedReward:
    """A reward and its weight in the combination; weight 0 scores it and keeps the values, to watch.

    WeightedReward(reward=ClipReward(), weight=0.5)
    """

    reward: Reward
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Combination:
    """How the raw values of several rewards become the one that selection ranks by.

    Combination(weights={"clip": 1.0, "aesthetic": 0.5}, how="worst-case", floors={"clip": 24.0})
    """

    weights: Mapping[str, float]
    how: Combine = "standardized"
    floors: Mapping[str, float] = field(default_factory=dict)
    """Reward to the raw value below which a sample ranks below all that miss no floor; above which, where the weight
    is negative."""
    moments: Mapping[str, Moments] = field(default_factory=dict)
    """What all but `sum` and `standardized` standardize by; the samples' own where there are none."""


def combination(config: RunConfig, reports: Sequence[RoundReport], *, grown: int) -> Combination:
    """How a run combines the rewards of the samples of the round `grown`, by what it has reported: the base's levels,
    and the running statistics as they were then."""
    base = reports[0].evaluations[0].metrics if reports and reports[0].evaluations else {}
    levels = {reward.reported_name: reward.floor for reward in config.rewards if reward.floor is not None}
    return Combination(
        weights={reward.reported_name: reward.weight for reward in config.rewards},
        how=config.combine,
        floors={
            name: base[name].mean if level == "base" else level
            for name, level in levels.items()
            if level != "base" or name in base
        },
        moments=next((report.moments for report in reports if report.phase.grown == grown), {}),
    )


def score(
    samples: Sequence[Sample],
    rewards: Sequence[WeightedReward],
    *,
    combine: Combine = "standardized",
    batch_size: int = 32,
    max_failed: float = 0.25,
    progress: Progress | None = None,
) -> list[Scored]:
    """The samples of one round with their rewards, in their order: `score_parts` for each reward, then `combined`.

    Raises:
        ConfigError: rewards that share a name, no reward with a weight, one for the wrong modality.
        ScoringError: a reward failed on more than the share `max_failed` of the samples that are not flawed.
    """
    weights = check_rewards(rewards)
    values = {
        weighted.reward.name: score_parts(
            samples, weighted.reward, batch_size=batch_size, max_failed=max_failed, progress=progress
        )
        for weighted in rewards
    }
    return combined(samples, values, Combination(weights=weights, how=combine))


def check_rewards(rewards: Sequence[WeightedReward]) -> dict[str, float]:
    """Name to weight of the rewards.

    Raises:
        ConfigError: rewards that share a name, or no reward with a weight.
    """
    names = [weighted.reward.name for weighted in rewards]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two rewards are named {name!r}; give each its own name")
    if not any(weighted.weight for weighted in rewards):
        raise ConfigError("no reward has a weight other than 0: there is nothing to rank samples by")
    return {weighted.reward.name: weighted.weight for weighted in rewards}


def combined(samples: Sequence[Sample], values: Mapping[str, torch.Tensor], how: Combination) -> list[Scored]:
    """Samples with their raw values [N] by reward name, and the reward that selection ranks by.

    `sum` is the weighted sum of the raw values. `standardized` takes each reward's mean and deviation over the round
    out of it first, so that one on a scale of 100 does not drown one on a scale of 1; the others of `Combine` do so
    with those of all rounds so far, then apply their formula. A sample is without a combined reward where it is flawed
    or where a reward with a weight failed on it.
    """
    objectives = {
        name: weight * _standardized(values[name], how, name) for name, weight in how.weights.items() if weight
    }
    scored = [
        Scored(
            sample=sample,
            parts=(parts := _present({name: value_N[i].item() for name, value_N in values.items()})),
            reward=scalarize(z := _present({n: z_N[i].item() for n, z_N in objectives.items()}), how.weights, how.how),
            log_ratio=sample.completion.log_ratio if sample.completion else 0.0,
            objectives=z,
            missed=_missed(parts, how),
        )
        for i, sample in enumerate(samples)
    ]
    reward_N = below_floors([s.reward for s in scored], [bool(s.missed) for s in scored])
    return [replace(s, reward=reward) for s, reward in zip(scored, reward_N, strict=True)]


def warn_of_constants(values: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> None:
    """Say which of the rewards with a weight is the same for all samples of a round: it cannot choose among them."""
    for name, value_N in values.items():
        present_N = value_N[~value_N.isnan()]
        if weights[name] and len(present_N) > 1 and present_N.min() == present_N.max():
            logger.warning(
                "reward %r is %g for each of the round's %d samples: it chooses none of them",
                *(name, present_N[0], len(present_N)),
            )


def _standardized(value_N: torch.Tensor, how: Combination, name: str) -> torch.Tensor:
    if how.how == "sum":
        return value_N.double()
    if how.how == "standardized" or name not in how.moments:
        return standardize(value_N)
    return standardize(value_N, how.moments[name])


def _missed(parts: Mapping[str, float], how: Combination) -> tuple[str, ...]:
    """The rewards whose floor is missed; one that failed has shown no level."""

    def reaches(name: str, floor: float) -> bool:
        if name not in parts:
            return False
        return parts[name] <= floor if how.weights.get(name, 0.0) < 0 else parts[name] >= floor

    return tuple(name for name, floor in how.floors.items() if not reaches(name, floor))


def standardize(value_N: torch.Tensor, reference: Moments | None = None) -> torch.Tensor:
    """The values less the mean, over the deviation (at least STD_FLOOR), of `reference` or else of themselves,
    float64 [N]; NaN is left out of both and stays NaN."""
    of = reference or moments(value_N)
    return (value_N.double() - of.mean) / max(of.deviation, STD_FLOOR)


def score_stored(
    samples: Sequence[Sample],
    reward: Reward,
    *,
    store: SampleStore,
    round: int,
    batch_size: int,
    max_failed: float,
    accelerator: Accelerator,
    stop: StopRequest,
    progress: Progress | None = None,
) -> torch.Tensor:
    """`score_parts`, shared out over the processes and kept: what the store has of this reward is not scored again,
    and all processes return the values of all samples. Stored failures are asked about again only where they are
    more than `max_failed` allows: in a run that stopped for them, and whose reward may have been mended since."""
    stop.check()
    judged = [sample for sample in samples if sample.flaw is None]
    known = store.read_scores(round).get(reward.name, {})
    part = store.next_score_part(round, reward.name) + accelerator.process_index
    accelerator.wait_for_everyone()  # no process writes before all have read
    if _count_failed(judged, known) > max_failed * len(judged):
        known = _present(known)
    missing = [sample for sample in judged if sample.id not in known]
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    error: Exception | None = None
    if mine:
        value_B, error = _judge(mine, reward, batch_size, progress)
        store.write_scores(round, part, reward.name, [sample.id for sample in mine], value_B.tolist())
    accelerator.wait_for_everyone()
    if missing:
        known = store.read_scores(round).get(reward.name, {})
        _check_failures(reward, _count_failed(judged, known), len(judged), max_failed, error)
    return torch.tensor([known.get(sample.id, math.nan) for sample in samples])


def _count_failed(samples: Sequence[Sample], known: Mapping[str, float]) -> int:
    return sum(math.isnan(known.get(sample.id, 0.0)) for sample in samples)


@torch.no_grad()
def with_log_ratio(
    scored: Sequence[Scored],
    policy: Policy,
    *,
    seed: int,
    round: int,
    batch_size: int,
    stop: StopRequest,
    fixed: bool = False,
) -> list[Scored]:
    """The scored samples with an estimate of log p_current / p_reference: how much smaller the current policy's error
    is than the reference's, on the same noise and timesteps.

    For text the error is the negative log-likelihood and this is the log-ratio itself. For images it is a difference
    of surrogates of evidence lower bounds, on a scale of its own: choose `kl_beta` by what it changes.

    Args:
        fixed: whether batches must not shrink where memory runs out, as of `Batches`.
    """
    ratios: list[float] = []
    samples = [s.sample for s in scored]
    batches = Batches(batch_size, "images at once (sampling.batch_size)", "set model.dtype: bf16", fixed=fixed)
    for start in range(0, len(samples), batch_size):
        stop.check()
        batch = samples[start : start + batch_size]
        draw = policy.draw(batch, torch.Generator().manual_seed(sample_seed(seed, round, "log-ratio", start)))
        draw = replace(draw, dropped_B=torch.zeros_like(draw.dropped_B))
        ratios += batches.run(len(batch), partial(_log_ratio, policy, batch, draw))
    return [replace(s, log_ratio=ratio) for s, ratio in zip(scored, ratios, strict=True)]


def _log_ratio(policy: Policy, samples: Sequence[Sample], draw: Draw, rows: slice) -> list[float]:
    current_B = policy.error(samples[rows], draw.rows(rows))
    with policy.reference():
        reference_B = policy.error(samples[rows], draw.rows(rows))
    return (reference_B - current_B).tolist()


def by_prompt(scored: Sequence[Scored]) -> list[Group]:
    """The samples of each prompt, prompts and samples in the order in which they come."""
    groups: dict[str, list[Scored]] = {}
    for s in scored:
        groups.setdefault(s.sample.prompt.id, []).append(s)
    return [Group(prompt=members[0].sample.prompt, samples=tuple(members)) for members in groups.values()]


def stored(store: SampleStore, round: int, how: Combination) -> list[Scored]:
    """A round's samples with their rewards as the store has them; none where they were not scored."""
    samples, scores = store.read_samples(round), store.read_scores(round)
    values = {name: torch.tensor([of.get(s.id, math.nan) for s in samples]) for name, of in scores.items()}
    return combined(samples, values, how) if values else []


def score_parts(
    samples: Sequence[Sample],
    reward: Reward,
    *,
    batch_size: int = 32,
    max_failed: float = 0.25,
    progress: Progress | None = None,
) -> torch.Tensor:
    """One reward's raw value for each sample, float32 [N] on the CPU, NaN where there is none.

    Flawed samples are not shown to the reward. A batch on which it raises is tried again one sample at a time, so
    that one bad sample costs only itself; a sample on which it raises, or to which it gives NaN or infinity, has
    failed.

    Raises:
        ConfigError: the reward judges another modality than the samples have, or says itself that it is set up wrong.
        ScoringError: more than the share `max_failed` of the samples that are not flawed failed.
    """
    judged = [i for i, sample in enumerate(samples) if sample.flaw is None]
    value_N = torch.full((len(samples),), math.nan)
    value_N[judged], error = _judge([samples[i] for i in judged], reward, batch_size, progress)
    _check_failures(reward, int(value_N[judged].isnan().sum()), len(judged), max_failed, error)
    return value_N


def _judge(
    samples: Sequence[Sample], reward: Reward, batch_size: int, progress: Progress | None
) -> tuple[torch.Tensor, Exception | None]:
    """The values of samples that are not flawed, NaN where the reward failed, and its first error if it raised."""
    _check_modality(samples, reward)
    errors: list[Exception] = []

    def judge(rows: slice) -> list[float]:
        values = _score_or_fail(samples[rows], reward, errors)
        if progress is not None:
            progress(reward.name, rows.stop, len(samples))
        return values

    batches = Batches(
        batch_size,
        f"images for reward {reward.name!r} at once (sampling.batch_size)",
        "where the reward has such options, set `device: cpu` or `dtype: bf16`",
    )
    value_N = torch.tensor(batches.run(len(samples), judge))
    value_N[~value_N.isfinite()] = math.nan
    return value_N, errors[0] if errors else None


def _score_or_fail(samples: Sequence[Sample], reward: Reward, errors: list[Exception]) -> list[float]:
    """The reward's values, NaN where it raised even for the sample alone; what it raised then goes to `errors`."""
    try:
        return _score_batch(samples, reward).tolist()
    except (ConfigError, ScoringError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a scorer is anyone's code
        if len(samples) == 1:
            errors.append(error)
            return [math.nan]
    return [value for sample in samples for value in _score_or_fail([sample], reward, errors)]


def _check_failures(reward: Reward, failed: int, asked: int, max_failed: float, error: Exception | None) -> None:
    """Raise ScoringError if more than the share `max_failed` of the samples that were asked about failed."""
    if not failed:
        return
    cause = f"{type(error).__name__}: {error}" if error else "its values were NaN or infinite"
    message = f"reward {reward.name!r} failed on {failed} of {asked} samples ({cause})"
    if failed > max_failed * asked:
        raise ScoringError(
            f"{message}; at most the share {max_failed:g} may fail (max_failed): mend the reward, or resume with a"
            " higher share"
        ) from error
    logger.warning("%s; they are left out", message)


def _score_batch(samples: Sequence[Sample], reward: Reward) -> torch.Tensor:
    value_B = reward.score(samples)
    if value_B.shape != (len(samples),):
        raise ValueError(f"it returned shape {list(value_B.shape)} for {len(samples)} samples, not [{len(samples)}]")
    return value_B.detach().to("cpu", torch.float32)


def _check_modality(samples: Sequence[Sample], reward: Reward) -> None:
    for sample in samples if reward.modality else ():
        if (sample.image if reward.modality == "image" else sample.text) is None:
            raise ConfigError(
                f"reward {reward.name!r} judges {reward.modality}, but sample {sample.id} has none; choose a reward"
                " for what the model generates"
            )


def _present(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in parts.items() if not math.isnan(value)}
