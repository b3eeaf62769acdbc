"""Selection keeps the samples that the papers' rules keep."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from raftdiff.losses import weighted_error
from raftdiff.selection import (
    above_global,
    above_interpolation,
    above_percentile,
    above_threshold,
    advantages,
    best_of_group,
    best_overall,
    by_reward,
    hybrid,
    kl_regularized,
    pareto_front,
    random_of_group,
    softmax_weights,
    vmpo_temperature,
    vmpo_weights,
)
from raftdiff.types import Group, Prompt, Sample, Scored


def group(text: str, *rewards: float | None, log_ratios: tuple[float, ...] = ()) -> Group:
    """The samples of the prompt `text`; the k-th has the id `text-k`."""
    prompt = Prompt(text=text)
    return Group(
        prompt=prompt,
        samples=tuple(
            Scored(
                sample=Sample(id=f"{text}-{k}", prompt=prompt, seed=k),
                parts={},
                reward=reward,
                log_ratio=log_ratios[k] if log_ratios else 0.0,
            )
            for k, reward in enumerate(rewards)
        ),
    )


def ids(chosen: list[Scored]) -> list[str]:
    return [scored.sample.id for scored in chosen]


GROUPS = [group("a", 1.0, 5.0, 3.0), group("b", 9.0, 8.0, 7.0), group("c", 2.0, 0.0, 4.0)]


def test_best_of_group_keeps_the_best_of_each_prompt_in_the_order_of_groups_then_rank():
    assert ids(best_of_group(GROUPS)) == ["a-1", "b-0", "c-2"]
    assert ids(best_of_group(GROUPS, keep=2)) == ["a-1", "a-2", "b-0", "b-1", "c-2", "c-0"]


def test_best_overall_ignores_the_prompts():
    assert ids(best_overall(GROUPS, 4)) == ["a-1", "b-0", "b-1", "b-2"]


def test_hybrid_keeps_the_best_of_the_best():
    assert ids(hybrid(GROUPS, 2)) == ["a-1", "b-0"]


def test_threshold_keeps_what_is_strictly_above():
    assert ids(above_threshold(GROUPS, 5.0)) == ["b-0", "b-1", "b-2"]
    assert above_threshold(GROUPS, 9.0) == []


def test_keeping_more_than_there_are_keeps_all():
    assert len(best_of_group(GROUPS, keep=5)) == len(best_overall(GROUPS, 50)) == 9
    assert len(hybrid(GROUPS, 50)) == 3


def test_ties_go_to_the_earlier_group_and_the_smaller_k():
    tied = [group("a", 1.0, 2.0, 2.0), group("b", 2.0, 2.0, 2.0)]
    assert ids(best_of_group(tied)) == ["a-1", "b-0"]
    assert ids(best_overall(tied, 3)) == ["a-1", "a-2", "b-0"]
    assert ids(hybrid(tied, 1)) == ["a-1"]


def test_failed_samples_are_never_chosen_and_never_count_as_zero():
    groups = [group("a", -3.0, None, -1.0), group("b", None, None), group("c", math.nan, -2.0, math.inf)]
    assert ids(best_of_group(groups)) == ["a-2", "c-1"]
    assert ids(best_overall(groups, 2)) == ["a-2", "c-1"]
    assert ids(hybrid(groups, 3)) == ["a-2", "c-1"]
    assert ids(above_threshold(groups, -2.5)) == ["a-2", "c-1"]
    assert ids(sorted(random_of_group(groups, 3, round=0, seed=0), key=lambda s: s.sample.id)) == ["a-0", "a-2", "c-1"]


def test_no_groups_and_groups_without_any_reward_give_nothing():
    for groups in ([], [group("a", None, None)], [group("a")]):
        assert best_of_group(groups) == best_overall(groups, 3) == hybrid(groups, 3) == []
        assert above_threshold(groups, 0.0) == random_of_group(groups, round=0, seed=0) == []


def test_kl_regularized_ranking_flips_the_choice_where_the_drift_outweighs_the_reward():
    # beta = .25: 2 - .25 * 6 = .5 for k = 0, and 1 - .25 * 1 = .75 for k = 1; beta = .125: 1.25 and .875.
    drifted = [group("a", 2.0, 1.0, log_ratios=(6.0, 1.0))]
    assert ids(best_of_group(drifted)) == ["a-0"]
    assert ids(best_of_group(drifted, key=kl_regularized(0.125))) == ["a-0"]
    assert ids(best_of_group(drifted, key=kl_regularized(0.25))) == ["a-1"]
    assert ids(best_overall(drifted, 1, key=kl_regularized(0.25))) == ["a-1"]
    assert ids(hybrid(drifted, 1, key=kl_regularized(0.25))) == ["a-1"]


def test_a_log_ratio_that_is_not_finite_excludes_the_sample():
    assert ids(best_of_group([group("a", 5.0, 1.0, log_ratios=(math.nan, 0.0))], key=kl_regularized(1.0))) == ["a-1"]


def test_a_constant_for_each_prompt_moves_global_selection_but_not_local():
    """Claim R4. The constants are exact in binary, so that adding them cannot change an order by rounding."""
    groups = [group(f"p{i}", *(float((7 * i + 3 * k) % 8) for k in range(8))) for i in range(6)]
    shifted = [
        replace(g, samples=tuple(replace(s, reward=by_reward(s) + 64.0 * (i < 2)) for s in g.samples))
        for i, g in enumerate(groups)
    ]
    for keep in (1, 3):
        assert ids(best_of_group(shifted, keep)) == ids(best_of_group(groups, keep))

    def coverage(chosen: list[Scored]) -> int:
        return len({scored.sample.prompt.id for scored in chosen})

    assert coverage(best_overall(groups, 6)) == 6
    assert coverage(best_overall(shifted, 6)) == 2


def test_random_selection_does_not_depend_on_rewards_or_on_the_other_groups():
    groups = [group(f"p{i}", *map(float, range(8))) for i in range(50)]
    reversed_rewards = [
        replace(g, samples=tuple(replace(s, reward=-100.0 * by_reward(s)) for s in g.samples)) for g in groups
    ]
    chosen = ids(random_of_group(groups, round=2, seed=5))
    assert ids(random_of_group(reversed_rewards, round=2, seed=5)) == chosen
    assert ids(random_of_group(groups[30:], round=2, seed=5)) == chosen[30:]
    assert ids(random_of_group(groups, round=3, seed=5)) != chosen
    assert ids(random_of_group(groups, round=2, seed=6)) != chosen


def test_random_selection_is_uniform_and_without_replacement():
    groups = [group(f"p{i}", 0.0, 1.0, 2.0, 3.0) for i in range(2000)]
    counts = Counter(scored.reward for scored in random_of_group(groups, round=0, seed=0))
    assert all(abs(counts[reward] - 500) < 5 * math.sqrt(2000 * 0.25 * 0.75) for reward in (0.0, 1.0, 2.0, 3.0))
    assert len(set(ids(random_of_group(groups, 4, round=0, seed=0)))) == 8000


def test_weighted_error_is_weight_times_error_with_gradients_to_the_error_alone():
    error_B = torch.tensor([2.0, 0.5, 3.0], requires_grad=True)
    loss_B, metrics = weighted_error(error_B, torch.tensor([1.0, 4.0, 0.0]))
    assert loss_B.tolist() == [2.0, 2.0, 0.0]
    loss_B.sum().backward()
    assert error_B.grad is not None and error_B.grad.tolist() == [1.0, 4.0, 0.0]
    assert metrics["error"].tolist() == pytest.approx([2.0, 0.5, 3.0]) and not metrics["error"].requires_grad


# A hard prompt beside an easy one, and a third whose rewards are all equal; from 0 to 10 in all.
HARD_AND_EASY = [group("hard", 0.0, 1.0, 2.0, 3.0), group("easy", 7.0, 8.0, 9.0, 10.0), group("flat", 5.0, 5.0)]


def test_a_global_threshold_is_on_rewards_scaled_over_all_prompts_and_loses_the_hard_ones():
    """Claim S6."""
    assert ids(above_global(HARD_AND_EASY, 0.25)) == [
        "hard-3",
        "easy-3",
        "easy-2",
        "easy-1",
        "easy-0",
        "flat-0",
        "flat-1",
    ]
    assert ids(above_global(HARD_AND_EASY, 0.7)) == ["easy-3", "easy-2", "easy-1"]  # strictly: 7 is .7
    assert ids(above_global(HARD_AND_EASY, 0.95)) == ["easy-3"]
    moved = [replace(g, samples=tuple(replace(s, reward=4.0 * by_reward(s) - 64.0) for s in g.samples)) for g in GROUPS]
    assert ids(above_global(moved, 0.4)) == ids(above_global(GROUPS, 0.4)) == ["a-1", "b-0", "b-1", "b-2", "c-2"]


def test_the_global_threshold_0_keeps_everything_and_equal_rewards_are_above_no_other():
    assert len(above_global(HARD_AND_EASY, 0.0)) == 10
    flat = [group("a", 2.0, 2.0), group("b", 2.0)]
    assert len(above_global(flat, 0.0)) == 3 and above_global(flat, 0.1) == []


def test_a_percentile_is_each_prompts_own_and_keeps_every_prompt():
    """Claim S6. The quantile .7 of four samples lies at .7 * 3 = 2.1 of the way up, between the two best."""
    assert ids(above_percentile(HARD_AND_EASY, 0.5)) == ["hard-3", "hard-2", "easy-3", "easy-2", "flat-0"]
    for share in (0.7, 0.95, 1.0):
        assert ids(above_percentile(HARD_AND_EASY, share)) == ["hard-3", "easy-3", "flat-0"]
    assert ids(above_percentile([group("a", 1.0, None, 2.0), group("b", None)], 0.0)) == ["a-2"]


def test_the_percentile_of_all_but_m_samples_keeps_the_m_best_for_every_k():
    for k in range(2, 17):
        groups = [group("a", *(float((5 * i) % k + 1 / (i + 1)) for i in range(k)))]
        for m in range(1, k):
            assert ids(above_percentile(groups, 1 - m / k)) == ids(best_of_group(groups, m))


def test_an_interpolated_threshold_goes_from_the_mean_of_a_prompt_to_its_best():
    groups = [group("a", 0.0, 5.0, 5.5, 7.0), group("b", 6.0)]  # of a the mean is 4.375
    assert ids(above_interpolation(groups, 0.0)) == ["a-3", "a-2", "a-1", "b-0"]
    assert ids(above_interpolation(groups, 0.3)) == ["a-3", "a-2", "b-0"]  # 4.375 + .3 * 2.625 = 5.1625
    assert ids(above_interpolation(groups, 0.5)) == ["a-3", "b-0"]  # 5.6875
    assert ids(above_interpolation([group("a", 0.1, 0.7, 0.3, 0.7)], 1.0)) == ["a-1"]  # nothing is above the best


def test_the_advantage_is_the_reward_less_the_mean_of_the_prompts_scored_samples():
    found = advantages([group("a", 1.0, None, 5.0), group("b", 9.0), group("c", None)])
    assert found == {"a-0": -2.0, "a-2": 2.0, "b-0": 0.0}


def test_softmax_weights_have_the_mean_1():
    # exp(0), exp(ln 3): shares of a quarter and three quarters, of two samples
    assert softmax_weights([0.0, 0.5 * math.log(3)], 0.5) == pytest.approx([0.5, 1.5])
    assert softmax_weights([1e6, 0.0], 1e-3) == [2.0, 0.0]


def test_the_temperature_of_vmpo_is_where_its_weights_are_epsilon_nats_from_uniform():
    advantage_N = [2.0, 0.5, -0.25, -1.0]
    for epsilon in (0.01, 0.1, 1.0):
        share_N = [w / 4 for w in softmax_weights(advantage_N, vmpo_temperature(advantage_N, epsilon))]
        assert sum(p * math.log(4 * p) for p in share_N) == pytest.approx(epsilon, rel=1e-3)
    # scaling and moving the advantages scales the temperature with them
    assert vmpo_temperature([23.0, 8.0, 0.5, -7.0], 0.1) == pytest.approx(
        10 * vmpo_temperature(advantage_N, 0.1), rel=1e-3
    )


def test_vmpo_keeps_the_better_half_with_the_mean_weight_1():
    weights = vmpo_weights([0.0, 3.0, -1.0, 1.0, -2.0], 0.1)
    assert weights[2] == weights[4] == 0.0
    assert weights[1] > weights[3] > weights[0] > 0 and sum(weights) == pytest.approx(3.0)
    assert vmpo_weights([1.0, 1.0, 1.0, 1.0], 0.1) == [1.0, 1.0, 0.0, 0.0]
    assert vmpo_weights([0.5], 0.1) == [1.0]


def objectives(text: str, *rows: tuple[float, ...], missed: tuple[int, ...] = ()) -> Group:
    found = group(text, *(sum(row) for row in rows))
    samples = [
        replace(s, objectives=dict(zip("abc", row, strict=False)), missed=("a",) if k in missed else ())
        for k, (s, row) in enumerate(zip(found.samples, rows, strict=True))
    ]
    return replace(found, samples=tuple(samples))


def test_the_pareto_front_of_a_prompt_is_what_no_other_sample_dominates():
    # 3 is dominated by 0, and 4 by 2; 1 and 5 are equal and stay both
    front = objectives("p", (3.0, 1.0), (2.0, 2.0), (1.0, 3.0), (3.0, 0.0), (0.0, 3.0), (2.0, 2.0))
    assert ids(pareto_front([front])) == ["p-0", "p-1", "p-2", "p-5"]
    assert ids(pareto_front([objectives("q", (1.0, 1.0, 1.0), (0.0, 1.0, 1.0)), front]))[:1] == ["q-0"]


def test_samples_below_a_floor_are_on_the_front_only_where_there_are_no_others():
    rows = ((9.0, 9.0), (1.0, 2.0), (2.0, 1.0))
    assert ids(pareto_front([objectives("p", *rows, missed=(0,))])) == ["p-1", "p-2"]
    assert ids(pareto_front([objectives("p", *rows, missed=(0, 1, 2))])) == ["p-0"]
