"""Rewards over samples: failures contained and counted, values combined."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from tiny_runs import three_weights_run, tiny_config

from raftdiff.errors import ConfigError, ScoringError
from raftdiff.objectives import STD_FLOOR
from raftdiff.rounds import run_rounds
from raftdiff.scoring import (
    Combination,
    WeightedReward,
    combined,
    score,
    score_parts,
    standardize,
    warn_of_constants,
)
from raftdiff.types import Moments, Prompt, Sample

NAN, INFINITY = math.nan, math.inf


def make_samples(count: int, flawed: tuple[int, ...] = ()) -> list[Sample]:
    """Samples "0", "1", ...; those in `flawed` are black."""
    return [
        Sample(
            id=str(i),
            prompt=Prompt(text="a red circle"),
            seed=i,
            image=torch.zeros(3, 4, 4, dtype=torch.uint8),
            flaw="a black image" if i in flawed else None,
        )
        for i in range(count)
    ]


class Table:
    """A reward that looks its values up by sample id, raises where the value is an exception, and notes what it saw."""

    def __init__(self, values, *, name="table", modality="image"):
        self.values, self.name, self.modality = values, name, modality
        self.seen: list[list[str]] = []

    def score(self, samples):
        self.seen.append([s.id for s in samples])
        found = [self.values[int(s.id)] for s in samples]
        for value in found:
            if isinstance(value, Exception):
                raise value
        return torch.tensor(found, dtype=torch.float32)


def is_nan(value_N):
    return value_N.isnan().tolist()


class TestScoreParts:
    def test_values_come_back_in_the_order_of_the_samples_whatever_the_batch_size(self):
        for batch_size in (1, 2, 5, 100):
            reward = Table([3.0, 1.0, 4.0, 1.5, 9.0])
            assert score_parts(make_samples(5), reward, batch_size=batch_size).tolist() == [3, 1, 4, 1.5, 9]
            assert max(map(len, reward.seen)) <= batch_size

    def test_flawed_samples_are_never_shown_to_the_reward(self):
        reward = Table([1.0, RuntimeError("must not be asked"), 3.0])
        value_N = score_parts(make_samples(3, flawed=(1,)), reward)
        assert reward.seen == [["0", "2"]]
        assert is_nan(value_N) == [False, True, False]

    def test_not_finite_values_are_missing(self):
        value_N = score_parts(make_samples(5), Table([1.0, NAN, INFINITY, -INFINITY, 0.0]), max_failed=0.6)
        assert is_nan(value_N) == [False, True, True, True, False]
        assert value_N[4] == 0

    def test_a_sample_that_makes_the_reward_raise_costs_only_itself(self):
        reward = Table([1.0, ValueError("cannot decode"), 3.0, 4.0])
        value_N = score_parts(make_samples(4), reward, batch_size=3)
        assert reward.seen == [["0", "1", "2"], ["0"], ["1"], ["2"], ["3"]]
        assert value_N.tolist()[:1] + value_N.tolist()[2:] == [1, 3, 4] and is_nan(value_N)[1]

    def test_a_batch_too_large_for_the_reward_is_scored_one_by_one(self):
        class Small(Table):
            def score(self, samples):
                if len(samples) > 1:
                    raise torch.OutOfMemoryError("out of memory")
                return super().score(samples)

        assert score_parts(make_samples(3), Small([1.0, 2.0, 3.0]), max_failed=0).tolist() == [1, 2, 3]

    def test_too_many_failures_name_the_reward_the_count_and_the_first_exception(self):
        reward = Table([1.0, OSError("the judge is away"), RuntimeError("later"), 4.0], name="judge")
        with pytest.raises(ScoringError, match=r"'judge' failed on 2 of 4 samples \(OSError: the judge is away\)") as e:
            score_parts(make_samples(4), reward, max_failed=0.4)
        assert isinstance(e.value.__cause__, OSError)
        assert "\n" not in str(e.value)

    def test_too_many_values_that_are_not_finite_stop_too(self):
        with pytest.raises(ScoringError, match="failed on 1 of 2 samples .its values were NaN or infinite"):
            score_parts(make_samples(2), Table([NAN, 1.0]), max_failed=0.4)

    def test_exactly_the_allowed_share_may_fail_and_flawed_samples_are_not_counted(self, caplog):
        with caplog.at_level(logging.WARNING, logger="raftdiff.scoring"):
            value_N = score_parts(make_samples(5, flawed=(4,)), Table([NAN, NAN, 1.0, 2.0, 0.0]), max_failed=0.5)
        assert is_nan(value_N) == [True, True, False, False, True]
        assert "failed on 2 of 4 samples" in caplog.text

    def test_values_of_the_wrong_shape_are_failures(self):
        class Column(Table):
            def score(self, samples):
                return super().score(samples)[:, None]

        with pytest.raises(ScoringError, match=r"shape \[1, 1\] for 1 samples, not \[1\]"):
            score_parts(make_samples(2), Column([1.0, 2.0]))

    def test_a_reward_that_is_set_up_wrong_stops_at_once(self):
        reward = Table([ConfigError("no such head"), 1.0])
        with pytest.raises(ConfigError, match="no such head"):
            score_parts(make_samples(2), reward, max_failed=1)
        assert len(reward.seen) == 1

    def test_a_reward_for_texts_is_refused_on_images(self):
        with pytest.raises(ConfigError, match="'table' judges text, but sample 0 has none"):
            score_parts(make_samples(2), Table([1.0, 2.0], modality="text"))

    def test_nothing_to_judge_is_no_failure(self):
        assert is_nan(score_parts(make_samples(1, flawed=(0,)), Table([0.0]), max_failed=0)) == [True]
        assert score_parts([], Table([])).shape == (0,)

    def test_progress_counts_what_is_judged(self):
        told = []
        score_parts(make_samples(4, flawed=(0,)), Table([1.0] * 4), batch_size=2, progress=lambda *a: told.append(a))
        assert told == [("table", 2, 3), ("table", 3, 3)]


class TestScore:
    def test_sum_weighs_raw_values(self):
        rewards = [
            WeightedReward(reward=Table([20.0, 30.0], name="clip"), weight=0.5),
            WeightedReward(reward=Table([5.0, 4.0], name="size"), weight=-1.0),
        ]
        scored = score(make_samples(2), rewards, combine="sum")
        assert [s.reward for s in scored] == [5, 11]
        assert [dict(s.parts) for s in scored] == [{"clip": 20, "size": 5}, {"clip": 30, "size": 4}]
        assert [s.sample.id for s in scored] == ["0", "1"]

    def test_standardized_rewards_count_alike_on_any_scale(self):
        # Values -1, 0, 1 times any scale have the deviation sqrt(2/3): they become -sqrt(1.5), 0, sqrt(1.5).
        rewards = [
            WeightedReward(reward=Table([900.0, 1000.0, 1100.0], name="large")),
            WeightedReward(reward=Table([0.3, 0.1, 0.2], name="small"), weight=2.0),
        ]
        scored = score(make_samples(3), rewards, combine="standardized")
        unit = math.sqrt(1.5)
        assert [s.reward for s in scored] == pytest.approx([-unit + 2 * unit, -2 * unit, unit], abs=1e-5)
        assert scored[0].parts == pytest.approx({"large": 900, "small": 0.3})

    def test_standardization_leaves_failures_out(self):
        scored = score(make_samples(3), [WeightedReward(reward=Table([1.0, NAN, 3.0]))], max_failed=0.5)
        assert [s.reward for s in scored] == [pytest.approx(-1), None, pytest.approx(1)]

    def test_a_reward_that_does_not_vary_moves_nothing(self):
        rewards = [WeightedReward(reward=Table([27.1] * 3, name="flat")), WeightedReward(reward=Table([1.0, 2.0, 3.0]))]
        unit = math.sqrt(1.5)
        scored = score(make_samples(3), rewards)
        assert [s.reward for s in scored] == pytest.approx([-unit, 0, unit], abs=1e-6)

    def test_deviation_has_a_floor(self):
        value_N = standardize(torch.tensor([0.0, 1e-6], dtype=torch.float64))
        assert value_N.tolist() == pytest.approx([-0.5e-6 / STD_FLOOR, 0.5e-6 / STD_FLOOR])

    def test_without_a_part_that_counts_there_is_no_reward(self):
        rewards = [
            WeightedReward(reward=Table([1.0, NAN, 3.0], name="first")),
            WeightedReward(reward=Table([1.0, 2.0, NAN], name="second"), weight=-0.5),
        ]
        scored = score(make_samples(3), rewards, combine="sum", max_failed=0.5)
        assert [s.reward for s in scored] == [0.5, None, None]
        assert [set(s.parts) for s in scored] == [{"first", "second"}, {"second"}, {"first"}]

    def test_a_watched_reward_is_kept_and_not_combined(self):
        rewards = [
            WeightedReward(reward=Table([1.0, 2.0], name="trained")),
            WeightedReward(reward=Table([7.0, NAN], name="watched"), weight=0),
        ]
        scored = score(make_samples(2), rewards, combine="sum", max_failed=0.5)
        assert [s.reward for s in scored] == [1, 2]
        assert [dict(s.parts) for s in scored] == [{"trained": 1, "watched": 7}, {"trained": 2}]

    def test_a_flawed_sample_has_neither_parts_nor_reward(self):
        scored = score(make_samples(2, flawed=(0,)), [WeightedReward(reward=Table([0.0, 1.0]))])
        assert (dict(scored[0].parts), scored[0].reward) == ({}, None)
        assert scored[1].reward == 0  # alone it is its own mean

    def test_a_score_of_zero_is_a_score(self):
        (scored,) = score(make_samples(1), [WeightedReward(reward=Table([0.0]))], combine="sum")
        assert (dict(scored.parts), scored.reward) == ({"table": 0}, 0)

    def test_rewards_of_one_name_are_refused(self):
        with pytest.raises(ConfigError, match="two rewards are named 'table'"):
            score(make_samples(1), [WeightedReward(reward=Table([1.0])), WeightedReward(reward=Table([1.0]))])

    @pytest.mark.parametrize("rewards", [[], [WeightedReward(reward=Table([1.0]), weight=0)]])
    def test_nothing_to_rank_by_is_refused(self, rewards):
        with pytest.raises(ConfigError, match="no reward has a weight"):
            score(make_samples(1), rewards)


class TestCombination:
    """Three samples on which "a" is 1, 2, 3 and "b" 30, 20, 10."""

    def rewards_of(self, **how) -> list[float | None]:
        values = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([30.0, 20.0, 10.0])}
        return [s.reward for s in combined(make_samples(3), values, Combination(**how))]

    def test_running_statistics_standardize_all_but_the_rounds_own(self):
        moments = {"a": Moments(count=9, mean=2.0, variance=4.0), "b": Moments(count=9, mean=0.0, variance=100.0)}
        how = {"weights": {"a": 1.0, "b": 0.5}, "moments": moments}
        # z of a: -.5, 0, .5; of b, weighted: 1.5, 1, .5
        assert self.rewards_of(how="weighted-linear", **how) == [1.0, 1.0, 1.0]
        assert self.rewards_of(how="worst-case", **how) == [-0.5, 0.0, 0.5]
        unit = math.sqrt(1.5)
        assert self.rewards_of(how="standardized", **how) == pytest.approx([-unit / 2, 0, unit / 2])

    def test_without_running_statistics_the_samples_own_are_taken(self):
        unit = math.sqrt(1.5)
        found = self.rewards_of(how="worst-case", weights={"a": 1.0, "b": 1.0})
        assert found == pytest.approx([-unit, 0, -unit])

    def test_samples_below_a_floor_rank_below_all_others_in_their_own_order(self):
        # alone a ranks 1, 2, 3; b must reach 20, which the last does not: it goes one deviation, sqrt(2/3), below 1
        found = self.rewards_of(how="sum", weights={"a": 1.0, "b": 0.0}, floors={"b": 20.0})
        assert found == pytest.approx([1.0, 2.0, 1.0 - math.sqrt(2 / 3)])
        # of two below, the better stays the better: 2 and 3 move down together
        found = self.rewards_of(how="sum", weights={"a": 1.0, "b": 0.0}, floors={"b": 30.0})
        assert found == pytest.approx([1.0, -math.sqrt(2 / 3), 1.0 - math.sqrt(2 / 3)])

    def test_with_a_negative_weight_a_floor_is_a_ceiling(self):
        found = self.rewards_of(how="sum", weights={"a": -1.0, "b": 0.0}, floors={"a": 2.0})
        assert found[:2] == [-1.0, -2.0] and found[2] < -2.0

    def test_floors_that_none_or_all_miss_change_nothing(self):
        for floor in (0.0, 99.0):
            assert self.rewards_of(how="sum", weights={"a": 1.0, "b": 0.0}, floors={"b": floor}) == [1, 2, 3]

    def test_a_reward_that_failed_has_not_reached_its_floor(self):
        values = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0, NAN])}
        how = Combination(weights={"a": 1.0, "b": 0.0}, how="sum", floors={"b": 5.0})
        assert [s.missed for s in combined(make_samples(2), values, how)] == [(), ("b",)]


def test_a_round_says_which_reward_is_the_same_for_all_of_its_samples(tmp_path, caplog):
    run_rounds(three_weights_run(tiny_config(tmp_path, rounds=1), reward=lambda images, prompts: [3.0] * len(images)))
    lines = [record.getMessage() for record in caplog.records if record.name == "raftdiff.scoring"]
    assert lines == ["reward 'redness' is 3 for each of the round's 8 samples: it chooses none of them"]
    caplog.clear()
    values = {"watched": torch.ones(2), "varied": torch.tensor([1.0, 2.0, math.nan]), "lone": torch.ones(1)}
    warn_of_constants(values, {"watched": 0.0, "varied": 1.0, "lone": 1.0})
    assert not caplog.records
