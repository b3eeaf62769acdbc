"""Evaluation: paired gains, intervals over prompts, diversity, and the verdict on a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from raftdiff.config import EvaluationConfig
from raftdiff.errors import DataError
from raftdiff.evaluation import (
    best_held_out,
    diversity,
    measure,
    paired_interval,
    pairwise_distance,
    picture_moments,
    run_verdict,
    shifts,
    trend,
    verdict,
)
from raftdiff.types import Evaluation, Interval, Moments, Prompt, RoundReport, Sample

# ------------------------------------------------------------------------------------------------ intervals


def test_the_mean_leaves_out_missing_values():
    interval = paired_interval([1.0, math.nan, 2.0, 6.0])
    assert (interval.mean, interval.count) == (3.0, 3)
    assert interval.low < 3.0 < interval.high


def test_values_are_averaged_within_a_prompt_first():
    # prompt a: (1 + 3) / 2 = 2, prompt b: 8; the plain mean would be 4
    interval = paired_interval([1.0, 8.0, 3.0], ["a", "b", "a"])
    assert (interval.mean, interval.count) == (5.0, 2)


def test_repeating_each_prompts_value_does_not_narrow_a_clustered_interval():
    values = np.random.default_rng(1).normal(size=20)
    once = paired_interval(values)
    repeated = np.repeat(values, 8)
    clustered = paired_interval(repeated, [f"{i:02}" for i in np.repeat(np.arange(20), 8)])
    naive = paired_interval(repeated)
    assert (clustered.low, clustered.high) == pytest.approx((once.low, once.high))
    # eight copies look like eight times the data: narrower by about the square root of 8, 2.83
    assert 2.3 < (clustered.high - clustered.low) / (naive.high - naive.low) < 3.4


def test_clusters_narrow_the_interval_where_seeds_cancel_out_within_a_prompt():
    values = np.array([5.0, -5.0] * 10) + np.repeat(np.linspace(-0.1, 0.1, 10), 2)
    clusters = [str(i // 2) for i in range(20)]
    clustered, naive = paired_interval(values, clusters), paired_interval(values)
    assert clustered.high - clustered.low < 0.1 * (naive.high - naive.low)


def test_the_interval_agrees_with_the_normal_one_on_plenty_of_normal_data():
    values = np.random.default_rng(2).normal(loc=1.0, size=400)
    interval = paired_interval(values)
    half_width = 1.96 * values.std(ddof=1) / 20
    assert interval.low == pytest.approx(values.mean() - half_width, abs=0.015)
    assert interval.high == pytest.approx(values.mean() + half_width, abs=0.015)


def test_the_interval_of_skewed_data_leans_to_the_long_side():
    values = np.random.default_rng(3).exponential(size=60) ** 2
    interval = paired_interval(values)
    assert interval.high - interval.mean > 1.2 * (interval.mean - interval.low)


def test_the_interval_says_whether_a_gain_is_there():
    noise = np.random.default_rng(4).normal(size=50)
    noise -= noise.mean()
    assert paired_interval(noise + 1.0).excludes_zero
    assert paired_interval(noise - 1.0).excludes_zero
    assert not paired_interval(noise + 0.05).excludes_zero


def test_the_same_values_give_the_same_interval():
    values = np.random.default_rng(5).normal(size=30)
    assert paired_interval(values) == paired_interval(values)


def test_a_single_value_and_equal_values_are_their_own_interval():
    assert paired_interval([2.5]) == Interval(mean=2.5, low=2.5, high=2.5, count=1)
    # thrice .1 averages to another last bit than once .1
    interval = paired_interval([0.1, 0.1, 0.1, 0.1], ["a", "a", "a", "b"])
    assert interval.low == interval.mean == interval.high == pytest.approx(0.1)


def test_nothing_left_is_not_a_number():
    interval = paired_interval([math.nan, math.nan])
    assert interval.count == 0
    assert math.isnan(interval.mean)
    assert not interval.excludes_zero


# ------------------------------------------------------------------------------------------------ diversity


def test_pairwise_distance_is_the_mean_over_pairs():
    # pairs along one axis: 3, 6, 3; divided by the square root of the 4 features
    features = torch.zeros(3, 4)
    features[:, 0] = torch.tensor([0.0, 3.0, 6.0])
    assert pairwise_distance(features, "rms") == pytest.approx(4.0 / 2.0)
    # cosines 0, 1, 0
    assert pairwise_distance(torch.tensor([[1.0, 0.0], [0.0, 3.0], [5.0, 0.0]]), "cosine") == pytest.approx(2 / 3)
    assert math.isnan(pairwise_distance(torch.ones(1, 4), "rms"))


def picture(level: int, size: int = 4, flaw: str | None = None) -> Sample:
    image = torch.full((3, size, size), level, dtype=torch.uint8)
    return Sample(id=str(level), prompt=Prompt(text="a"), seed=level, image=image, flaw=flaw)


def test_black_and_white_are_one_apart_at_any_size():
    for size in (4, 32, 100):
        assert diversity([[picture(0, size), picture(255, size)]]) == pytest.approx([1.0])


def test_diversity_is_of_each_prompt_and_without_flawed_samples():
    same = [picture(51), picture(51)]
    apart = [picture(0), picture(51), picture(255, flaw="a black image")]
    lone = [picture(0), picture(255, flaw="a black image")]
    values = diversity([same, apart, lone])
    assert values[:2] == pytest.approx([0.0, 0.2])
    assert math.isnan(values[2])


def parity(samples: Sequence[Sample]) -> torch.Tensor:
    """An embedding: even and odd seeds stand at a right angle."""
    return torch.tensor([[1.0, 0.0] if s.seed % 2 else [0.0, 2.0] for s in samples])


def test_texts_have_a_diversity_only_with_an_embedding():
    texts = [Sample(id=str(i), prompt=Prompt(text="a"), seed=i, text="yes") for i in range(2)]
    assert math.isnan(diversity([texts])[0])
    assert diversity([texts], parity) == pytest.approx([1.0])


# ------------------------------------------------------------------------------------------------ measure

PROMPTS = ("a", "a", "b", "b")
SEEDS = (1, 2, 3, 5)


def grays(brighter: int = 0, flawed: Sequence[int] = ()) -> list[Sample]:
    """Two seeds of two prompts, each painted in one gray: 100 and its seed, and how much brighter the model is."""
    return [
        Sample(
            id=f"{text}-{seed}",
            prompt=Prompt(text=text),
            seed=seed,
            image=torch.full((3, 4, 4), 100 + seed + brighter, dtype=torch.uint8),
            flaw="a black image" if seed in flawed else None,
        )
        for text, seed in zip(PROMPTS, SEEDS, strict=True)
    ]


def brightness(samples: Sequence[Sample]) -> torch.Tensor:
    """The first pixel; NaN where flawed."""
    return torch.tensor([float(s.image[0, 0, 0]) if s.flaw is None else math.nan for s in samples])


def measured(samples: Sequence[Sample], **settings) -> Evaluation:
    return measure(samples, {"brightness": brightness(samples)}, guidance_scale=1.0, **settings)


def test_metrics_and_gains_of_a_brighter_model():
    base = measured(grays())
    assert base.gains == {}
    assert base.per_sample["brightness"] == (101.0, 102.0, 103.0, 105.0)
    # prompts: 101.5 and 104
    assert base.metrics["brightness"].mean == 102.75
    assert (base.guidance_scale, base.failed) == (1.0, 0)

    after = measured(grays(brighter=10), base=base)
    assert after.metrics["brightness"].mean == 112.75
    assert after.gains["brightness"] == Interval(mean=10.0, low=10.0, high=10.0, count=2)
    assert after.gains["diversity"].mean == pytest.approx(0.0)


def test_a_gain_is_the_mean_of_paired_differences_over_prompts():
    base = measure(grays(), {"score": torch.tensor([1.0, 2.0, 3.0, 4.0])}, guidance_scale=1.0)
    after = measure(grays(), {"score": torch.tensor([2.0, 4.0, 3.0, 9.0])}, guidance_scale=1.0, base=base)
    # differences 1, 2 | 0, 5: 1.5 and 2.5 for the prompts
    assert after.gains["score"] == Interval(mean=2.0, low=1.5, high=2.5, count=2)


def test_diversity_is_measured_within_each_prompt():
    evaluation = measured(grays())
    # one level apart for prompt a, two for prompt b
    assert evaluation.metrics["diversity"].mean == pytest.approx(1.5 / 255)
    assert evaluation.per_sample["diversity"] == pytest.approx((1 / 255, 1 / 255, 2 / 255, 2 / 255))


def test_diversity_uses_an_embedding_that_is_given():
    # seeds 1 and 2 at a right angle, 3 and 5 in one place
    assert measured(grays(), embed=parity).metrics["diversity"].mean == pytest.approx(0.5)


def test_one_seed_for_each_prompt_has_no_diversity():
    assert set(measured(grays()[1:3]).metrics) == {"brightness"}


def test_a_sample_without_a_value_is_counted_once_and_left_out():
    values = {"clip": torch.tensor([1.0, math.nan, 1.0, 1.0]), "aesthetic": torch.tensor([5.0, math.nan, 6.0, 8.0])}
    evaluation = measure(grays(), values, guidance_scale=1.0)
    assert evaluation.failed == 1
    assert evaluation.metrics["clip"].mean == 1.0
    assert evaluation.metrics["aesthetic"].mean == 6.0
    assert [math.isnan(value) for value in evaluation.per_sample["clip"]] == [False, True, False, False]


def test_a_value_missing_on_either_side_drops_the_pair():
    base = measured(grays(flawed=[1]))
    after = measured(grays(brighter=10, flawed=[5]), base=base)
    assert (base.failed, after.failed) == (1, 1)
    # unpaired, the means over the prompts differ by 9.25
    assert (base.metrics["brightness"].mean, after.metrics["brightness"].mean) == (103.0, 112.25)
    assert after.gains["brightness"] == Interval(mean=10.0, low=10.0, high=10.0, count=2)
    assert math.isnan(after.per_sample["diversity"][3])


def test_a_reward_that_the_base_was_not_measured_with_has_no_gain():
    base = measured(grays())
    values = {"brightness": brightness(grays()), "clip": torch.ones(4)}
    after = measure(grays(), values, guidance_scale=1.0, base=base)
    assert set(after.gains) == {"brightness", "diversity"}


def test_a_base_that_cannot_be_paired_is_refused():
    base = measured(grays())
    with pytest.raises(DataError, match="4 samples and this model on 2"):
        measured(grays()[:2], base=base)
    with pytest.raises(DataError, match="guidance scale 1 and this model at 4"):
        measure(grays(), {"brightness": brightness(grays())}, guidance_scale=4.0, base=base)


# ------------------------------------------------------------------------------------------------ verdict


def at(reward: float, half_width: float = 0.1, **metrics: float) -> Evaluation:
    """An evaluation whose intervals all have one half-width; the base's reward is 0."""

    def around(mean: float) -> Interval:
        return Interval(mean=mean, low=mean - half_width, high=mean + half_width, count=50)

    values = {"reward": reward, "diversity": 1.0} | metrics
    gains = {"reward": around(reward)} | {name: around(value) for name, value in metrics.items()}
    return Evaluation(
        guidance_scale=1.0,
        metrics={name: around(value) for name, value in values.items()},
        gains=gains,
        per_sample={},
        failed=0,
    )


