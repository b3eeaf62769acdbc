"""How good a model is on held-out prompts: rewards, diversity, paired gains over the base, and a watch over both.

Every model is evaluated on the same prompts and seeds, so that a gain is a mean of paired differences, and its
interval is over prompts: two seeds of one prompt are not two independent observations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from scipy.spatial.distance import pdist
from scipy.stats import bootstrap

from .config import EvaluationConfig
from .errors import DataError
from .objectives import STD_FLOOR, moments
from .picture_statistics import STATISTICS
from .types import Evaluation, Interval, Moments, RoundReport, Sample

RESAMPLES = 4999
PIXEL_SIDE = 32
LEAST_DIVERSITY = 0.5  # of the base model's; below it a run counts as collapsed
MOST_SHIFT = 0.5  # of the pictures' statistics, where held-out rewards are there and none has risen
MOST_SHIFT_UNJUDGED = 1.0  # where there are none

Metric = Literal["rms", "cosine", "squared"]
Embed = Callable[[Sequence[Sample]], torch.Tensor]
"""Samples to one feature vector each, float [B, D]. How far these are apart is measured by its `metric`, a `Metric`;
where it has none, by the cosine."""


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


def bigrams(text: str) -> list[tuple[str, str]]:
    """Neighbouring words, without regard to case."""
    return list(pairwise(text.lower().split()))


def distinct_2(texts: Sequence[str]) -> float:
    """Different bigrams among all bigrams of the texts, 0 to 1 (Li et al., arXiv 1510.03055); NaN where none has two
    words. K texts that are all the same have 1 / K of what one has."""
    found = [bigram for text in texts for bigram in bigrams(text)]
    return len(set(found)) / len(found) if found else math.nan


def text_distance(one: str, other: str) -> float:
    """The share of the bigrams of two texts that only one of them has, 0 to 1; of their words, where there are none."""
    a, b = (set[Any](bigrams(text) or text.lower().split()) for text in (one, other))
    return 1 - len(a & b) / len(a | b) if a | b else 0.0


def pairwise_distance(feature_KD: torch.Tensor, metric: Metric) -> float:
    """The mean distance over all pairs of rows; NaN for fewer than two rows.

    `rms` is the root mean square difference along D; `cosine` is one minus the cosine, 0 to 2; `squared` the squared
    distance.
    """
    if len(feature_KD) < 2:
        return math.nan
    rows = feature_KD.double().numpy()
    if metric == "rms":
        return float(pdist(rows, "euclidean").mean() / math.sqrt(rows.shape[1]))
    return float(pdist(rows, "cosine" if metric == "cosine" else "sqeuclidean").mean())


def diversity(samples_by_prompt: Sequence[Sequence[Sample]], embed: Embed | None = None) -> list[float]:
    """How far apart the samples of one prompt are, for each prompt, [P].

    The distance of embeddings with `embed`, else the root mean square difference of pixels (0 to 1) at 32x32: 0 where
    they are all the same. Of texts without `embed`, `distinct_2`. Flawed samples do not count; NaN for a prompt with
    fewer than two others.
    """
    return [_spread([s for s in samples if s.flaw is None], embed) for samples in samples_by_prompt]


def _spread(samples: Sequence[Sample], embed: Embed | None) -> float:
    if len(samples) < 2:
        return math.nan
    if embed is not None:
        return pairwise_distance(embed(samples).detach().cpu(), getattr(embed, "metric", "cosine"))
    if any(s.image is None for s in samples):
        return distinct_2([s.text or "" for s in samples])
    return pairwise_distance(pixel_features(samples), "rms")


def distance(before: Sample, after: Sample) -> float:
    """How far a sample is from another one of the same prompt and seed, 0 to 1: of pictures the root mean square
    difference of pixels at 32x32, of texts `text_distance`; NaN where one of them is flawed."""
    if before.flaw is not None or after.flaw is not None:
        return math.nan
    if before.text is not None and after.text is not None:
        return text_distance(before.text, after.text)
    return float((pixel_features([before]) - pixel_features([after])).square().mean().sqrt())


def picture_moments(samples: Sequence[Sample], base: Sequence[Sample] = ()) -> dict[str, Moments]:
    """What the sentinel watches of pictures: each of `STATISTICS`; `spread`, the distance of each from the one before
    it; and with the base's samples, in the same order, `drift`, the distance from these. Empty for texts."""
    images = [s.image for s in samples if s.image is not None and s.flaw is None]
    if not images:
        return {}
    found = {name: moments(torch.tensor([of(image) for image in images])) for name, of in STATISTICS.items()}
    neighbours = zip(samples, [*samples[-1:], *samples[:-1]], strict=True)
    found["spread"] = moments(torch.tensor([distance(*pair) for pair in neighbours]))
    if base:
        found["drift"] = moments(torch.tensor([distance(*pair) for pair in zip(base, samples, strict=True)]))
    return found


