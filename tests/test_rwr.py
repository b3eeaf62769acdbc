"""Reward-weighted regression trains on every sample, the more the better it is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from tiny_runs import exported, three_weights_run, tiny_config

from raftdiff.algorithms.raft import Raft
from raftdiff.algorithms.rwr import Rwr
from raftdiff.config import RunConfig
from raftdiff.errors import ConfigError
from raftdiff.rounds import run_rounds
from raftdiff.types import Example, Group, Phase, Prompt, Sample, Scored


def group(text: str, *rewards: float | None) -> Group:
    """The samples of the prompt `text`; the k-th has the id `text-k`."""
    prompt = Prompt(text=text)
    return Group(
        prompt=prompt,
        samples=tuple(
            Scored(sample=Sample(id=f"{text}-{k}", prompt=prompt, seed=k), parts={}, reward=reward)
            for k, reward in enumerate(rewards)
        ),
    )


def select(rwr: Rwr | Raft, groups: Sequence[Group]) -> list[Example]:
    return rwr.select(groups, round=1, seed=0, phase=Phase(grown=1))


def weights(rwr: Rwr, groups: Sequence[Group]) -> dict[str, float]:
    return {example.sample.id: example.weight for example in select(rwr, groups)}


def test_weights_are_exponential_in_the_reward_and_sum_to_the_number_of_scored_samples_of_each_prompt():
    # exp(r / .5) of 0 and .5 ln 3 is 1 and 3: a quarter and three quarters of two samples. The failed one is not one.
    groups = [group("a", 0.0, None, 0.5 * math.log(3)), group("b", 7.0, 7.0, 7.0)]
    found = weights(Rwr(beta=0.5), groups)
    assert found == pytest.approx({"a-2": 1.5, "a-0": 0.5, "b-0": 1.0, "b-1": 1.0, "b-2": 1.0})


def test_a_constant_for_each_prompt_changes_no_weight():
    assert weights(Rwr(), [group("a", 1.0, 2.0)]) == weights(Rwr(), [group("a", 1001.0, 1002.0)])


def test_a_small_beta_is_raft_and_a_large_one_trains_on_all_alike():
    groups = [group("a", 1.0, 5.0, 3.0), group("b", 9.0, 8.0, 7.0)]
    best = [example.sample.id for example in select(Raft(), groups)]
    assert weights(Rwr(beta=1e-3, min_weight=0.5), groups) == pytest.approx(dict.fromkeys(best, 3.0))
    assert list(weights(Rwr(beta=1e9), groups).values()) == pytest.approx([1.0] * 6)


def test_samples_under_the_least_weight_are_left_out_and_the_others_keep_theirs():
    groups = [group("a", 0.0, math.log(3))]
    assert weights(Rwr(min_weight=0.6), groups) == pytest.approx({"a-1": 1.5})
    assert len(select(Rwr(min_weight=0.4), groups)) == 2


def test_prompts_without_a_reward_give_nothing():
    assert select(Rwr(), [group("a", None, None)]) == select(Rwr(), []) == []


def test_a_run_raises_its_reward_by_the_weights_alone(tmp_path):
    def finish(name: str, beta: float):
        options = {"beta": beta}
        config = tiny_config(
            tmp_path / name,
            algorithm={"name": "rwr", "options": options},
            sampling={"samples_per_prompt": 4},
            training={"steps": 20},
        )
        return run_rounds(three_weights_run(config))

    sharp, flat = finish("sharp", 0.1), finish("flat", 1e9)
    assert [report.selected for report in sharp.reports[1:]] == [16, 16]
    gains = [result.reports[-1].evaluations[0].gains["redness"].mean for result in (sharp, flat)]
    assert gains[0] > 20 and gains[0] > gains[1] + 20  # of 255
    assert exported(sharp.folder) != exported(flat.folder)


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": math.nan}, {"min_weight": -0.1}, {"min_weight": 1.1}])
def test_options_that_cannot_be_run_are_refused(options: dict):
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is "):
        Rwr(**options)


def test_one_sample_a_prompt_is_refused():
    with pytest.raises(ConfigError, match="samples_per_prompt >= 2"):
        Rwr().validate(RunConfig.model_validate({"sampling": {"samples_per_prompt": 1}}))