def judged(*history: Evaluation, held_out: Sequence[str] = ("oracle",), **settings):
    return verdict(history, trained="reward", held_out=held_out, **settings)


def test_reward_and_held_out_reward_rising_together_is_healthy():
    found = judged(at(0.0, oracle=0.0), at(0.5, oracle=0.3), at(1.0, oracle=0.4))
    assert (found.kind, found.best) == ("healthy", 2)
    assert found.message == (
        "Reward is above the base model's by 1 (95% interval 0.9 to 1.1); of the rewards not trained on, "
        "oracle is above the base model's."
    )


def test_the_base_alone_is_healthy():
    assert judged(at(0.0, oracle=0.0)).kind == "healthy"


def test_a_rising_reward_with_a_falling_held_out_reward_is_over_optimized():
    history = [at(0.0, oracle=0.0), at(0.5, oracle=0.5), at(1.0, oracle=0.45), at(1.5, oracle=0.35)]
    found = judged(*history)
    assert found.kind == "over-optimized"
    assert found.message == (
        "Over-optimized: reward still rises, but oracle, not trained on, has fallen from the best by more "
        "than the uncertainty."
    )
    # .45 is within .1 of the best, .35 is not: the model of the third evaluation is the one to keep
    assert found.best == 2
    assert judged(*history[:3]).kind == "healthy"


