"""Selection keeps the samples that the papers' rules keep."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from raftdiff.losses import weighted_error
from raftdiff.selection import (
    above_threshold,
    best_of_group,
    best_overall,
    by_reward,
    hybrid,
    kl_regularized,
    random_of_group,
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
