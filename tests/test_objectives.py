"""Scalarizers, running statistics, and what a round says of its objectives: by hand."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from raftdiff.config import Combine
from raftdiff.objectives import SCALARIZERS, merged, moments, scalarize, soft_max_min, together, with_values
from raftdiff.types import Group, Moments, Prompt, Sample, Scored


def softplus(z: float) -> float:
    return math.log(1 + math.exp(z))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("sum", 4.0),
        ("standardized", 4.0),
        ("weighted-linear", 4.0),
        ("worst-case", -1.0),
        ("uncertainty-weighted", 1.0 - 0.5 * 2.5),  # squared distances from the mean 1: 4, 1, 1, 4
        ("lower-quantile", -1.0),  # floor(4 / 3) = 1 of them
        ("max-median", 1.0),  # between 0 and 2
        ("bernoulli-nash", (softplus(-1) * softplus(0) * softplus(2) * softplus(3)) ** 0.25),
        (
            "soft-max-min",
            (-1 * math.e + 0 + 2 * math.exp(-2) + 3 * math.exp(-3)) / (math.e + 1 + math.exp(-2) + math.exp(-3)),
        ),
    ],
)
def test_each_scalarizer_is_its_formula_over_the_objectives_of_one_sample(how, expected):
    assert SCALARIZERS[how]([3.0, -1.0, 2.0, 0.0]) == pytest.approx(expected, rel=1e-12)


def test_every_way_to_combine_has_a_formula_and_of_one_objective_keeps_the_order():
    assert set(SCALARIZERS) == set(get_args(Combine))
    for formula in SCALARIZERS.values():
        assert formula([-2.0]) < formula([0.5]) < formula([3.0])


def test_the_lower_quantile_of_seven_is_the_mean_of_the_two_smallest():
    assert SCALARIZERS["lower-quantile"]([7.0, 1.0, 6.0, 2.0, 5.0, 3.0, 4.0]) == 1.5
    assert SCALARIZERS["lower-quantile"]([4.0, 3.0]) == 3.0


def test_a_cold_soft_max_min_is_the_worst_case_and_a_hot_one_the_mean():
    assert soft_max_min([3.0, -1.0, 2.0], temperature=1e-3) == pytest.approx(-1.0)
    assert soft_max_min([3.0, -1.0, 4.0], temperature=1e6) == pytest.approx(2.0, abs=1e-5)


def test_bernoulli_nash_keeps_the_order_of_samples_that_are_far_down():
    values = [SCALARIZERS["bernoulli-nash"]([z, z]) for z in (-400.0, -40.0, -30.0, -29.9, 800.0)]
    assert values == sorted(values) and values[0] > 0 and values[-1] == pytest.approx(800)


def test_weights_are_applied_before_and_a_missing_objective_leaves_no_reward():
    assert scalarize({"a": 2.0, "b": -3.0, "c": 9.0}, {"a": 1.0, "b": 0.5, "c": 0.0}, "worst-case") == -3.0
    assert scalarize({"a": 2.0}, {"a": 1.0, "b": 0.0}, "sum") == 2.0
    assert scalarize({"a": 2.0}, {"a": 1.0, "b": -2.0}, "sum") is None


def test_moments_merge_to_those_of_all_values():
    a, b = torch.tensor([1.0, 5.0, math.nan]), torch.tensor([3.0, 4.0, 12.0])
    assert moments(a) == Moments(count=2, mean=3.0, variance=4.0)
    # all five: mean 5, squares 16 + 0 + 4 + 1 + 49 = 70
    found = merged(moments(a), moments(b))
    assert (found.count, found.mean, found.variance) == (5, pytest.approx(5.0), pytest.approx(14.0))
    assert merged(moments(torch.tensor([math.nan])), moments(a)) == moments(a)


def test_running_moments_take_in_each_round_reward_by_reward():
    first = with_values({}, {"a": torch.tensor([1.0, 5.0])})
    second = with_values(first, {"a": torch.tensor([3.0]), "b": torch.tensor([7.0])})
    assert second["a"].count == 3 and second["a"].mean == pytest.approx(3.0)
    assert second["b"] == Moments(count=1, mean=7.0, variance=0.0)
    assert first == {"a": Moments(count=2, mean=3.0, variance=4.0)}


# ------------------------------------------------------------------------------------------------ a round's objectives


def group(text: str, *rows: tuple[float, float], missed: tuple[int, ...] = ()) -> Group:
    prompt = Prompt(text=text)
    samples = tuple(
        Scored(
            sample=Sample(id=f"{text}-{k}", prompt=prompt, seed=k),
            parts={},
            reward=a + b,
            objectives={"a": a, "b": b},
            missed=("b",) if k in missed else (),
        )
        for k, (a, b) in enumerate(rows)
    )
    return Group(prompt=prompt, samples=samples)


def test_objectives_disagree_where_no_sample_is_the_best_in_all():
    groups = [
        group("agree", (1.0, 1.0), (0.0, 0.0)),
        group("tie", (1.0, 1.0), (1.0, 0.0)),
        group("differ", (1.0, 0.0), (0.0, 1.0), missed=(0,)),
    ]
    found = together(groups, floors=["b"])
    assert found.disagreement == pytest.approx(1 / 3)
    assert found.missed == pytest.approx({"b": 1 / 6})


def test_the_correlation_is_over_all_samples_of_the_round():
    found = together([group("x", (0.0, 2.0), (1.0, 1.0)), group("y", (2.0, 0.0))])
    assert found.names == ("a", "b")
    assert found.correlation[0] == pytest.approx((1.0, -1.0))
    flat = together([group("x", (0.0, 5.0), (1.0, 5.0))])
    assert math.isnan(flat.correlation[0][1])


def test_one_objective_says_nothing_of_several():
    only = Scored(sample=Sample(id="0", prompt=Prompt(text="x"), seed=0), parts={}, reward=1.0, objectives={"a": 1.0})
    assert together([Group(prompt=Prompt(text="x"), samples=(only,))]) is None
    assert together([]) is None