def test_a_held_out_fall_within_its_uncertainty_is_healthy():
    assert judged(at(0.0, oracle=0.5), at(1.0, oracle=0.41)).kind == "healthy"


def test_one_held_out_reward_that_holds_is_enough():
    history = [at(0.0, oracle=0.5, clip=0.5), at(1.0, oracle=0.2, clip=0.5)]
    assert judged(*history, held_out=("oracle", "clip")).kind == "healthy"
    assert judged(*history, held_out=("oracle",)).kind == "over-optimized"


def test_a_held_out_reward_that_falls_with_the_trained_one_is_not_over_optimization():
    assert judged(at(0.0, oracle=0.5), at(-1.0, oracle=0.0)).kind == "healthy"


def test_lost_diversity_is_a_collapse_whatever_the_rewards_say():
    history = [at(0.0, oracle=0.0), at(0.5, oracle=0.3, diversity=0.6), at(1.0, oracle=0.6, diversity=0.45)]
    found = judged(*history)
    assert (found.kind, found.best) == ("collapsed", 1)
    assert found.message == "Collapsed: diversity has fallen to 45% of the base model's."
    assert judged(*history, least_diversity=0.4).kind == "healthy"


def test_a_reward_flat_for_three_evaluations_is_a_plateau():
    rising = [at(0.0), at(0.5), at(1.0)]
    flat = [at(1.05), at(0.98), at(1.08)]
    assert judged(*rising, *flat[:2], held_out=()).kind == "healthy"
    found = judged(*rising, *flat, held_out=())
    assert (found.kind, found.best) == ("plateau", 5)
    assert judged(*rising, *flat, held_out=(), patience=4).kind == "healthy"


