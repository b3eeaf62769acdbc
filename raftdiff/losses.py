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


def gold(log_prob_BT: torch.Tensor, weight_B: torch.Tensor, *, least: float) -> tuple[torch.Tensor, Metrics]:
    """GOLD (Pang and He, arXiv 2009.07839), an off-policy policy gradient whose importance weights are the
    policy's own likelihoods, negated:

        -Q * sum_t w_t log p_t,   w_t = max(p_t, least), of which no gradient is taken

    Tokens that the policy finds unlikely count less than in plain training, but at least by `least`.

    Args:
        log_prob_BT: the tokens' log-probabilities [B, T], with gradients; 0 beyond the end of a text.
        weight_B: Q [B], constants.
        least: 0 to 1; 1 is plain training.

    Returns:
        The losses [B], with gradients, and the metric `error`, the negative log-likelihood [B], without.
    """
    known_BT = log_prob_BT.detach()
    importance_BT = known_BT.exp().clamp(min=least)
    return -weight_B * (importance_BT * log_prob_BT).sum(1), {"error": -known_BT.sum(1)}


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
        ipo:      (beta h - 1/2)^2, which is beta^2 times that of arXiv 2310.12036, (h - 1 / (2 beta))^2: the same
                  optimum, on the scale of the others

    Args:
        chosen_B, rejected_B: errors of the policy [B], with gradients.
        reference_chosen_B, reference_rejected_B: of the reference [B], on the same noise and timesteps.
        beta: in units of one over the error's.

    Returns:
        The losses [B]; `accuracy` (how often h > 0, a tie half), `margin` (beta h), the implicit rewards that it is
        the difference of (beta (reference - error)), and the errors of both sides.
    """
    chosen_reward_B = beta * (reference_chosen_B - chosen_B)
    rejected_reward_B = beta * (reference_rejected_B - rejected_B)
    margin_B = chosen_reward_B - rejected_reward_B
    if kind == "ipo":
        loss_B = (margin_B - 0.5).square()
    else:
        smoothing = label_smoothing if kind == "cdpo" else 0.0
        loss_B = -(1 - smoothing) * logsigmoid(margin_B) - smoothing * logsigmoid(-margin_B)
    metrics = {
        "accuracy": (margin_B.sign() + 1) / 2,
        "margin": margin_B,
        "chosen_reward": chosen_reward_B,
        "rejected_reward": rejected_reward_B,
        "chosen_error": chosen_B,
        "rejected_error": rejected_B,
    }
    return loss_B, {name: value_B.detach() for name, value_B in metrics.items()}


def bradley_terry(
    chosen_B: torch.Tensor, rejected_B: torch.Tensor, margin_B: torch.Tensor
) -> tuple[torch.Tensor, Metrics]:
    """-log sigmoid(chosen - rejected - margin): scores whose differences are log-odds of being preferred, and more
    than the judge's own where it said by how much (MORLAIF, arXiv:2406.07295).

    Args:
        chosen_B, rejected_B: the scores of the two samples of each pair, [B].
        margin_B: in nats, 0 or more, [B].

    Returns:
        The losses [B]; `accuracy`, 1 where the chosen sample has the higher score.
    """
    difference_B = chosen_B - rejected_B
    return -logsigmoid(difference_B - margin_B), {"accuracy": (difference_B > 0).float()}


def masked_mean(value_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """The mean of each row over its steps or tokens, [B]; 0 for a row that has none."""
    return (value_BT * mask_BT).sum(1) / mask_BT.sum(1).clamp(min=1)


def clipped_ratio(
    log_prob_BT: torch.Tensor,
    old_log_prob_BT: torch.Tensor,
    advantage_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    clip: float,
) -> tuple[torch.Tensor, Metrics]:
    """PPO's clipped importance-sampled objective (arXiv 1707.06347, eq. 7), negated:

        -min(r A, clamp(r, 1 - clip, 1 + clip) A),   r = exp(log p - log p_old)

    for each denoising step or token, and its mean over those of a sample.

    Args:
        log_prob_BT, old_log_prob_BT: [B, T], T = 1 for denoising steps.
        advantage_BT: [B, T], or [B, 1] where all tokens of a sample have the same.
        mask_BT: [B, T], which of them there are.

    Returns:
        The losses [B]; `ratio`, `ratio_change` (its distance from 1) and `clipped` (the share whose ratio is outside
        the range).
    """
    ratio_BT = (log_prob_BT - old_log_prob_BT).exp()
    clamped_BT = ratio_BT.clamp(1 - clip, 1 + clip)
    loss_BT = -torch.minimum(ratio_BT * advantage_BT, clamped_BT * advantage_BT)
    metrics = {
        "ratio": ratio_BT,
        "ratio_change": (ratio_BT - 1).abs(),
        "clipped": ((ratio_BT - clamped_BT).abs() > 0).float(),
    }
    means = {name: masked_mean(value_BT.detach(), mask_BT) for name, value_BT in metrics.items()}
    return masked_mean(loss_BT, mask_BT), means


def kl_estimate(log_prob: torch.Tensor, reference_log_prob: torch.Tensor) -> torch.Tensor:
    """An estimate of KL(policy || reference) from the policy's own samples that is never negative, with gradients, of
    the shape of its arguments: exp(d) - 1 - d for d = log p_reference - log p (Schulman's k3)."""
    d = reference_log_prob - log_prob
    return torch.expm1(d) - d  # d may be far below the rounding of 1


def clipped_value_error(
    value_BT: torch.Tensor, old_value_BT: torch.Tensor, return_BT: torch.Tensor, mask_BT: torch.Tensor, *, clip: float
) -> tuple[torch.Tensor, Metrics]:
    """PPO's value loss: half the squared error of the value head, or of what it may have become since sampling,

        max((V - R)^2, (V_clipped - R)^2) / 2,   V_clipped = V_old + clamp(V - V_old, -clip, clip)

    for each token, and its mean over those of a sample.

    Args:
        value_BT: [B, T], with gradients; old_value_BT: those while sampling.
        return_BT: [B, T], R.
        mask_BT: [B, T], which tokens there are.

    Returns:
        The losses [B]; `value_error`, the squared error, and `value_clipped`, the share of values that are further
        than `clip` from the old ones.
    """
    change_BT = value_BT - old_value_BT
    held_BT = old_value_BT + change_BT.clamp(-clip, clip)
    error_BT = (value_BT - return_BT).square()
    loss_BT = torch.maximum(error_BT, (held_BT - return_BT).square()) / 2
    metrics = {"value_error": error_BT, "value_clipped": (change_BT.abs() > clip).float()}
    means = {name: masked_mean(of_BT.detach(), mask_BT) for name, of_BT in metrics.items()}
    return masked_mean(loss_BT, mask_BT), means


def adapted_kl(coefficient: float, kl: float, *, target: float, share: float) -> float:
    """The next coefficient of a KL penalty that shall hold `kl` at `target`: a proportional controller on its logarithm
    (Ziegler et al., arXiv 1909.08593, section 2.2).

        coefficient * (1 + share * clamp(kl / target - 1, -0.2, 0.2))

    Args:
        kl: measured on the samples that the coefficient was used for.
        share: how much of the error to mend: the samples by the horizon, at most 1.
    """
    return coefficient * (1 + min(share, 1.0) * min(max(kl / target - 1, -0.2), 0.2))


def forward_process(
    x0: torch.Tensor,
    predicted_x0: torch.Tensor,
    old_x0: torch.Tensor,
    advantage_B: torch.Tensor,
    *,
    beta: float,
    max_advantage: float,
) -> tuple[torch.Tensor, Metrics]:
    """DiffusionNFT (arXiv 2509.16117): move the prediction towards good samples, and its mirror image in the sampling
    policy's prediction towards bad ones.

        A / beta * (rho |x_plus - x_0|^2 / w_plus + (1 - rho) |x_minus - x_0|^2 / w_minus)
        x_plus, x_minus = x_old + beta (x_hat - x_old), x_old - beta (x_hat - x_old)
        rho = clamp(advantage / (2 A) + 1/2, 0, 1),   w = mean |x_plus - x_0|, a constant

    Args:
        x0: the clean latents [B, ...].
        predicted_x0, old_x0: what the policy, with gradients, and the sampling policy take the noised ones for.
        max_advantage: A.

    Returns:
        The losses [B]; `positive_error` and `negative_error`, the weighted errors before rho; `moved`, the mean square
        of x_hat - x_old.
    """
    change = predicted_x0 - old_x0
    positive_B, negative_B = (_relative_error(old_x0 + sign * beta * change - x0) for sign in (1, -1))
    rho_B = (advantage_B / (2 * max_advantage) + 0.5).clamp(0, 1)
    loss_B = max_advantage / beta * (rho_B * positive_B + (1 - rho_B) * negative_B)
    return loss_B, {
        "positive_error": positive_B.detach(),
        "negative_error": negative_B.detach(),
        "moved": change.detach().square().flatten(1).mean(1),
    }


def _relative_error(difference: torch.Tensor) -> torch.Tensor:
    """The mean square by the mean absolute value, of which no gradient is taken, [B]."""
    size_B = difference.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return difference.square().flatten(1).mean(1) / size_B