def shifts(base: Evaluation, last: Evaluation) -> dict[str, float]:
    """How far the pictures' statistics have moved from the base's, in deviations of the base's pictures; and `drift`,
    in units of how far the base's pictures are from one another. Empty where they were not measured."""
    found = {
        name: (of.mean - base.statistics[name].mean) / max(base.statistics[name].deviation, STD_FLOOR)
        for name, of in last.statistics.items()
        if name in STATISTICS and name in base.statistics
    }
    if "drift" in last.statistics and "spread" in base.statistics:
        found["drift"] = last.statistics["drift"].mean / max(base.statistics["spread"].mean, STD_FLOOR)
    return found


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
        modality="image" if any(sample.image is not None for sample in samples) else "text",
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


Trend = Literal["rises", "stalls", "falls"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a run's evaluations say about it.

    Verdict(kind="over-optimized", message="Over-optimized: clip still rises, but oracle has ...", best=3)
    """

    kind: Literal["healthy", "plateau", "suspect", "over-optimized", "collapsed"]
    message: str
    """One plain sentence."""
    best: int
    """The place in the history of the model to keep: the highest trained reward among the evaluations that are
    neither over-optimized nor collapsed. 0 is the base."""

    @property
    def alarm(self) -> bool:
        """Whether the reward is being hacked, as far as can be seen: what the sentinel acts on."""
        return self.kind in ("suspect", "over-optimized", "collapsed")


def run_verdict(settings: EvaluationConfig, reports: Sequence[RoundReport], held_out: Sequence[str]) -> Verdict:
    """The verdict on a run by its settings: with `sentinel: rollback`, after an alarm the model to keep is the one with
    the best held-out rewards. At least the base must have been evaluated."""
    history = [report.evaluations[0] for report in reports if report.evaluations]
    found = verdict(history, trained="reward", held_out=held_out, patience=settings.plateau_rounds or 3)
    if settings.sentinel == "rollback" and found.alarm:
        return replace(found, best=best_held_out(history, held_out))
    return found


def best_held_out(history: Sequence[Evaluation], held_out: Sequence[str]) -> int:
    """The place of the trained model with the highest mean of the held-out rewards, each in deviations of the base's
    samples; 0 while the base is alone. The earlier of equals."""

    def level(i: int) -> float:
        gains = [
            (_mean(history[i], name) - _mean(history[0], name))
            / max(moments(torch.tensor(history[0].per_sample[name])).deviation, STD_FLOOR)
            for name in held_out
        ]
        return math.fsum(gains) if gains and not any(map(math.isnan, gains)) else -math.inf

    return max(range(1, len(history)), key=level, default=0)


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
    - suspect: no held-out reward is above the base's beyond its interval, and either one is below it while the trained
      reward is above, or the pictures' statistics have moved by more than `MOST_SHIFT` of the base's deviations; by
      more than `MOST_SHIFT_UNJUDGED` where there are no held-out rewards;
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
    if (suspect := _suspect(history[0], history[-1], trained, held_out)) is not None:
        return Verdict(kind="suspect", message=suspect, best=best)
    level = [_mean(evaluation, trained) for evaluation in history]
    if len(history) > patience and _rise(level, patience) <= _half_width(history[-1], trained):
        message = f"Plateau: {trained} has not risen beyond its uncertainty for {patience} evaluations."
        return Verdict(kind="plateau", message=message, best=best)
    return Verdict(kind="healthy", message=_healthy(history[-1], trained, held_out), best=best)


def trend(history: Sequence[Evaluation], name: str, *, weight: float = 1.0, patience: int = 3) -> Trend:
    """Where a reward goes in evaluations, two at least, the base first: `falls` below its own best, or `rises` in the
    last `patience` above what it was before, by more than the half-width of its interval; else it `stalls`. With a
    negative `weight`, less is better."""
    level = [math.copysign(1, weight) * _mean(evaluation, name) for evaluation in history]
    half_width = _half_width(history[-1], name)
    if level[-1] < max(level) - half_width:
        return "falls"
    return "rises" if _rise(level, min(patience, len(level) - 1)) > half_width else "stalls"


def _rise(level: Sequence[float], patience: int) -> float:
    return max(level[-patience:]) - max(level[:-patience])


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


def _suspect(base: Evaluation, last: Evaluation, trained: str, held_out: Sequence[str]) -> str | None:
    gains = {name: last.gains[name] for name in held_out if name in last.gains}
    if any(gain.low > 0 for gain in gains.values()):
        return None
    fallen = [name for name, gain in gains.items() if gain.high < 0]
    if fallen and trained in last.gains and last.gains[trained].low > 0:
        return f"Suspect: {trained} rises, {' and '.join(fallen)}, not trained on, fell below the base's; none rose."
    moved = shifts(base, last)
    name = max(moved, key=lambda name: abs(moved[name]), default="")
    if abs(moved.get(name, 0.0)) <= (MOST_SHIFT if held_out else MOST_SHIFT_UNJUDGED):
        return None
    how = (
        f"the pictures are {moved[name]:.2g} times as far from the base's as these are from one another"
        if name == "drift"
        else f"the pictures' {name} is {'above' if moved[name] > 0 else 'below'} the base's by "
        f"{abs(moved[name]):.2g} of its deviations"
    )
    why = "no reward that is not trained on has risen" if held_out else "there is no held-out reward that speaks for it"
    return f"Suspect: {how}, and {why}."


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
