"""How good a model is on held-out prompts: rewards, diversity, paired gains over the base, and a watch over both.

Every model is evaluated on the same prompts and seeds, so that a gain is a mean of paired differences, and its
interval is over prompts: two seeds of one prompt are not two independent observations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.spatial.distance import pdist
from scipy.stats import bootstrap

from .errors import DataError
from .types import Evaluation, Interval, Sample

RESAMPLES = 4999
PIXEL_SIDE = 32
LEAST_DIVERSITY = 0.5  # of the base model's; below it a run counts as collapsed

Embed = Callable[[Sequence[Sample]], torch.Tensor]
"""Samples to one feature vector each, float [B, D]."""


def paired_interval(values: np.ndarray | Sequence[float], clusters: Sequence[str] | None = None) -> Interval:
    """The mean with its 95% interval by the BCa bootstrap (Efron, 1987), the same for the same values.

    Args:
        values: [N], of one model or paired differences of two. NaN stands for a missing value and is dropped.
        clusters: [N], which prompt each value belongs to. Values are averaged within a prompt, and prompts are
            resampled. None takes every value as independent.

    Returns:
        The mean over prompts; `count` is the number of prompts (of values, without `clusters`). The interval is the
        mean itself for a single prompt or where all are equal, and everything is NaN where nothing is left.
    """
    value_B = np.asarray(values, dtype=np.float64)
    present = ~np.isnan(value_B)
    units = value_B[present]
    if clusters is not None:
        names = np.asarray(clusters)
        assert names.shape == value_B.shape
        _, index = np.unique(names[present], return_inverse=True)
        units = np.bincount(index, weights=units) / np.bincount(index)
    if len(units) == 0:
        return Interval(mean=math.nan, low=math.nan, high=math.nan, count=0)
    mean = float(units.mean())
    # The means of equal values differ in their last bit, hence not `== 0`.
    if np.ptp(units) <= 1e-12 * np.abs(units).max():
        return Interval(mean=mean, low=mean, high=mean, count=len(units))
    interval = bootstrap(
        (units,), np.mean, n_resamples=RESAMPLES, batch=500, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    return Interval(mean=mean, low=float(interval.low), high=float(interval.high), count=len(units))


def pixel_features(samples: Sequence[Sample]) -> torch.Tensor:
    """Pictures averaged down to 32x32 pixels of 0 to 1, float32 [K, 3072]."""
    return torch.stack([_small(s.image).flatten() for s in samples if s.image is not None])


def _small(image: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(image.float() / 255, PIXEL_SIDE)


def pairwise_distance(feature_KD: torch.Tensor, metric: Literal["rms", "cosine"]) -> float:
    """The mean distance over all pairs of rows; NaN for fewer than two rows.

    `rms` is the root mean square difference along D; `cosine` is one minus the cosine, 0 to 2.
    """
    if len(feature_KD) < 2:
        return math.nan
    rows = feature_KD.double().numpy()
    if metric == "cosine":
        return float(pdist(rows, "cosine").mean())
    return float(pdist(rows, "euclidean").mean() / math.sqrt(rows.shape[1]))


def diversity(samples_by_prompt: Sequence[Sequence[Sample]], embed: Embed | None = None) -> list[float]:
    """How far apart the samples of one prompt are, for each prompt, [P]; 0 where they are all the same.

    One minus the cosine between embeddings with `embed`, else the root mean square difference of pixels (0 to 1) at
    32x32. Flawed samples do not count; NaN for a prompt with fewer than two others, and for texts without `embed`.
    """
    return [_spread([s for s in samples if s.flaw is None], embed) for samples in samples_by_prompt]


def _spread(samples: Sequence[Sample], embed: Embed | None) -> float:
    if len(samples) < 2:
        return math.nan
    if embed is not None:
        return pairwise_distance(embed(samples).detach().cpu(), "cosine")
    if any(s.image is None for s in samples):
        return math.nan
    return pairwise_distance(pixel_features(samples), "rms")


def measure(
    samples: Sequence[Sample],
    values: Mapping[str, torch.Tensor],
    *,
    guidance_scale: float,
    base: Evaluation | None = None,
    embed: Embed | None = None,
) -> Evaluation:
    """One model's samples on the held-out prompts and seeds, summed up and compared with the base model's.

    Args:
        samples: [N], in the order of prompt, then seed: the same prompts and seeds for the base and every later model.
        values: each reward's value by its name, [N], NaN for a sample that is flawed or could not be judged.
        guidance_scale: that the samples were drawn at; 1 is without guidance.
        base: the base model's evaluation at the same guidance scale; the gains are over it.
        embed: what diversity is measured with, see `diversity`.

    Returns:
        A metric for each reward, and `diversity` where some prompt has two samples that can be compared. `failed`
        counts the samples that lack a value.

    Raises:
        DataError: `base` holds another number of samples or another guidance scale.
    """
    if base is not None:
        _check_base(base, len(samples), guidance_scale)
    per_sample = {name: value_N.tolist() for name, value_N in values.items()}
    assert all(len(column) == len(samples) for column in per_sample.values())
    failed = sum(any(math.isnan(column[i]) for column in per_sample.values()) for i in range(len(samples)))
    clusters = [sample.prompt.id for sample in samples]
    spread = _diversity_per_sample(samples, clusters, embed)
    if not all(math.isnan(value) for value in spread):
        per_sample["diversity"] = spread
    return Evaluation(
        guidance_scale=guidance_scale,
        metrics={name: paired_interval(column, clusters) for name, column in per_sample.items()},
        gains={} if base is None else _gains(per_sample, base.per_sample, clusters),
        per_sample={name: tuple(column) for name, column in per_sample.items()},
        failed=failed,
    )


def _check_base(base: Evaluation, count: int, guidance_scale: float) -> None:
    counts = {len(values) for values in base.per_sample.values()}
    if counts - {count}:
        raise DataError(
            f"the base was evaluated on {max(counts - {count})} samples and this model on {count}: "
            "a paired gain needs the same prompts and seeds; evaluate the base again"
        )
    if base.guidance_scale != guidance_scale:
        raise DataError(
            f"the base was evaluated at guidance scale {base.guidance_scale:g} and this model at {guidance_scale:g}: "
            "compare evaluations at the same scale"
        )


def _diversity_per_sample(samples: Sequence[Sample], clusters: Sequence[str], embed: Embed | None) -> list[float]:
    """Its prompt's diversity for each sample, which keeps it parallel to the rewards; NaN for the flawed ones."""
    groups: dict[str, list[Sample]] = {}
    for sample, cluster in zip(samples, clusters, strict=True):
        groups.setdefault(cluster, []).append(sample)
    of_prompt = dict(zip(groups, diversity(list(groups.values()), embed), strict=True))
    return [
        of_prompt[cluster] if sample.flaw is None else math.nan
        for sample, cluster in zip(samples, clusters, strict=True)
    ]