def test_a_slow_rise_beyond_the_uncertainty_is_no_plateau():
    history = [at(0.04 * i, half_width=0.1) for i in range(8)]
    assert judged(*history, held_out=()).kind == "healthy"


def test_metrics_that_are_missing_or_not_numbers_are_not_judged():
    bare = Evaluation(guidance_scale=1.0, metrics={}, gains={}, per_sample={}, failed=9)
    assert judged(bare, bare).kind == "healthy"
    found = judged(at(0.0, oracle=math.nan), at(math.nan, oracle=math.nan), at(0.2, oracle=0.1))
    assert (found.kind, found.best) == ("healthy", 2)


# ------------------------------------------------------------------------------------------------ sentinel


def watched(evaluation: Evaluation, drift: float | None = None, **statistics: float) -> Evaluation:
    """With pictures whose statistics have these means and the deviation 2, half a unit apart from one another."""
    found = {name.replace("_", "-"): Moments(count=9, mean=mean, variance=4.0) for name, mean in statistics.items()}
    found["spread"] = Moments(count=9, mean=0.5, variance=0.0)
    if drift is not None:
        found["drift"] = Moments(count=9, mean=drift, variance=0.0)
    return replace(evaluation, statistics=found)


BASE = watched(at(0.0, oracle=0.0), saturation=3.0, edge_density=5.0)


def test_the_statistics_of_pictures_are_summed_up_with_their_spread_and_their_drift():
    black, white, gray = picture(0), picture(255), picture(51)
    found = picture_moments([black, white, gray])
    assert set(found) == {"sharpness", "saturation", "color-entropy", "edge-density", "grid-energy", "spread"}
    assert found["color-entropy"] == Moments(count=3, mean=0.0, variance=0.0)
    # each from the one before it, the first from the last: .2, 1, .8
    assert found["spread"].mean == pytest.approx(2 / 3)
    moved = picture_moments([black, white, gray], base=[black, gray, gray])
    assert moved["drift"].mean == pytest.approx(0.8 / 3)
    assert moved["saturation"].count == 3


def test_flawed_pictures_are_not_watched_and_texts_never():
    found = picture_moments([picture(0), picture(255), picture(7, flaw="a black image")])
    assert found["saturation"].count == 2 and found["spread"].mean == 1.0
    assert picture_moments([Sample(id="0", prompt=Prompt(text="a"), seed=0, text="b")]) == {}


def test_shifts_are_in_deviations_of_the_base_and_drift_in_units_of_its_spread():
    last = watched(at(1.0), drift=0.3, saturation=4.0, edge_density=2.0)
    assert shifts(BASE, last) == {"saturation": 0.5, "edge-density": -1.5, "drift": 0.6}
    assert shifts(at(0.0), last) == {}


def test_pictures_that_move_without_a_held_out_rise_are_suspect():
    last = watched(at(1.0, oracle=0.05), drift=0.1, saturation=3.0, edge_density=3.0)
    found = judged(BASE, last)
    assert (found.kind, found.alarm, found.best) == ("suspect", True, 1)
    assert found.message == (
        "Suspect: the pictures' edge-density is below the base's by 1 of its deviations, and no reward that is not "
        "trained on has risen."
    )
    assert judged(BASE, watched(at(1.0, oracle=0.05), drift=0.3)).message.startswith(
        "Suspect: the pictures are 0.6 times as far from the base's as these are from one another"
    )


