"""Losses: pure functions from tensors to per-sample losses [B] and metrics [B]."""

from __future__ import annotations

import torch


def weighted_error(error_B: torch.Tensor, weight_B: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`weight_B * error_B`, the loss of RAFT, ReST and reward-weighted regression.

    Args:
        error_B: [B], each sample's negative log-likelihood or its denoising surrogate, with gradients.
        weight_B: [B], constants.

    Returns:
        The losses [B], with gradients, and the metric `error` [B], without.
    """
    return weight_B * error_B, {"error": error_B.detach()}
