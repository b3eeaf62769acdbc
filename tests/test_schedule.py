"""What a prediction stands for: in each parameterisation the same clean latents and the same noise."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from pydantic import ValidationError

from raftdiff.config import AdapterConfig, RunConfig
from raftdiff.pipelines.diffusion import DiffusionPolicy
from raftdiff.pipelines.schedule import NoiseSchedule
from raftdiff.types import Prompt

every_parameterisation = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
T_B = torch.tensor([0, 1])


def schedule_of(prediction: str) -> NoiseSchedule:
    """alpha = .8, sigma = .6 at timestep 0 and alpha^2 = .32 at 1; for flow matching t is .0 and .5."""
    if prediction == "flow":
        return NoiseSchedule(FlowMatchEulerDiscreteScheduler(num_train_timesteps=2))
    return NoiseSchedule(DDPMScheduler(2, trained_betas=[0.36, 0.5], prediction_type=prediction))


def normal(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(seed))


@every_parameterisation
def test_the_target_stands_for_the_latents_that_were_noised(prediction: str):
    schedule, x0 = schedule_of(prediction), normal(0)
    x_t, target = schedule.noised(x0, normal(1), T_B)
    torch.testing.assert_close(schedule.x0(target, x_t, T_B), x0, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("epsilon", [1.0, 1.0]),
        ("v_prediction", [0.64, 0.32]),  # alpha^2
        ("sample", [0.64 / 0.36, 0.32 / 0.68]),  # (alpha / sigma)^2
        ("flow", [1.0, 0.25]),  # (1 - t)^2
    ],
)
def test_the_noise_weight_is_what_its_parameterisation_asks_for(prediction: str, expected: list[float]):
    assert schedule_of(prediction).noise_weight(T_B).tolist() == pytest.approx(expected, abs=1e-6)


@every_parameterisation
def test_a_weighted_error_of_the_prediction_is_the_error_of_the_noise(prediction: str):
    """alpha^2 |dv|^2 = |de|^2, (alpha / sigma)^2 |dx_0|^2 = |de|^2, and for flow matching (1 - t)^2 |dv|^2 = |de|^2."""
    x0, noise, predicted_noise = normal(0), normal(1), normal(2)
    schedule = schedule_of(prediction)
    x_t, target = schedule.noised(x0, noise, T_B)
    signal, spread = torch.tensor([0.8, 0.32**0.5]).view(2, 1, 1, 1), torch.tensor([0.6, 0.68**0.5]).view(2, 1, 1, 1)
    if prediction == "flow":
        signal, spread = torch.tensor([1.0, 0.5]).view(2, 1, 1, 1), torch.tensor([0.0, 0.5]).view(2, 1, 1, 1)
    implied_x0 = (x_t - spread * predicted_noise) / signal
    predicted = {
        "epsilon": predicted_noise,
        "v_prediction": signal * predicted_noise - spread * implied_x0,
        "sample": implied_x0,
        "flow": predicted_noise - implied_x0,
    }[prediction]
    error_B = (predicted - target).square().mean((1, 2, 3)) * schedule.noise_weight(T_B)
    torch.testing.assert_close(error_B, (predicted_noise - noise).square().mean((1, 2, 3)), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", ["sd-eps", "sd-v", "sd3"])
def test_in_noise_space_the_error_of_a_policy_is_that_of_the_noise_it_predicts(family: str):
    """The noise is told from the clean latents that the policy takes its input for: (x_t - alpha x_0) / sigma."""
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "caption_dropout": 0.0}
    call = {"height": 16, "width": 16}
    policy = DiffusionPolicy(
        tiny_models.FAMILIES[family](), AdapterConfig(rank=2), call=call, error_space="noise", **settings
    )
    samples = policy.sample([Prompt(text="a red circle"), Prompt(text="a blue square")], [1, 2])
    draw = policy.draw(samples, torch.Generator().manual_seed(0))
    with torch.no_grad():
        error_B, denoised = policy.error(samples, draw), policy.denoised(samples, draw)
        policy.error_space = "prediction"
        plain_B = policy.error(samples, draw)
    schedule = policy._schedule
    t_B = schedule.timesteps(draw.quantile_B, "uniform")
    one, zero = torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)
    signal, spread = schedule.noised(one, zero, t_B)[0], schedule.noised(zero, one, t_B)[0]
    predicted_noise = draw.noise + signal / spread * (denoised.x0 - denoised.predicted_x0)
    torch.testing.assert_close(error_B, (predicted_noise - draw.noise).square().mean((1, 2, 3)), atol=1e-4, rtol=1e-3)
    assert torch.equal(error_B, plain_B) == (family == "sd-eps")


def test_min_snr_and_the_exact_weights_exclude_each_other():
    """Min-SNR weighs the error of every parameterisation as one of the noise: both would do so twice."""
    for error_space, snr_gamma in (("noise", None), ("prediction", 5.0)):
        RunConfig.model_validate({"training": {"error_space": error_space, "snr_gamma": snr_gamma}})
    with pytest.raises(ValidationError, match="leave out training.error_space"):
        RunConfig.model_validate({"training": {"error_space": "noise", "snr_gamma": 5.0}})
