"""D2 (DPO, arXiv 2305.18290, eq. 4): where preferences follow Bradley-Terry, the optimum is the reference times
exp(r / beta), normalised; on a distribution over 8 outcomes, exactly.

    python -m benchmarks.claims.d2
"""

from __future__ import annotations

import torch

from benchmarks.common import arguments, table, verdict
from raftdiff.losses import preference


def main() -> None:
    options = arguments(__doc__ or "", beta=0.5, outcomes=8)
    generator = torch.Generator().manual_seed(0)
    reward = torch.randn(options.outcomes, generator=generator, dtype=torch.float64)
    reference = torch.randn(options.outcomes, generator=generator, dtype=torch.float64).log_softmax(0)
    logits = reference.clone().requires_grad_()
    better, worse = torch.cartesian_prod(*[torch.arange(options.outcomes)] * 2).T
    preferred = torch.sigmoid(reward[better] - reward[worse])
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        error = -logits.log_softmax(0)
        pair_losses, _ = preference(
            error[better], error[worse], -reference[better], -reference[worse], beta=options.beta
        )
        total = (preferred * pair_losses).mean()
        total.backward()
        return total

    optimizer.step(loss)
    found, optimum = logits.detach().softmax(0), (reference + reward / options.beta).softmax(0)
    rows = [[f"{a:.6f}", f"{b:.6f}", f"{c:.6f}"] for a, b, c in zip(reference.exp(), found, optimum, strict=True)]
    table("\nProbabilities of the outcomes", ["reference", "after DPO", "reference x exp(r / beta)"], rows)
    off = float((found - optimum).abs().max())
    verdict("D2", off < 1e-4, f"the largest difference is {off:.1e}")


if __name__ == "__main__":
    main()
