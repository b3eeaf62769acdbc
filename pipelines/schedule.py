"""The noise schedule that a model was trained on: noised latents, training targets, timesteps, weights, and the
Gaussian steps by which policy gradients sample."""

from __future__ import annotations

import math

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from raftdiff.errors import ConfigError


class NoiseSchedule:
    """x_t and the training target from x_0, by the noise schedule that the model was trained on."""

    def __init__(self, scheduler):
        config = scheduler.config
        self.steps = config.get("num_train_timesteps", 1000)
        self.prediction = config.get("prediction_type", "epsilon")
        self.flow = type(scheduler).__name__.startswith("FlowMatch") or self.prediction == "flow_prediction"
        if not self.flow:
            if self.prediction not in ("epsilon", "v_prediction", "sample"):
                raise ConfigError(f"{type(scheduler).__name__}: prediction type {self.prediction!r} cannot be trained")
            self.forward = DDPMScheduler.from_config(config)
            self.last_alpha_bar = 1.0 if config.get("set_alpha_to_one", True) else float(self.forward.alphas_cumprod[0])

    def timesteps(self, quantile_B: torch.Tensor, distribution: str) -> torch.Tensor:
        """Quantiles in [0, 1) to timesteps: whole ones for discrete schedules, in (0, steps) for flow matching."""
        if distribution == "logit-normal":  # arXiv 2403.03206, eq. 19, with mean 0 and deviation 1
            quantile_B = torch.sigmoid(torch.special.ndtri(quantile_B.double().clamp(1e-6, 1 - 1e-6))).float()
        if self.flow:
            return quantile_B.clamp(1e-3, 1.0) * self.steps
        return (quantile_B * self.steps).long().clamp(max=self.steps - 1)

    def visited(self, quantile_B: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Quantiles in [0, 1) to the timesteps that a sampler visits, in rising order, each as likely; whole ones for
        discrete schedules."""
        grid = timesteps.unique()
        t_B = grid[(quantile_B * len(grid)).long().clamp(max=len(grid) - 1)]
        return t_B if self.flow else t_B.round().long()

    def noised(self, x0, noise, t_B) -> tuple[torch.Tensor, torch.Tensor]:
        if self.flow:
            t = _like(t_B / self.steps, x0)
            return (1 - t) * x0 + t * noise, noise - x0
        x_t = self.forward.add_noise(x0, noise, t_B)
        if self.prediction == "v_prediction":
            return x_t, self.forward.get_velocity(x0, noise, t_B)
        return x_t, noise if self.prediction == "epsilon" else x0

    def weight(self, t_B, snr_gamma: float | None) -> torch.Tensor | float:
        if snr_gamma is None or self.flow:
            return 1.0
        snr_B = compute_snr(self.forward, t_B).float()
        capped_B = snr_B.clamp(max=snr_gamma)
        return capped_B / {"epsilon": snr_B, "v_prediction": snr_B + 1, "sample": 1.0}[self.prediction]

    def x0(self, prediction: torch.Tensor, x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """The clean latents that a prediction stands for. All [B, ...]."""
        if self.flow:
            return x_t - _like(t_B / self.steps, x_t) * prediction
        if self.prediction == "sample":
            return prediction
        signal, spread = self._signal_and_spread(t_B, x_t)
        if self.prediction == "v_prediction":
            return signal * x_t - spread * prediction
        return (x_t - spread * prediction) / signal

    def noise_weight(self, t_B: torch.Tensor) -> torch.Tensor:
        """What turns a squared error of the prediction into one of the noise it stands for, [B]: 1 for eps,
        alpha_t^2 for v, (alpha_t / sigma_t)^2 for x_0, (1 - t)^2 for flow matching."""
        if self.flow:
            return (1 - t_B / self.steps).float().square()
        alpha_bar_B = self._alpha_bar(t_B)
        return {
            "epsilon": torch.ones_like(alpha_bar_B),
            "v_prediction": alpha_bar_B,
            "sample": alpha_bar_B / (1 - alpha_bar_B),
        }[self.prediction]

    def step(
        self, prediction: torch.Tensor, x_t: torch.Tensor, t_B: torch.Tensor, next_B: torch.Tensor, noise_level: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean [B, ...] and standard deviation [B, 1, ...] of the Gaussian step from the timesteps t_B to next_B, in
        fp32. With a noise level of 0 it is the deterministic step, and the deviation 0.

        eps- and v-prediction: DDIM (arXiv 2010.02502, eq. 12 and 16) with eta = `noise_level`. A negative next
        timestep is the schedule's own last one. Flow matching: the SDE of Flow-GRPO (arXiv 2505.05470) with a =
        `noise_level`, from sigma = t / 1000 to sigma' < sigma:

            s = a sqrt(sigma / (1 - sigma)), with sigma' for sigma where sigma is 1, in the denominator alone
            mean = x (1 + s^2 / (2 sigma) dt) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt,   dt = sigma' - sigma
            deviation = s sqrt(-dt)
        """
        prediction, x_t = prediction.float(), x_t.float()
        if self.flow:
            sigma, after = _like(t_B / self.steps, x_t).float(), _like(next_B / self.steps, x_t).float()
            dt = after - sigma
            rate = noise_level * (sigma / (1 - torch.where(sigma >= 1, after, sigma))).sqrt()
            drift = rate.square() / (2 * sigma) * dt
            mean = x_t * (1 + drift) + prediction * (dt + drift * (1 - sigma))
            return mean, rate * (-dt).sqrt()
        now, after = _like(self._alpha_bar(t_B), x_t), _like(self._alpha_bar(next_B), x_t)
        x0 = self.x0(prediction, x_t, t_B)
        noise = (x_t - now.sqrt() * x0) / (1 - now).sqrt()
        if self.forward.config.clip_sample:
            x0 = x0.clamp(-self.forward.config.clip_sample_range, self.forward.config.clip_sample_range)
        deviation = noise_level * ((1 - after) / (1 - now) * (1 - now / after)).clamp(min=0).sqrt()
        return after.sqrt() * x0 + (1 - after - deviation.square()).clamp(min=0).sqrt() * noise, deviation

    def _alpha_bar(self, t_B: torch.Tensor) -> torch.Tensor:
        """The cumulative product of alpha at timesteps [B]; of a negative one, what the sampler ends with."""
        table = self.forward.alphas_cumprod.to(t_B.device)
        return torch.where(t_B < 0, self.last_alpha_bar, table[t_B.long().clamp(min=0)])

    def _signal_and_spread(self, t_B: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha_bar = _like(self._alpha_bar(t_B), x)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def gaussian_log_prob(x: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """Log-density of x, mean over the latent dimensions, float32 [B]: the reduction of the DDPO and Flow-GRPO authors,
    on which their clip ranges depend. NaN where the deviation is 0."""
    log_prob = -((x.float() - mean) / deviation).square() / 2 - deviation.log() - math.log(2 * math.pi) / 2
    return log_prob.flatten(1).mean(1)


def _like(value_B: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[B] as [B, 1, ...], to go with x."""
    return value_B.view(-1, *[1] * (x.dim() - 1))
