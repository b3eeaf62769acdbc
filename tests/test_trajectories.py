"""Gaussian steps of sampling: those of diffusers' own schedulers, kept with the sample, and retraced with their
density."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import tiny_models
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal

from raftdiff.config import AdapterConfig, ModelConfig
from raftdiff.errors import ConfigError, DataError
from raftdiff.pipelines.diffusion import DiffusionPolicy
from raftdiff.pipelines.loading import configure, load_pipeline
from raftdiff.pipelines.schedule import NoiseSchedule, gaussian_log_prob
from raftdiff.store import SampleStore
from raftdiff.types import Prompt, Sample

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers

PROMPTS = [Prompt(text="a red circle"), Prompt(text="a blue square"), Prompt(text="two green triangles")]
SEEDS = [11, 12, 13]
STEPS = 4

every_family = pytest.mark.parametrize("family", tiny_models.FAMILIES)


def noise_level(family: str) -> float:
    return 0.7 if family in ("sd3", "flux") else 1.0


def policy_of(family: str, scheduler: Any = None, precision: Any = "fp32", **settings) -> DiffusionPolicy:
    """At a little distance from its base."""
    pipeline = tiny_models.FAMILIES[family]()
    if scheduler is not None:
        pipeline.scheduler = scheduler
    settings = {"num_inference_steps": STEPS, "guidance_scale": 1.0} | settings
    call = {"height": 16, "width": 16}
    policy = DiffusionPolicy(pipeline, AdapterConfig(rank=2), call=call, precision=precision, **settings)
    generator = torch.Generator().manual_seed(5)
    for p in policy.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return policy


def sampled(policy: DiffusionPolicy, family: str, **settings) -> list[Sample]:
    return policy.sample(PROMPTS, SEEDS, noise_level=noise_level(family), **settings)


def old_log_prob(samples: list[Sample], step: int) -> torch.Tensor:
    return torch.stack([s.trajectory.log_prob_T[step] for s in samples if s.trajectory is not None])


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 4, 3, 3), generator=torch.Generator().manual_seed(seed))


# -- one step ----------------------------------------------------------------------------------------------------------


def ddim(prediction: str, **settings: Any) -> DDIMScheduler:
    settings = {"beta_schedule": "scaled_linear", "clip_sample": False} | settings
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, prediction_type=prediction, **settings)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("clip_sample", [True, False])
def test_a_step_is_that_of_diffusers_ddim_down_to_the_last(prediction, eta, set_alpha_to_one, clip_sample):
    scheduler = ddim(prediction, set_alpha_to_one=set_alpha_to_one, clip_sample=clip_sample, steps_offset=1)
    scheduler.set_timesteps(5)
    schedule = NoiseSchedule(scheduler)
    times = [*scheduler.timesteps.tolist(), -1]
    assert times == [801, 601, 401, 201, 1, -1]
    prediction_B, x_t, z = normal(0), normal(1), normal(2)
    for now, after in pairwise(times):
        mean, deviation = schedule.step(prediction_B, x_t, torch.tensor([now] * 2), torch.tensor([after] * 2), eta)
        expected = scheduler.step(prediction_B, now, x_t, eta=eta, variance_noise=z).prev_sample
        torch.testing.assert_close(mean + deviation * z, expected, atol=1e-5, rtol=1e-5)
        unmoved = scheduler.step(prediction_B, now, x_t, eta=eta, variance_noise=torch.zeros_like(z)).prev_sample
        torch.testing.assert_close(mean, unmoved, atol=1e-5, rtol=1e-5)
        assert deviation.shape == (2, 1, 1, 1)
        assert (deviation == 0).all() == (eta == 0 or (set_alpha_to_one and after == -1))


def test_the_deviation_of_ddim_is_eta_times_equation_16():
    """With alpha_bar = .64 and .8 it is sqrt(.2 / .36 * (1 - .64 / .8)) = 1 / 3."""
    schedule = NoiseSchedule(DDPMScheduler(2, trained_betas=[0.2, 0.2], prediction_type="epsilon", clip_sample=False))
    x_t, noise = torch.tensor([[1.0]]), torch.tensor([[0.5]])
    mean, deviation = schedule.step(noise, x_t, torch.tensor([1]), torch.tensor([0]), 1.0)
    assert deviation.item() == pytest.approx(1 / 3)
    x_0 = (1 - 0.6 * 0.5) / 0.8
    assert mean.item() == pytest.approx(math.sqrt(0.8) * x_0 + math.sqrt(0.2 - 1 / 9) * 0.5)


def test_each_row_steps_from_its_own_timestep_to_its_own():
    schedule = NoiseSchedule(ddim("v_prediction"))
    prediction_B, x_t = normal(0), normal(1)
    t_B, next_B = torch.tensor([700, 30]), torch.tensor([650, -1])
    together = schedule.step(prediction_B, x_t, t_B, next_B, 1.0)
    for i in range(2):
        row = slice(i, i + 1)
        alone = schedule.step(prediction_B[row], x_t[row], t_B[row], next_B[row], 1.0)
        assert torch.equal(together[0][row], alone[0]) and torch.equal(together[1][row], alone[1])


def test_without_noise_a_flow_step_is_diffusers_euler_step():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    schedule = NoiseSchedule(scheduler)
    times = [*scheduler.timesteps.tolist(), 0.0]
    prediction_B, x_t = normal(0), normal(1)
    for now, after in pairwise(times):
        mean, deviation = schedule.step(prediction_B, x_t, torch.tensor([now] * 2), torch.tensor([after] * 2), 0.0)
        expected = scheduler.step(prediction_B, torch.tensor(now), x_t).prev_sample
        torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)
        assert (deviation == 0).all()


@pytest.mark.parametrize(("sigma", "after"), [(1.0, 0.9), (0.6, 0.4), (0.2, 0.0)])
def test_a_noisy_flow_step_is_the_formula_of_flow_grpo(sigma: float, after: float):
    x, v, a, dt = 1.5, -0.4, 0.7, after - sigma
    s = a * math.sqrt(sigma / (1 - (after if sigma == 1 else sigma)))
    expected = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    schedule = NoiseSchedule(FlowMatchEulerDiscreteScheduler())
    mean, deviation = schedule.step(
        torch.tensor([[v]]), torch.tensor([[x]]), torch.tensor([sigma * 1000]), torch.tensor([after * 1000]), a
    )
    assert mean.item() == pytest.approx(expected, abs=1e-6)
    assert deviation.item() == pytest.approx(s * math.sqrt(-dt), abs=1e-6)


def test_the_noisy_flow_keeps_the_marginals_of_the_ode():
    """Of data that is N(0, 1) the velocity is known, and x at sigma has the variance (1 - sigma)^2 + sigma^2."""
    schedule = NoiseSchedule(FlowMatchEulerDiscreteScheduler())
    x, sigmas = normal(3, 4000, 1), torch.linspace(1, 0.2, 400)
    for now, after in pairwise(sigmas):
        velocity = x * (2 * now - 1) / ((1 - now) ** 2 + now**2)  # E[noise - x_0 | x]
        mean, deviation = schedule.step(velocity, x, now.expand(4000) * 1000, after.expand(4000) * 1000, 0.7)
        x = mean + deviation * torch.randn(x.shape, generator=torch.Generator().manual_seed(int(now * 1e6)))
    assert x.var().item() == pytest.approx(0.8**2 + 0.2**2, rel=0.06)


def test_the_log_density_is_the_mean_over_the_dimensions_of_torchs_own():
    x, mean, deviation = normal(0), normal(1), torch.tensor([0.3, 2.0]).view(2, 1, 1, 1)
    expected = Normal(mean, deviation.expand_as(mean)).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_log_prob(x, mean, deviation), expected)


def test_a_step_without_deviation_has_no_density():
    x = normal(0)
    assert gaussian_log_prob(x, x, torch.zeros(2, 1, 1, 1)).isnan().all()


# -- whole trajectories ------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_right_after_sampling_the_density_of_each_step_is_the_trajectorys_own(family: str, scale: float):
    policy = policy_of(family, guidance_scale=scale)
    samples = sampled(policy, family)
    for step in range(STEPS):
        log_prob_B = policy.log_prob(samples, [step] * 3).squeeze(1)
        torch.testing.assert_close(log_prob_B, old_log_prob(samples, step), atol=1e-5, rtol=0)
        assert log_prob_B.requires_grad and log_prob_B.dtype == torch.float32
    mixed_B = policy.log_prob(samples, [2, 0, 1]).squeeze(1)
    own_B = torch.stack([old_log_prob(samples, step)[i] for i, step in enumerate([2, 0, 1])])
    torch.testing.assert_close(mixed_B, own_B, atol=1e-5, rtol=0)
    with policy.reference():
        assert (policy.log_prob(samples, [1] * 3).squeeze(1) - old_log_prob(samples, 1)).abs().max() > 1e-4


@every_family
def test_a_trajectory_ends_in_the_latents_of_the_picture(family: str):
    policy = policy_of(family)
    for sample in sampled(policy, family):
        walk = sample.trajectory
        assert walk is not None and sample.latents is not None and sample.image is not None
        assert walk.states.shape == (STEPS + 1, *sample.latents.shape) and walk.states.dtype == torch.float32
        assert torch.equal(walk.states[-1], sample.latents)
        assert walk.times.shape == (STEPS + 1,) and (walk.times.diff() < 0).all()
        assert walk.log_prob_T.isfinite().all() and walk.noise_level == noise_level(family)
        assert (decoded(policy.pipeline, sample.latents) - sample.image / 255).abs().max() <= 0.51 / 255


def decoded(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    x0, config = latents[None], pipeline.vae.config
    if x0.dim() == 3:
        x0 = pipeline._unpack_latents(x0, 16, 16, pipeline.vae_scale_factor)
    with torch.no_grad():
        pixels = pipeline.vae.decode(x0 / config.scaling_factor + (config.shift_factor or 0.0)).sample
    return (pixels[0] / 2 + 0.5).clamp(0, 1)


@every_family
def test_the_same_seed_walks_the_same_way_in_any_batch_and_another_does_not(family: str):
    policy = policy_of(family)
    together = sampled(policy, family)
    policy.batch_size = 1
    for one, other in zip(together, sampled(policy, family), strict=True):
        assert one.trajectory is not None and other.trajectory is not None
        torch.testing.assert_close(one.trajectory.states, other.trajectory.states, atol=1e-4, rtol=1e-4)
        assert torch.equal(one.trajectory.states[0], other.trajectory.states[0])
    [other] = policy.sample(PROMPTS[:1], [99], noise_level=noise_level(family))
    assert (other.latents - together[0].latents).abs().max() > 0.1


@every_family
def test_without_a_noise_level_the_pipelines_own_sampler_stays_in_use(family: str):
    policy = policy_of(family)
    sampled(policy, family)
    [sample, *_] = policy.sample(PROMPTS, SEEDS)
    stock = policy.pipeline(
        [p.text for p in PROMPTS],
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="pt",
        **policy._arguments(3, 1.0),
    )
    assert sample.trajectory is None
    assert torch.equal((stock.images[0].float() * 255).round().to(torch.uint8), sample.image)


@pytest.mark.parametrize("family", ["sd-eps", "sd-v", "sd3", "flux"])
def test_trajectories_without_noise_are_what_the_deterministic_sampler_makes(family: str):
    policy = policy_of(family)
    walked = policy.sample(PROMPTS, SEEDS, noise_level=0.0)
    for one, other in zip(walked, policy.sample(PROMPTS, SEEDS), strict=True):
        torch.testing.assert_close(one.latents, other.latents, atol=1e-4, rtol=1e-4)
        assert one.trajectory is not None and one.trajectory.log_prob_T.isnan().all()


def test_trajectories_may_have_fewer_steps_than_other_samples():
    policy = policy_of("sd-eps", trajectory_steps=2)
    [walked, *_] = sampled(policy, "sd-eps")
    assert walked.trajectory is not None and len(walked.trajectory.log_prob_T) == 2
    before = policy.passes
    policy.sample(PROMPTS, SEEDS)
    assert policy.passes - before == STEPS * 3


def test_the_last_step_to_no_noise_at_all_has_no_density():
    policy = policy_of("sd-v", ddim("v_prediction", steps_offset=1, timestep_spacing="trailing"))
    [sample, *_] = sampled(policy, "sd-v")
    assert sample.trajectory is not None
    assert sample.trajectory.log_prob_T.isfinite().tolist() == [True] * (STEPS - 1) + [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["sd-eps", "sd3"])
def test_trajectories_are_made_in_the_arithmetic_of_training(family: str, dtype: torch.dtype):
    policy = policy_of(family, precision="bf16", guidance_scale=4.0)
    policy.pipeline.to(dtype)
    samples = sampled(policy, family)
    for step in range(STEPS):
        log_prob_B = policy.log_prob(samples, [step] * 3).squeeze(1)
        torch.testing.assert_close(log_prob_B, old_log_prob(samples, step), atol=1e-5, rtol=0)
    assert "forward" not in vars(policy.denoiser)
    assert policy.log_prob_rounding == torch.finfo(torch.bfloat16).eps
    assert policy_of(family).log_prob_rounding == 1e-5


def test_the_density_has_the_gradient_of_its_formula():
    """d/dw of -(a - mean(w))^2 / (2 s^2), by a difference quotient along the gradient."""
    policy = policy_of("sd-eps")
    samples = sampled(policy, "sd-eps")
    log_prob = policy.log_prob(samples, [1] * 3).sum()
    log_prob.backward()
    gradients = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    square = sum(float(g.square().sum()) for g in gradients)
    size = 1e-3 / math.sqrt(square)
    with torch.no_grad():
        values = []
        for sign in (1, -2):
            for p, g in zip(policy.parameters(), gradients, strict=True):
                p += sign * size * g
            values.append(policy.log_prob(samples, [1] * 3).double().sum().item())
    assert (values[0] - values[1]) / (2 * size) == pytest.approx(square, rel=0.05)


def test_trajectories_come_back_from_the_store_bit_for_bit(tmp_path):
    policy = policy_of("sd-v", ddim("v_prediction", timestep_spacing="trailing"), guidance_scale=1.3)
    [sample, *_] = sampled(policy, "sd-v")
    store = SampleStore(tmp_path)
    store.write_samples(1, 0, [sample])
    [read] = store.read_samples(1)
    assert sample.trajectory is not None and read.trajectory is not None
    for name in ("states", "times", "log_prob_T"):
        written, back = getattr(sample.trajectory, name), getattr(read.trajectory, name)
        assert written.numpy().tobytes() == back.numpy().tobytes() and written.shape == back.shape, name
    assert read.trajectory.noise_level == 1.0 and read.trajectory.guidance_scale == 1.3
    assert torch.equal(policy.log_prob([read], [0]), policy.log_prob([sample], [0]))


# -- what cannot be walked ---------------------------------------------------------------------------------------------


def test_a_scheduler_without_gaussian_steps_is_refused():
    policy = policy_of("sd-eps", DPMSolverMultistepScheduler())
    with pytest.raises(ConfigError, match="DPMSolverMultistepScheduler has no stochastic step.*DDIMScheduler"):
        sampled(policy, "sd-eps")


def test_a_sample_without_a_trajectory_is_refused():
    policy = policy_of("sd-eps")
    samples = policy.sample(PROMPTS, SEEDS)
    with pytest.raises(DataError, match="has no trajectory"):
        policy.log_prob(samples, [0] * 3)


def test_a_scheduler_that_is_asked_for_never_clips_latents():
    pipeline = load_pipeline(ModelConfig())
    assert "clip_sample" not in pipeline.scheduler.config
    configure(pipeline, ModelConfig(scheduler="DDIMScheduler"))
    assert pipeline.scheduler.config.clip_sample is False


def test_the_shift_of_flow_matching_goes_over_to_a_scheduler_that_is_asked_for():
    pipeline = load_pipeline(ModelConfig())
    pipeline.scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", flow_shift=3.0)
    configure(pipeline, ModelConfig(scheduler="FlowMatchEulerDiscreteScheduler"))
    assert pipeline.scheduler.config.shift == 3.0
