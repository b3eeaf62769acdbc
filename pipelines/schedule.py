"""The noise schedule that a model was trained on: noised latents, training targets, timesteps, weights."""

from __future__ import annotations

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

    def timesteps(self, quantile_B: torch.Tensor, distribution: str) -> torch.Tensor:
        """Quantiles in [0, 1) to timesteps: whole ones for discrete schedules, in (0, steps) for flow matching."""
        if distribution == "logit-normal":  # arXiv 2403.03206, eq. 19, with mean 0 and deviation 1
            quantile_B = torch.sigmoid(torch.special.ndtri(quantile_B.double().clamp(1e-6, 1 - 1e-6))).float()
        if self.flow:
            return quantile_B.clamp(1e-3, 1.0) * self.steps
        return (quantile_B * self.steps).long().clamp(max=self.steps - 1)

    def noised(self, x0, noise, t_B) -> tuple[torch.Tensor, torch.Tensor]:
        if self.flow:
            t = (t_B / self.steps).view(-1, *[1] * (x0.dim() - 1))
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
