"""D1 (DPO, arXiv 2305.18290, eq. 7): at the start the loss is log 2, the margin 0, and the gradient that of
beta / 2 (e_w - e_l), on the embedded model.

    python -m benchmarks.claims.d1
"""

from __future__ import annotations

import math

import torch

from benchmarks.claims.dpo_runs import BETA
from benchmarks.common import arguments, configured, verdict
from raftdiff.algorithms.dpo import Dpo
from raftdiff.build import build
from raftdiff.types import Batch, Example


def main() -> None:
    options = arguments(__doc__ or "", pairs=4)
    policy = build(configured("claims", options.output, "d1", {"training.precision": "fp32"})).policy
    prompts = build(configured("claims", options.output, "d1", {})).prompts[: options.pairs]
    samples = policy.sample([p for p in prompts for _ in range(2)], range(2 * options.pairs))
    examples = [Example(sample=a, rejected=b) for a, b in zip(samples[::2], samples[1::2], strict=True)]
    draw = policy.draw(samples[::2], torch.Generator().manual_seed(0))
    batch = Batch(examples=examples, weight_B=torch.ones(options.pairs), draw=draw)
    loss_B, metrics = Dpo(beta=BETA).loss(policy, batch)
    gradient = torch.autograd.grad(loss_B.sum(), policy.parameters())
    both = policy.error([*batch.samples, *batch.rejected], draw.rows([*range(options.pairs)] * 2))
    chosen_B, rejected_B = both.chunk(2)
    formula = torch.autograd.grad((BETA / 2 * (chosen_B - rejected_B)).sum(), policy.parameters())
    difference = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(gradient, formula, strict=True)))
    norm = math.sqrt(sum(float(b.square().sum()) for b in formula))
    off = float((loss_B.detach() - math.log(2)).abs().max())
    verdict(
        "D1",
        off < 1e-3 and float(metrics["margin"].abs().max()) < 1e-3 and difference < 1e-2 * norm,
        f"loss off log 2 by {off:.1e}, margin {float(metrics['margin'].abs().max()):.1e}, gradient off the formula by "
        f"{difference / norm:.1e} of its norm",
    )


if __name__ == "__main__":
    main()