def test_a_held_out_rise_excuses_pictures_that_move():
    last = watched(at(1.0, oracle=0.2), drift=0.4, edge_density=1.0)
    assert judged(BASE, last).kind == "healthy"


def test_without_held_out_rewards_pictures_must_move_twice_as_far():
    near, far = (watched(at(1.0), edge_density=5.0 - 2 * shift) for shift in (0.9, 1.1))
    assert judged(BASE, near, held_out=()).kind == "healthy"
    assert judged(BASE, far, held_out=()).kind == "suspect"


def test_over_optimization_and_collapse_are_said_before_suspicion():
    history = [BASE, watched(at(1.0, oracle=-0.5), edge_density=0.0)]
    assert judged(*history).kind == "over-optimized"
    assert judged(BASE, watched(at(1.0, oracle=0.0, diversity=0.1), edge_density=0.0)).kind == "collapsed"


def reports_of(*history: Evaluation) -> list[RoundReport]:
    empty = {"requested": 0, "scored": 0, "failed": 0, "skipped": 0, "selected": 0, "rewards": {}, "training": {}}
    return [RoundReport(round=i, evaluations=(e,), **empty) for i, e in enumerate(history)]


def test_after_an_alarm_a_rollback_keeps_the_best_by_what_is_held_out_in_units_of_the_base():
    base = replace(at(0.0, oracle=0.0, clip=0.0), per_sample={"oracle": (-1.0, 1.0), "clip": (-10.0, 10.0)})
    history = [
        base,
        at(0.5, oracle=0.3, clip=1.0),  # .3 + .1
        at(1.0, oracle=0.2, clip=3.0),  # .2 + .3
        at(1.5, oracle=0.0, clip=1.0),
        at(2.0, oracle=-0.5, clip=-1.0),
    ]
    assert best_held_out(history, ["oracle", "clip"]) == 2


def test_a_rollback_is_to_the_best_held_out_round_and_a_warning_keeps_the_best_trained_one():
    base = replace(at(0.0, oracle=0.0), per_sample={"oracle": (-1.0, 1.0)})
    history = [base, at(0.5, oracle=0.5), at(1.0, oracle=0.45), at(1.5, oracle=0.0)]

    def kept(sentinel: str, upto: int) -> tuple[str, int]:
        found = run_verdict(EvaluationConfig(sentinel=sentinel), reports_of(*history[:upto]), ["oracle"])
        return found.kind, found.best

    assert kept("warn", 4) == ("over-optimized", 2)
    assert kept("rollback", 4) == ("over-optimized", 1)
    assert kept("rollback", 3) == ("healthy", 2)


def test_a_rollback_goes_to_a_trained_model_even_where_none_is_as_good_as_the_base():
    base = replace(at(0.0, oracle=0.0), per_sample={"oracle": (-1.0, 1.0)})
    assert best_held_out([base, at(1.0, oracle=-0.3), at(2.0, oracle=-0.6)], ["oracle"]) == 1
    assert best_held_out([base], ["oracle"]) == 0


def test_a_reward_rises_stalls_or_falls_beyond_its_uncertainty():
    def of(*levels: float, **settings) -> str:
        return trend([at(0.0, clip=level) for level in levels], "clip", **settings)

    assert [of(0.0, 0.5), of(0.0, 0.05), of(0.0, 0.5, 0.3)] == ["rises", "stalls", "falls"]
    assert of(0.0, 0.5, 0.5, 0.45, 0.5) == "stalls"  # not above .5 + .1 in the last three
    assert of(0.0, 0.5, 0.5, 0.45, 0.5, patience=4) == "rises"
    assert of(0.0, -0.5, weight=-2.0) == "rises"


def test_a_held_out_reward_below_the_base_is_suspect_where_none_has_risen():
    fallen = at(1.0, oracle=-0.2, clip=0.05)
    found = judged(at(0.0, oracle=0.0, clip=0.0), fallen, held_out=("oracle", "clip"))
    assert (found.kind, found.best) == ("suspect", 1)
    assert found.message == "Suspect: reward rises, oracle, not trained on, fell below the base's; none rose."
    rose = at(1.0, oracle=-0.2, clip=0.2)
    assert judged(at(0.0, oracle=0.0, clip=0.0), rose, held_out=("oracle", "clip")).kind == "healthy"
    not_risen = at(0.05, oracle=-0.2, clip=0.05)
    assert judged(at(0.0, oracle=0.0, clip=0.0), not_risen, held_out=("oracle", "clip")).kind == "healthy"
