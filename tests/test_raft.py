"""RAFT chooses by the rule that it was asked for, and trains on the plain error of what it chose."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch
from tiny_runs import PointPolicy

from raftdiff.algorithms.raft import Raft
from raftdiff.config import RunConfig
from raftdiff.errors import ConfigError
from raftdiff.protocols import Algorithm
from raftdiff.types import Batch, Draw, Example, Group, Phase, Prompt, Sample, Scored


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


def selected(raft: Raft, groups: Sequence[Group]) -> list[str]:
    return [example.sample.id for example in select(raft, groups)]


def select(raft: Raft, groups: Sequence[Group], *, round: int = 0, seed: int = 0) -> list[Example]:
    return raft.select(groups, round=round, seed=seed, phase=Phase(grown=round))


GROUPS = [group("a", 1.0, 5.0, 3.0), group("b", 9.0, 8.0, 7.0), group("c", 2.0, 0.0, 4.0)]


@pytest.mark.parametrize(
    ("raft", "expected"),
    [
        (Raft(), ["a-1", "b-0", "c-2"]),
        (Raft(keep=2), ["a-1", "a-2", "b-0", "b-1", "c-2", "c-0"]),
        (Raft(selection="global"), ["b-0", "b-1", "b-2"]),
        (Raft(selection="global", keep=2), ["a-1", "a-2", "b-0", "b-1", "b-2", "c-2"]),
        (Raft(selection="hybrid", hybrid_keep=2), ["a-1", "b-0"]),
    ],
    ids=["local", "local-2", "global", "global-2", "hybrid"],
)
def test_each_selection_keeps_what_the_paper_says_with_equal_weights(raft: Raft, expected: list[str]):
    examples = select(raft, GROUPS)
    assert [example.sample.id for example in examples] == expected
    assert [example.weight for example in examples] == [1.0] * len(expected)


def test_the_control_keeps_as_many_samples_of_each_prompt_by_the_round_and_seed_alone():
    raft = Raft(selection="random", keep=2)
    first = select(raft, GROUPS, round=1, seed=3)
    assert first == select(raft, GROUPS, round=1, seed=3)
    assert [example.sample.prompt.text for example in first] == ["a", "a", "b", "b", "c", "c"]
    assert len({example.sample.id for example in first}) == 6
    assert any(select(raft, GROUPS, round=round, seed=3) != first for round in range(2, 10))


def test_kl_beta_changes_the_selection_and_asks_for_the_log_ratio():
    # 5 - .5 * 8 = 1 loses to 3 - .5 * 1 = 2.5
    drifted = [group("a", 1.0, 5.0, 3.0, log_ratios=(0.0, 8.0, 1.0))]
    assert selected(Raft(), drifted) == ["a-1"] and not Raft().needs_log_ratio
    assert selected(Raft(kl_beta=0.5), drifted) == ["a-2"] and Raft(kl_beta=0.5).needs_log_ratio
    assert selected(Raft(kl_beta=0.5, selection="global"), drifted) == ["a-2"]
    assert selected(Raft(kl_beta=0.5, selection="hybrid", hybrid_keep=1), drifted) == ["a-2"]
    assert not Raft(kl_beta=0.5, selection="random").needs_log_ratio


def test_min_reward_drops_chosen_samples_below_it():
    assert selected(Raft(min_reward=5.0), GROUPS) == ["a-1", "b-0"]
    assert select(Raft(min_reward=9.5), GROUPS) == []


def test_min_margin_drops_prompts_whose_best_hardly_beats_their_mean():
    # Best above mean: a 5 - 3 = 2, b 9 - 8 = 1, c 4 - 2 = 2.
    assert selected(Raft(min_margin=1.5), GROUPS) == ["a-1", "c-2"]
    assert selected(Raft(min_margin=2.0), GROUPS) == ["a-1", "c-2"]
    assert selected(Raft(min_margin=2.5), GROUPS) == []
    assert selected(Raft(min_margin=1.5, selection="global"), GROUPS) == []
    control = select(Raft(min_margin=1.5, selection="random"), GROUPS)
    assert [example.sample.prompt.text for example in control] == ["a", "c"]


def test_min_margin_does_not_count_failed_samples():
    # Over the scored ones the mean is 4 and the margin 1; a failure taken for 0 would make it 5 - 8/3.
    assert selected(Raft(min_margin=1.5), [group("a", 3.0, None, 5.0)]) == []
    assert selected(Raft(min_margin=1.0), [group("a", 3.0, None, 5.0)]) == ["a-2"]


def test_a_group_without_variance_keeps_its_first_sample_unless_a_margin_is_asked_for():
    flat = [group("a", 0.1, 0.1, 0.1)]
    assert selected(Raft(), flat) == ["a-0"]
    assert selected(Raft(min_margin=1e-6), flat) == []


def test_prompts_with_no_scored_sample_give_nothing_and_are_named(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert selected(Raft(), [group("a red circle", None, None), group("b", 1.0, None)]) == ["b-0"]
    assert "'a red circle'" in caplog.text and "1 prompts" in caplog.text
    assert select(Raft(min_margin=1.0), [group("a", None)]) == select(Raft(), []) == []


def test_the_loss_is_the_weighted_error_and_no_reward_or_kl_enters_it():
    prompt = Prompt(text="a")
    samples = [
        Sample(id=str(k), prompt=prompt, seed=k, latents=torch.full((1, 2, 2), float(k) + 2.0)) for k in range(2)
    ]
    draw = Draw(noise=torch.zeros(2, 1, 2, 2), quantile_B=torch.zeros(2), dropped_B=torch.zeros(2, dtype=torch.bool))
    for raft in (Raft(), Raft(kl_beta=0.5)):
        policy = PointPolicy()
        examples = [Example(sample=sample) for sample in samples]
        batch = Batch(examples=examples, weight_B=torch.tensor([1.0, 0.5]), draw=draw)
        loss_B, metrics = raft.loss(policy, batch)  # type: ignore[arg-type]
        assert loss_B.tolist() == [1.0, 2.0]  # (2 - 1)^2 and .5 * (3 - 1)^2
        assert metrics["error"].tolist() == [1.0, 4.0]
        loss_B.sum().backward()
        assert policy.mean.grad is not None and policy.mean.grad.item() == -4.0  # -2 * 1 - .5 * 2 * 2


def test_raft_is_an_algorithm():
    assert isinstance(Raft(), Algorithm)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"selection": "locl"}, "did you mean 'local'"),
        ({"keep": 0}, "keep is 0"),
        ({"kl_beta": -0.1}, "kl_beta is -0.1"),
        ({"kl_beta": float("nan")}, "kl_beta is nan"),
        ({"selection": "hybrid"}, "hybrid_keep is None"),
        ({"selection": "hybrid", "hybrid_keep": 0}, "hybrid_keep is 0"),
        ({"selection": "hybrid", "hybrid_keep": 4, "keep": 2}, "keep 2"),
        ({"hybrid_keep": 4}, "the others do not take it"),
        ({"selection": "pareto", "keep": 2}, "pareto keeps whole fronts"),
        ({"selection": "pareto", "kl_beta": 1.0}, "pareto keeps whole fronts"),
        ({"min_margin": 0.0}, "min_margin is 0.0"),
        ({"min_reward": float("inf")}, "min_reward is inf"),
    ],
)
def test_options_that_cannot_be_run_are_refused(options: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        Raft(**options)


def of_k(samples_per_prompt: int) -> RunConfig:
    return RunConfig.model_validate({"sampling": {"samples_per_prompt": samples_per_prompt}})


def test_k_that_leaves_nothing_to_select_is_refused_except_for_the_control_and_global():
    for raft in (Raft(), Raft(selection="hybrid", hybrid_keep=4)):
        with pytest.raises(ConfigError, match=r"nothing to select.*samples_per_prompt >= 2 or selection: random"):
            raft.validate(of_k(1))
        raft.validate(of_k(2))
    with pytest.raises(ConfigError, match="nothing to select"):
        Raft(keep=4).validate(of_k(4))
    Raft(selection="random").validate(of_k(1))
    Raft(selection="global").validate(of_k(1))


def test_a_front_needs_two_rewards_and_two_samples():
    rewards = [{"name": "jpeg"}, {"name": "clip", "weight": 0.5}]
    pareto = Raft(selection="pareto")
    with pytest.raises(ConfigError, match="give at least two a weight"):
        pareto.validate(of_k(8))
    with pytest.raises(ConfigError, match="nothing to select"):
        pareto.validate(RunConfig.model_validate({"rewards": rewards, "sampling": {"samples_per_prompt": 1}}))
    pareto.validate(RunConfig.model_validate({"rewards": rewards}))


@pytest.mark.parametrize("selection", ["local", "global", "random"])
def test_keeping_more_than_are_sampled_is_refused(selection):
    with pytest.raises(ConfigError, match="keep is 5 of K = 4"):
        Raft(selection=selection, keep=5).validate(of_k(4))
