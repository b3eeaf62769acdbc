"""D6 (Diffusion-DPO, arXiv 2311.12908): the implicit accuracy is above one half and rises; noise and timesteps that
winner and loser do not share give a loss of higher variance.

    python -m benchmarks.claims.d6
"""

from __future__ import annotations

import torch

from benchmarks.claims.dpo_runs import BETA, offline
from benchmarks.common import arguments, table, verdict
from raftdiff.build import build
from raftdiff.config import load_config
from raftdiff.losses import preference
from raftdiff.protocols import Policy
from raftdiff.types import Example

DRAWS = 32


def loss_deviation(policy: Policy, examples: list[Example], *, shared: bool) -> float:
    """Deviation of the mean loss of the same pairs over draws of noise and timesteps."""
    chosen = [example.sample for example in examples]
    rejected = [example.rejected for example in examples if example.rejected]
    losses = []
    for i in range(DRAWS):
        draw = policy.draw(chosen, torch.Generator().manual_seed(i))
        other = draw if shared else policy.draw(rejected, torch.Generator().manual_seed(1000 + i))
        sides = [(chosen, draw), (rejected, other)]
        with torch.no_grad():
            errors = [policy.error(samples, drawn) for samples, drawn in sides]
            with policy.reference():
                references = [policy.error(samples, drawn) for samples, drawn in sides]
        losses.append(float(preference(*errors, *references, beta=BETA)[0].mean()))
    return float(torch.tensor(losses).std())


def main() -> None:
    options = arguments(__doc__ or "")
    result = offline(options.output)
    accuracy = [report.training["accuracy"] for report in result.reports if "accuracy" in report.training]
    run = build(load_config(result.folder / "config.yaml"))
    with torch.no_grad():  # away from the reference, where every loss is log 2
        for parameter in run.policy.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    deviation = {shared: loss_deviation(run.policy, list(run.data)[:32], shared=shared) for shared in (True, False)}
    table(
        "\nDPO on preferences",
        ["", "measured"],
        [
            *([f"accuracy in round {i}", f"{value:.3f}"] for i, value in enumerate(accuracy, start=1)),
            ["deviation of the loss, shared noise", f"{deviation[True]:.4f}"],
            ["deviation of the loss, noise not shared", f"{deviation[False]:.4f}"],
        ],
    )
    verdict(
        "D6",
        0.5 < accuracy[0] < accuracy[-1] and deviation[True] < deviation[False],
        f"accuracy {accuracy[0]:.3f} -> {accuracy[-1]:.3f}; deviation {deviation[True]:.4f} shared, "
        f"{deviation[False]:.4f} not shared",
    )


if __name__ == "__main__":
    main()
