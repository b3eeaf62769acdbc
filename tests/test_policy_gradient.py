"""Policy gradients: the steps that led to better pictures become more likely, and nothing else is trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from tiny_runs import ThreeWeights, exported, pipeline_run, three_weights_run, tiny_config, tiny_pipeline

from raftdiff.algorithms.policy_gradient import PolicyGradient
from raftdiff.build import build_algorithm
from raftdiff.config import RunConfig
from raftdiff.errors import ConfigError, TrainingError
from raftdiff.pipelines.schedule import gaussian_log_prob
from raftdiff.rounds import run_rounds
from raftdiff.selection import group_relative
from raftdiff.store import SampleStore
from raftdiff.types import Batch, Draw, Example, Group, Phase, Prompt, Sample, Scored, Trajectory

LOG_PROB = torch.tensor([-1.0, -2.0, -3.0, math.nan])


def group(text: str, *rewards: float | None) -> Group:
    """The samples of the prompt `text`, of trajectories whose last step has no density; the k-th is `text-k`."""
    prompt = Prompt(text=text)
    walk = Trajectory(states=torch.zeros(5, 2), times=torch.zeros(5), log_prob_T=LOG_PROB, noise_level=1.0)
    samples = [Sample(id=f"{text}-{k}", prompt=prompt, seed=k, trajectory=walk) for k in range(len(rewards))]
    scored = (Scored(sample=s, parts={}, reward=reward) for s, reward in zip(samples, rewards, strict=True))
    return Group(prompt=prompt, samples=tuple(scored))


GROUPS = [group("a", 1.0, 2.0, 3.0), group("b", 5.0, 5.0, 5.0), group("c", 4.0, None, 8.0), group("d", None)]


def rows(options: dict[str, Any], groups: Sequence[Group], *, round: int = 1, seed: int = 0) -> list[tuple]:
    examples = PolicyGradient(**options).select(groups, round=round, seed=seed, phase=Phase(grown=round))
    return [(example.sample.id, example.step, pytest.approx(example.weight)) for example in examples]


# -- advantages --------------------------------------------------------------------------------------------------------


def test_advantages_are_in_deviations_of_the_prompts_own_rewards():
    a, c = math.sqrt(1.5), 1.0  # 1 / sqrt(2 / 3), and 2 / 2
    expected = {"a-0": -a, "a-1": 0.0, "a-2": a, "b-0": 0.0, "b-1": 0.0, "b-2": 0.0, "c-0": -c, "c-2": c}
    assert group_relative(GROUPS, deviation="group", floor=0.0) == pytest.approx(expected)


def test_advantages_in_deviations_of_the_round_keep_their_prompts_means():
    deviation = math.sqrt(169 / 8 - (33 / 8) ** 2)  # of 1 2 3 5 5 5 4 8
    expected = {"a-0": -1.0, "a-1": 0.0, "a-2": 1.0, "b-0": 0.0, "b-1": 0.0, "b-2": 0.0, "c-0": -2.0, "c-2": 2.0}
    found = group_relative(GROUPS, deviation="batch", floor=0.0)
    assert found == pytest.approx({name: value / deviation for name, value in expected.items()})


def test_the_floor_keeps_the_advantages_small_where_rewards_almost_agree():
    almost = [group("a", 1.0, 1.0 + 1e-6)]
    assert group_relative(almost, deviation="group", floor=0.0)["a-1"] == pytest.approx(1.0, rel=1e-6)
    assert group_relative(almost, deviation="group", floor=1e-4)["a-1"] == pytest.approx(5e-7 / 1.005e-4, rel=1e-4)


def test_rewards_that_are_all_the_same_give_no_advantage_however_they_round():
    for value in (0.1, 1 / 3, 1e9 + 0.3):
        found = group_relative([group("a", *[value] * 7)], deviation="group", floor=0.0)
        assert list(found.values()) == [0.0] * 7
    assert group_relative([], deviation="batch", floor=0.0) == {}


# -- selection ---------------------------------------------------------------------------------------------------------


def test_each_step_with_a_density_is_trained_on_with_the_advantage_of_its_sample():
    a = math.sqrt(1.5)
    assert rows({"std_floor": 0.0}, GROUPS) == [
        *[("a-0", step, -a) for step in (0, 1, 2)],
        *[("a-2", step, a) for step in (0, 1, 2)],
        *[("c-0", step, -1.0) for step in (0, 1, 2)],
        *[("c-2", step, 1.0) for step in (0, 1, 2)],
    ]


def test_advantages_are_clipped():
    outlier = [group("a", *[0.0] * 99, 1.0)]
    weights = {weight.expected for _, _, weight in rows({"max_advantage": 2.0}, outlier)}
    assert max(weights) == 2.0 and min(weights) == pytest.approx(-0.01 / (math.sqrt(0.0099) + 1e-4))


def test_steps_per_sample_draws_as_many_anew_for_each_sample_round_and_seed():
    def drawn(**place: int) -> list[tuple]:
        return [row[:2] for row in rows({"steps_per_sample": 2}, [group("a", *range(30))], **place)]

    first = drawn()
    assert first == drawn() and first != drawn(round=2) and first != drawn(seed=1)
    assert len(first) == len(set(first)) == 60 and {step for _, step in first} == {0, 1, 2}
    assert len({tuple(step for name, step in first if name == f"a-{k}") for k in range(30)}) == 3
    assert len(rows({"steps_per_sample": 4}, [group("a", 0.0, 1.0)])) == 6


# -- the loss ----------------------------------------------------------------------------------------------------------


class Walk(ThreeWeights):
    """Whose pictures are one Gaussian step from noise, of deviation 1, around the color."""

    log_prob_rounding = 1e-5

    def sample(self, prompts, seeds, *, guidance_scale=None, noise_level=None) -> list[Sample]:
        samples = super().sample(prompts, seeds)
        return samples if noise_level is None else [self._with_trajectory(sample) for sample in samples]

    def _with_trajectory(self, sample: Sample) -> Sample:
        assert sample.latents is not None
        walk = Trajectory(
            states=torch.stack([torch.zeros(3, 2, 2), sample.latents]),
            times=torch.tensor([1.0, 0.0]),
            log_prob_T=self._density(sample.latents[None]).detach(),
            noise_level=1.0,
        )
        return replace(sample, trajectory=walk)

    def _density(self, x: torch.Tensor) -> torch.Tensor:
        return gaussian_log_prob(x, self.color[:, None, None], torch.ones(1, 1, 1, 1))

    def log_prob(self, samples: Sequence[Sample], steps: Sequence[int]) -> torch.Tensor:
        assert set(steps) == {0}
        return self._density(torch.stack([s.latents for s in samples if s.latents is not None]))[:, None]


def walk_batch(policy: Walk, *advantages: float, updates: int = 0) -> Batch:
    prompt, count = Prompt(text="a"), len(advantages)
    samples = policy.sample([prompt] * count, range(count), noise_level=1.0)
    return Batch(
        examples=[Example(sample=s, weight=a, step=0) for s, a in zip(samples, advantages, strict=True)],
        weight_B=torch.tensor(advantages),
        draw=Draw(noise=torch.zeros(count), quantile_B=torch.zeros(count), dropped_B=torch.zeros(count).bool()),
        updates=updates,
    )


@pytest.mark.parametrize("form", ["clipped", "score"])
def test_before_the_first_update_both_forms_have_the_gradient_of_the_advantage_times_the_log_density(form: Any):
    policy = Walk()
    batch = walk_batch(policy, 1.5, -0.5)
    loss_B, metrics = PolicyGradient(form=form).loss(policy, batch)
    if form == "clipped":
        assert loss_B.tolist() == [-1.5, 0.5]
    else:
        old = [s.trajectory.log_prob_T.item() for s in batch.samples if s.trajectory]
        assert loss_B.tolist() == pytest.approx([-1.5 * old[0], 0.5 * old[1]])
    loss_B.sum().backward()
    by_hand = sum(-a * s.latents.mean((1, 2)) / 3 for a, s in zip((1.5, -0.5), batch.samples, strict=True))
    assert policy.color.grad is not None
    torch.testing.assert_close(policy.color.grad, by_hand)
    assert metrics["ratio"].tolist() == [1.0, 1.0] and metrics["clipped"].tolist() == [0.0, 0.0]
    assert set(metrics) == {"ratio", "ratio_change", "clipped"}


def test_after_an_update_a_ratio_outside_the_range_has_no_gradient_on_the_side_of_its_advantage():
    policy = Walk()
    batch = walk_batch(policy, *[1.0] * 5, updates=1)
    with torch.no_grad():
        policy.color += 0.1
    changes = [0.1 * float(s.latents.mean()) - 0.005 for s in batch.samples if s.latents is not None]
    less_likely, more_likely = 0, 4
    assert changes[less_likely] < -0.01 and changes[more_likely] > 0.01
    loss_B, metrics = PolicyGradient(clip=0.01).loss(policy, batch)
    assert metrics["ratio"].tolist() == pytest.approx([math.exp(change) for change in changes])
    assert metrics["ratio_change"].tolist() == pytest.approx(
        [abs(math.exp(change) - 1) for change in changes], abs=1e-6
    )
    assert metrics["clipped"].tolist() == [float(abs(math.exp(change) - 1) > 0.01) for change in changes]
    assert loss_B[more_likely].item() == pytest.approx(-1.01)
    assert loss_B[less_likely].item() == pytest.approx(-math.exp(changes[less_likely]))
    [gradient] = torch.autograd.grad(loss_B[more_likely], policy.color, retain_graph=True)
    assert gradient.tolist() == [0.0] * 3
    assert torch.autograd.grad(loss_B[less_likely], policy.color)[0].abs().sum() > 0


def test_the_penalty_is_the_kl_of_a_step_to_the_base_model_by_the_dimension():
    """Of N(c, 1) to N(0, 1) it is c^2 / 2 for each; the estimate has that mean, for small c."""
    policy = Walk()
    with torch.no_grad():
        policy.color += 0.1
    batch = walk_batch(policy, *[1.0] * 4000)
    plain_B, _ = PolicyGradient().loss(policy, batch)
    loss_B, metrics = PolicyGradient(kl_beta=3.0).loss(policy, batch)
    torch.testing.assert_close(loss_B - plain_B, 3.0 * metrics["kl"])
    assert (metrics["kl"] >= 0).all() and metrics["kl"].mean().item() == pytest.approx(0.005, rel=0.15)
    [gradient] = torch.autograd.grad((loss_B - plain_B).mean(), policy.color)
    assert (gradient > 0).all()  # back towards the base


def test_training_a_model_that_is_not_the_one_that_sampled_is_refused():
    policy = Walk()
    batch = walk_batch(policy, 1.0, -1.0)
    with torch.no_grad():
        policy.color += 1e-3
    with pytest.raises(TrainingError, match=r"off 1 by .*rounding explains.*moving average.*guidance_scale"):
        PolicyGradient().loss(policy, batch)
    PolicyGradient().loss(policy, replace(batch, updates=1))
    policy.log_prob_rounding = 0.1  # a coarser arithmetic
    PolicyGradient().loss(policy, batch)
    policy.color.data[0] = math.nan
    with pytest.raises(TrainingError, match="off 1 by nan"):
        PolicyGradient().loss(policy, batch)


# -- runs --------------------------------------------------------------------------------------------------------------


def walk_run(tmp_path, policy: Walk, options: dict[str, Any], **settings: Any):
    config = tiny_config(tmp_path, algorithm={"name": "policy-gradient", "options": options}, **settings)
    return run_rounds(three_weights_run(config, policy=policy))


@pytest.mark.parametrize(
    ("options", "training"),
    [
        ({"clip": 0.1}, {"steps": None, "epochs": 3, "batch_size": 8}),
        ({"form": "score"}, {"steps": 1, "batch_size": 64}),
        ({"clip": 0.1, "kl_beta": 0.1, "std": "batch"}, {"steps": 4, "batch_size": 16}),
    ],
)
def test_policy_gradients_raise_the_reward(tmp_path, options, training):
    policy = Walk()
    sampling = {"samples_per_prompt": 8}
    result = walk_run(tmp_path, policy, options, rounds=6, sampling=sampling, training=training)
    assert result.aligned[0].gains["redness"].low > 10  # of 255
    assert policy.color[0] > 0 > policy.color[2]
    assert all("ratio" in report.training for report in result.reports[1:])


PIPELINE = {
    "algorithm": {"name": "policy-gradient", "options": {"clip": 1e-3, "kl_beta": 0.01, "steps_per_sample": 2}},
    "sampling": {"num_inference_steps": 2, "trajectory_steps": 3, "guidance_scale": 3.0},
    "training": {"steps": None, "epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "save_every_steps": 2},
}


def test_a_pipeline_is_trained_on_its_trajectories_and_resumed_as_if_it_had_not_stopped(tmp_path):
    whole = run_rounds(pipeline_run(tiny_config(tmp_path / "whole", **PIPELINE)))
    first, second = whole.reports[1:]
    selection = SampleStore(whole.folder).read_selection(1)
    assert first.selected == len(selection) == 2 * len({example.sample.id for example in selection})
    assert first.training["steps"] == math.ceil(first.selected / 4)
    assert first.training["ratio"] == pytest.approx(1, abs=0.1)
    assert second.training["kl"] > 0 and second.training["ratio_change"] > 0
    cost = {stage.stage: stage.passes for stage in first.ledger}
    assert cost["sample"] == 4 * 2 * 3 * 2  # x steps of a trajectory x (with and without the prompt)
    assert cost["train"] == first.selected * 2 * (3 + 1)  # there and back, and the base model
    [sample, *_] = SampleStore(whole.folder).read_samples(1)
    assert sample.trajectory is not None and sample.trajectory.guidance_scale == 3.0

    run_rounds(pipeline_run(tiny_config(tmp_path / "stopped", **PIPELINE | {"rounds": 1})))
    resumed = run_rounds(pipeline_run(tiny_config(tmp_path / "stopped", **PIPELINE)), resume=True)
    assert exported(resumed.folder) == exported(whole.folder)
    assert [r.training for r in resumed.reports] == [r.training for r in whole.reports]


def test_the_embedded_models_own_scheduler_is_refused_before_anything_is_sampled(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ConfigError, match="set model.scheduler to DDIMScheduler"):
        pipeline_run(tiny_config(tmp_path, **PIPELINE), pipeline=pipeline)
    assert not list(tmp_path.iterdir())


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "cliped"}, "did you mean 'clipped'"),
        ({"std": "all"}, "there are group, batch"),
        ({"noise_level": 0.0}, "noise_level is 0.0"),
        ({"clip": -1e-4}, "clip is -0.0001"),
        ({"max_advantage": math.inf}, "max_advantage is inf"),
        ({"std_floor": -1.0}, "std_floor is -1.0"),
        ({"kl_beta": math.nan}, "kl_beta is nan"),
        ({"steps_per_sample": 0}, "at least 1 step"),
    ],
)
def test_options_that_cannot_be_run_are_refused(options: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        PolicyGradient(**options)


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ({"sampling": {"samples_per_prompt": 1}}, {}, "samples_per_prompt must be at least 2"),
        ({"sampling": {"trajectory_steps": 5}}, {"steps_per_sample": 6}, "at most the 5 steps"),
        ({"training": {"ema_decay": 0.9}}, {}, "ema_decay must be 0"),
        ({"adapter": {"dropout": 0.1}}, {}, "dropout must be 0"),
        ({"algorithm": {"teacher": "other"}}, {}, "teacher must be left out"),
        ({"algorithm": {"replay": 0.5}}, {}, "replay must be 0"),
        ({"data": {"path": "mine"}}, {}, "data must be left out"),
        ({"training": {"steps": 2}}, {"form": "score"}, "training.steps must be 1"),
    ],
)
def test_settings_under_which_another_policy_would_be_trained_are_refused(settings, options, words: str):
    algorithm = settings.pop("algorithm", {}) | {"name": "policy-gradient", "options": options}
    with pytest.raises(ConfigError, match=words):
        build_algorithm(RunConfig.model_validate(settings | {"algorithm": algorithm}))


def test_it_is_registered_and_asks_for_trajectories():
    config = RunConfig.model_validate({"algorithm": {"name": "policy-gradient", "options": {"noise_level": 0.7}}})
    algorithm = build_algorithm(config)
    assert isinstance(algorithm, PolicyGradient) and algorithm.noise_level == 0.7
    assert PolicyGradient().noise_level == 1.0