def _gains(
    per_sample: Mapping[str, Sequence[float]], base: Mapping[str, Sequence[float]], clusters: Sequence[str]
) -> dict[str, Interval]:
    return {
        name: paired_interval(np.asarray(values) - np.asarray(base[name]), clusters)
        for name, values in per_sample.items()
        if name in base
    }


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a run's evaluations say about it.

    Verdict(kind="over-optimized", message="Over-optimized: clip still rises, but oracle has ...", best=3)
    """

    kind: Literal["healthy", "plateau", "over-optimized", "collapsed"]
    message: str
    """One plain sentence."""
    best: int
    """The place in the history of the model to keep: the highest trained reward among the evaluations that are
    neither over-optimized nor collapsed. 0 is the base."""


def verdict(
    history: Sequence[Evaluation],
    *,
    trained: str,
    held_out: Sequence[str] = (),
    patience: int = 3,
    least_diversity: float = LEAST_DIVERSITY,
) -> Verdict:
    """Tell progress from reward hacking, by the last evaluation against those before it.

    - collapsed: diversity is under `least_diversity` of the base's;
    - over-optimized: every held-out reward is below its own best by more than the half-width of its interval, while
      the trained reward has risen since (Gao et al., 2210.10760);
    - plateau: in the last `patience` evaluations the trained reward has not risen above what it was before by more
      than the half-width of its interval;
    - healthy: none of these.

    The half-width is that of the paired gain, which leaves out how much prompts differ from each other.

    Args:
        history: the base first, then the evaluations of the run in order, all at one guidance scale.
        trained: the metric that training raises.
        held_out: the rewards that training does not see.
    """
    assert history
    unsound = [_unsound(history[: i + 1], trained, held_out, least_diversity) for i in range(len(history))]
    keepable = [i for i, found in enumerate(unsound) if found is None and not math.isnan(_mean(history[i], trained))]
    best = max(keepable, key=lambda i: _mean(history[i], trained), default=0)
    if (found := unsound[-1]) is not None:
        kind, message = found
        return Verdict(kind=kind, message=message, best=best)
    if len(history) == 1:
        return Verdict(kind="healthy", message="Only the base model has been evaluated so far.", best=best)
    if len(history) > patience:
        before = max(_mean(e, trained) for e in history[:-patience])
        rise = max(_mean(e, trained) for e in history[-patience:]) - before
        if rise <= _half_width(history[-1], trained):
            message = f"Plateau: {trained} has not risen beyond its uncertainty for {patience} evaluations."
            return Verdict(kind="plateau", message=message, best=best)
    return Verdict(kind="healthy", message=_healthy(history[-1], trained, held_out), best=best)


def _unsound(
    history: Sequence[Evaluation], trained: str, held_out: Sequence[str], least_diversity: float
) -> tuple[Literal["over-optimized", "collapsed"], str] | None:
    base, last = history[0], history[-1]
    share = _mean(last, "diversity") / (_mean(base, "diversity") or math.nan)
    if share < least_diversity:
        return "collapsed", f"Collapsed: diversity has fallen to {share:.0%} of the base model's."
    peaks = {name: _peak(history, name) for name in held_out}
    fallen = [name for name, peak in peaks.items() if _mean(last, name) < _mean(peak, name) - _half_width(last, name)]
    risen = all(_mean(last, trained) > _mean(peak, trained) for peak in peaks.values())
    if not held_out or len(fallen) < len(held_out) or not risen:
        return None
    names = " and ".join(fallen)
    have = "has" if len(fallen) == 1 else "have"
    return "over-optimized", (
        f"Over-optimized: {trained} still rises, but {names}, not trained on, {have} fallen from the best by more "
        "than the uncertainty."
    )


def _healthy(last: Evaluation, trained: str, held_out: Sequence[str]) -> str:
    sentence = f"{trained[0].upper()}{trained[1:]} {_moved(last, trained)}"
    if (gain := last.gains.get(trained)) is not None and gain.excludes_zero:
        sentence += f" by {abs(gain.mean):.3g} (95% interval {gain.low:.3g} to {gain.high:.3g})"
    if held_out:
        sentence += f"; of the rewards not trained on, {', '.join(f'{name} {_moved(last, name)}' for name in held_out)}"
    return f"{sentence}."


def _moved(evaluation: Evaluation, name: str) -> str:
    gain = evaluation.gains.get(name)
    if gain is None or not gain.excludes_zero:
        return "cannot be told from the base model's"
    return f"is {'above' if gain.mean > 0 else 'below'} the base model's"


def _mean(evaluation: Evaluation, name: str) -> float:
    return evaluation.metrics[name].mean if name in evaluation.metrics else math.nan


def _peak(history: Sequence[Evaluation], name: str) -> Evaluation:
    return max((e for e in history if not math.isnan(_mean(e, name))), key=lambda e: _mean(e, name), default=history[0])


def _half_width(evaluation: Evaluation, name: str) -> float:
    interval = evaluation.gains.get(name) or evaluation.metrics.get(name)
    return math.nan if interval is None else (interval.high - interval.low) / 2
