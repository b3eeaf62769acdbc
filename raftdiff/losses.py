"""Losses: pure functions from tensors to per-sample losses [B] and metrics [B] to log."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import logsigmoid

Metrics = dict[str, torch.Tensor]
DpoLoss = Literal["sigmoid", "cdpo", "ipo"]


def weighted_error(error_B: torch.Tensor, weight_B: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
    """`weight_B * error_B`, the loss of RAFT, ReST and reward-weighted regression.

    Args:
        error_B: [B], each sample's negative log-likelihood or its denoising surrogate, with gradients.
        weight_B: [B], constants.

    Returns:
        The losses [B], with gradients, and the metric `error` [B], without.
    """
    return weight_B * error_B, {"error": error_B.detach()}


def preference(
    chosen_B: torch.Tensor,
    rejected_B: torch.Tensor,
    reference_chosen_B: torch.Tensor,
    reference_rejected_B: torch.Tensor,
    *,
    beta: float,
    kind: DpoLoss = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, Metrics]:
    """DPO (arXiv 2305.18290, eq. 7) on errors, which are negative log-likelihoods or their surrogates.

    With h = (ref_chosen - chosen) - (ref_rejected - rejected), how much more than the reference the policy prefers the
    chosen sample:

        sigmoid:  -log sigmoid(beta h)
        cdpo:     -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), e the label smoothing
        ipo:      (h - 1 / (2 beta))^2, arXiv 2310.12036

    Args:
        chosen_B, rejected_B: errors of the policy [B], with gradients.
        reference_chosen_B, reference_rejected_B: of the reference [B], on the same noise and timesteps.
        beta: in units of one over the error's.

    Returns:
        The losses [B]; `accuracy` (how often h > 0, a tie half), `margin` (beta h) and the errors of both sides.
    """
    h_B = (reference_chosen_B - chosen_B) - (reference_rejected_B - rejected_B)
    if kind == "ipo":
        loss_B = (h_B - 1 / (2 * beta)).square()
    else:
        smoothing = label_smoothing if kind == "cdpo" else 0.0
        loss_B = -(1 - smoothing) * logsigmoid(beta * h_B) - smoothing * logsigmoid(-beta * h_B)
    return loss_B, {
        "accuracy": ((h_B.detach().sign() + 1) / 2),
        "margin": beta * h_B.detach(),
        "chosen_error": chosen_B.detach(),
        "rejected_error": rejected_B.detach(),
    }


def clipped_ratio(
    log_prob_B: torch.Tensor, old_log_prob_B: torch.Tensor, advantage_B: torch.Tensor, *, clip: float
) -> tuple[torch.Tensor, Metrics]:
    """PPO's clipped importance-sampled objective (arXiv 1707.06347, eq. 7), negated:

        -min(r A, clamp(r, 1 - clip, 1 + clip) A),   r = exp(log p - log p_old)

    Returns:
        The losses [B]; `ratio` and `clipped` (the share whose ratio is outside the range).
    """
    ratio_B = (log_prob_B - old_log_prob_B).exp()
    clamped_B = ratio_B.clamp(1 - clip, 1 + clip)
    loss_B = -torch.minimum(ratio_B * advantage_B, clamped_B * advantage_B)
    outside_B = (ratio_B - clamped_B).detach().abs() > 0
    return loss_B, {"ratio": ratio_B.detach(), "clipped": outside_B.float()}


def kl_estimate(log_prob_B: torch.Tensor, reference_log_prob_B: torch.Tensor) -> torch.Tensor:
    """An estimate of KL(policy || reference) from the policy's own samples that is never negative, with gradients
    [B]: exp(d) - 1 - d for d = log p_reference - log p (Schulman's k3)."""
    d_B = reference_log_prob_B - log_prob_B
    return d_B.exp() - 1 - d_B
