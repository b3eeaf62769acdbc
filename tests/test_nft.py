"""DiffusionNFT: towards good samples, away from bad ones, and nowhere where all are alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_models
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_runs import ThreeWeights, exported, pipeline_run, three_weights_run, tiny_config

from raftdiff.algorithms.nft import Nft
from raftdiff.build import build_algorithm
from raftdiff.config import AdapterConfig, RunConfig
from raftdiff.errors import ConfigError
from raftdiff.losses import forward_process
from raftdiff.pipelines.diffusion import DiffusionPolicy
from raftdiff.pipelines.schedule import NoiseSchedule
from raftdiff.rounds import run_rounds
from raftdiff.types import Batch, Denoised, Draw, Example, Group, Phase, Prompt, Sample, Scored


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_papers_by_hand():
    """rho = 2.5 / 10 + 1/2; x_plus = (1.75, 2), x_minus = (1.25, 2): off x_0 = (1, 3) by (.75, -1) and (.25, -1)."""
    loss_B, metrics = forward_process(
        row(1.0, 3.0), row(2.0, 2.0), row(1.5, 2.0), torch.tensor([2.5]), beta=0.5, max_advantage=5.0
    )
    positive, negative = (0.5625 + 1) / 2 / 0.875, (0.0625 + 1) / 2 / 0.625
    assert loss_B.item() == pytest.approx(5 / 0.5 * (0.75 * positive + 0.25 * negative))
    assert metrics["positive_error"].item() == pytest.approx(positive)
    assert metrics["negative_error"].item() == pytest.approx(negative)
    assert metrics["moved"].item() == pytest.approx(0.125)


@pytest.mark.parametrize(("advantage", "slope"), [(5.0, 5.0), (2.5, 2.5), (0.0, 0.0), (-5.0, -5.0), (-70.0, -5.0)])
def test_at_the_start_the_loss_is_that_of_the_sampler_and_its_slope_the_advantage(advantage: float, slope: float):
    """Where x_hat = x_old both errors are the same, here (1 + 1) / 2 / 1; the slope is A (2 rho - 1) d / w."""
    old = row(2.0, 2.0)
    predicted = old.clone().requires_grad_()
    for beta in (0.1, 1.0):
        loss_B, metrics = forward_process(
            row(1.0, 3.0), predicted, old, torch.tensor([advantage]), beta=beta, max_advantage=5.0
        )
        assert loss_B.item() == pytest.approx(5 / beta * 1.0) and metrics["moved"].item() == 0.0
        [gradient] = torch.autograd.grad(loss_B.sum(), predicted)
        assert gradient.flatten().tolist() == pytest.approx([slope, -slope])


def test_samples_that_are_all_alike_hold_the_policy_where_it_sampled():
    """With rho = 1/2 a move aside raises the loss, and one towards or away from the sample gains nothing."""
    x0, old = row(1.0, -1.0, 1.0, -1.0), torch.zeros(1, 4, dtype=torch.float64)

    def loss(*predicted: float) -> float:
        zero = torch.tensor([0.0])
        return forward_process(x0, row(*predicted), old, zero, beta=1.0, max_advantage=5.0)[0].item()

    assert loss(0.0, 0.0, 0.0, 0.0) == 5.0
    assert loss(0.2, 0.2, 0.2, 0.2) == pytest.approx(5 * 1.04)
    assert loss(0.2, -0.2, 0.2, -0.2) == pytest.approx(5.0) == loss(-0.2, 0.2, -0.2, 0.2)


def test_the_weights_carry_no_gradient_and_a_perfect_prediction_is_finite():
    x0 = row(1.0, 2.0)
    predicted = x0.clone().requires_grad_()
    loss_B, _ = forward_process(x0, predicted, x0, torch.tensor([5.0]), beta=1.0, max_advantage=5.0)
    loss_B.sum().backward()
    assert loss_B.item() == 0.0 and predicted.grad is not None and predicted.grad.abs().sum() == 0
    _, metrics = forward_process(x0, predicted.detach() + 1, x0, torch.tensor([5.0]), beta=1.0, max_advantage=5.0)
    assert not any(value_B.requires_grad for value_B in metrics.values())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_to_mix_clean_latents_is_to_mix_predictions(prediction: str):
    flow = prediction == "flow"
    schedule = NoiseSchedule(FlowMatchEulerDiscreteScheduler() if flow else tiny_models.betas(prediction))
    new, old, x_t = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t_B = torch.tensor([200.0, 700.0]) if flow else torch.tensor([200, 700])
    for weight in (0.3, -0.3, 1.5):
        mixed = schedule.x0(weight * new + (1 - weight) * old, x_t, t_B)
        apart = weight * schedule.x0(new, x_t, t_B) + (1 - weight) * schedule.x0(old, x_t, t_B)
        torch.testing.assert_close(mixed, apart, rtol=1e-6, atol=1e-6)


# -- selection ---------------------------------------------------------------------------------------------------------


def test_every_scored_sample_is_trained_on_with_its_clipped_advantage():
    prompt = Prompt(text="a")
    rewards = [1.0, None, 3.0, 2.0]
    samples = [
        Scored(sample=Sample(id=f"{k}", prompt=prompt, seed=k), parts={}, reward=r) for k, r in enumerate(rewards)
    ]
    groups = [Group(prompt=prompt, samples=tuple(samples))]
    a = math.sqrt(1.5)
    for limit, expected in ((5.0, [-a, a, 0.0]), (1.0, [-1.0, 1.0, 0.0])):
        nft = Nft(max_advantage=limit, std_floor=0.0)
        examples = nft.select(groups, round=1, seed=0, phase=Phase(grown=1))
        assert [example.sample.id for example in examples] == ["0", "2", "3"]
        assert [example.weight for example in examples] == pytest.approx(expected)


# -- policies ----------------------------------------------------------------------------------------------------------


class Denoiser(ThreeWeights):
    """Which takes any noised latents for its color."""

    def denoised(self, samples: Sequence[Sample], draw: Draw) -> Denoised:
        x0 = torch.stack([s.latents for s in samples if s.latents is not None])
        color = self.color[:, None, None].expand_as(x0)
        return Denoised(x0=x0, predicted_x0=color, prediction=color)


def test_the_sampling_policy_is_the_average_and_the_penalty_is_to_the_base():
    policy, seen = Denoiser(), []

    @contextmanager
    def averaged() -> Iterator[None]:
        trained, policy.color.data = policy.color.data, torch.full((3,), 0.25)
        seen.append(torch.is_grad_enabled())
        yield
        policy.color.data = trained

    with torch.no_grad():
        policy.color += 0.5
    sample = Sample(id="x", prompt=Prompt(text="a"), seed=0, latents=torch.full((3, 2, 2), 2.0))
    draw = Draw(noise=torch.zeros(1), quantile_B=torch.zeros(1), dropped_B=torch.zeros(1).bool())
    batch = Batch(examples=[Example(sample=sample)], weight_B=torch.tensor([5.0]), draw=draw, averaged=averaged)
    loss_B, metrics = Nft(kl_weight=2.0).loss(policy, batch)
    # x_hat = .5, x_old = .25, x_plus = .5: off by 1.5, which is its own weight; rho = 1; KL .25 to the base's 0
    assert loss_B.item() == pytest.approx(5 * 1.5 + 2.0 * 0.25)
    assert metrics["kl"].item() == pytest.approx(0.25) and metrics["moved"].item() == pytest.approx(0.0625)
    loss_B.sum().backward()
    assert policy.color.grad is not None and policy.color.grad.sum().item() == pytest.approx(-5 * 2 + 2.0 * 2 * 0.5)
    assert seen == [False]
    assert "kl" not in Nft(kl_weight=0.0).loss(policy, batch)[1]


@pytest.mark.parametrize("family", ["sd-eps", "sd-v", "sd3", "flux"])
def test_of_real_pipelines_the_loss_at_the_start_is_the_error_of_the_clean_latents(family: str):
    policy = DiffusionPolicy(
        tiny_models.FAMILIES[family](),
        AdapterConfig(rank=2),
        call={"height": 16, "width": 16},
        num_inference_steps=2,
        guidance_scale=1.0,
        caption_dropout=0.0,
    )
    samples = policy.sample([Prompt(text="a red circle"), Prompt(text="a blue square")], [1, 2])
    draw = policy.draw(samples, torch.Generator().manual_seed(0))
    batch = Batch(examples=[Example(sample=s) for s in samples], weight_B=torch.tensor([5.0, 0.0]), draw=draw)
    loss_B, metrics = Nft().loss(policy, batch)
    x0, x_t, t_B, _ = policy._noised(samples, draw)
    with torch.no_grad():
        off = policy._schedule.x0(policy.predict(x_t, t_B, [s.prompt.text for s in samples]), x_t, t_B) - x0
    expected_B = 5 * off.square().flatten(1).mean(1) / off.abs().flatten(1).mean(1)
    torch.testing.assert_close(loss_B, expected_B, rtol=1e-4, atol=1e-5)
    assert metrics["kl"].tolist() == [0.0, 0.0] and metrics["moved"].tolist() == [0.0, 0.0]
    moves, stays = (torch.autograd.grad(loss, policy.parameters(), retain_graph=True) for loss in loss_B)
    assert sum(float(g.abs().sum()) for g in moves) > 1e-3 > sum(float(g.abs().sum()) for g in stays)


# -- runs --------------------------------------------------------------------------------------------------------------


def test_it_raises_the_reward(tmp_path):
    policy = Denoiser()
    config = tiny_config(
        tmp_path,
        rounds=6,
        algorithm={"name": "nft"},
        sampling={"samples_per_prompt": 8},
        training={"steps": 20, "batch_size": 16, "learning_rate": 0.02, "ema_decay": 0.9},
    )
    result = run_rounds(three_weights_run(config, policy=policy))
    assert result.aligned[0].gains["redness"].low > 10  # of 255
    assert {"kl", "moved", "positive_error", "negative_error"} <= result.reports[1].training.keys()


PIPELINE: dict[str, Any] = {
    "algorithm": {"name": "nft"},
    "training": {"ema_decay": 0.9, "learning_rate": 1e-3, "save_every_steps": 2},
}


def test_a_pipeline_is_trained_and_resumed_as_if_it_had_not_stopped(tmp_path):
    whole = run_rounds(pipeline_run(tiny_config(tmp_path / "whole", **PIPELINE)))
    first = whole.reports[1]
    cost = {stage.stage: stage.passes for stage in first.ledger}
    assert first.selected == 8 and cost["train"] == 3 * 2 * (3 + 1 + 1)  # there and back, the average, the base
    assert whole.reports[2].training["moved"] > 0

    run_rounds(pipeline_run(tiny_config(tmp_path / "stopped", **PIPELINE, rounds=1)))
    resumed = run_rounds(pipeline_run(tiny_config(tmp_path / "stopped", **PIPELINE)), resume=True)
    assert exported(resumed.folder) == exported(whole.folder)
    assert [r.training for r in resumed.reports] == [r.training for r in whole.reports]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, "beta is 0.0"),
        ({"max_advantage": -1.0}, "max_advantage is -1.0"),
        ({"std": "grup"}, "did you mean 'group'"),
        ({"std_floor": math.nan}, "std_floor is nan"),
        ({"kl_weight": -1.0}, "kl_weight is -1.0"),
    ],
)
def test_options_that_cannot_be_run_are_refused(options: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        Nft(**options)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"training": {"ema_decay": 0.0}}, "ema_decay must be above 0"),
        ({"sampling": {"samples_per_prompt": 1}}, "samples_per_prompt must be at least 2"),
        ({"algorithm": {"name": "nft", "teacher": "other"}}, "teacher must be left out"),
        ({"algorithm": {"name": "nft", "replay": 0.5}}, "replay must be 0"),
        ({"data": {"path": "mine"}}, "no advantage"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, words: str):
    fitting: dict[str, Any] = {"algorithm": {"name": "nft"}, "training": {"ema_decay": 0.9}}
    assert isinstance(build_algorithm(RunConfig.model_validate(fitting)), Nft)
    with pytest.raises(ConfigError, match=words):
        build_algorithm(RunConfig.model_validate(fitting | settings))
