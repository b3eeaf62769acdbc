"""R6 (RAFT, arXiv 2304.06767, section 6; Gao et al., arXiv 2210.10760): with a weak proxy for a reward, what is held
out peaks and then falls, and the run says so.

The proxy is an aesthetic head that was fitted, by ridge regression on CLIP embeddings, to the true ratings of a few of
the base's own pictures. What is held out is the true rating itself.

    python -m benchmarks.claims.r6
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.common import arguments, compare, configured, console, run, show, table, verdict
from raftdiff.build import build_policy
from raftdiff.config import RunConfig
from raftdiff.pipelines.loading import load_pipeline
from raftdiff.prompts import load_prompts
from raftdiff.reward_models.encoders import clip_encoder
from raftdiff.reward_models.images import pixels
from raftdiff.reward_models.shapes_oracle import ShapesRatingReward

METRICS = ("reward", "shapes-rating", "shapes-oracle", "diversity")
HELD_OUT = "shapes-rating"
RIDGE = 1e-3
OTHERS = 128  # pictures that the head was not fitted to


def weak_head(config: RunConfig, labels: int, path: Path) -> float:
    """Write a linear head in the format of LAION's first predictor; how it correlates with the truth elsewhere."""
    policy = build_policy(config, load_pipeline(config.model, "cpu"))
    prompts = load_prompts(config.prompts.source)
    seeds = list(range(labels + OTHERS))
    samples = policy.sample([prompts[seed % len(prompts)] for seed in seeds], seeds)
    encoder = clip_encoder("shapes")
    x_ND = encoder.image_features([pixels(sample) for sample in samples], batch_size=64).double()
    y_N = ShapesRatingReward().score(samples).double()
    mean_D, mean = x_ND[:labels].mean(0), y_N[:labels].mean()
    centered = x_ND[:labels] - mean_D
    gram = centered.T @ centered + RIDGE * torch.eye(len(mean_D), dtype=torch.float64)
    weight_D = torch.linalg.solve(gram, centered.T @ (y_N[:labels] - mean))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"weight": weight_D[None].float(), "bias": (mean - mean_D @ weight_D)[None].float()}, path)
    return float(np.corrcoef((x_ND[labels:] @ weight_D).numpy(), y_N[labels:].numpy())[0, 1])


def main() -> None:
    options = arguments(__doc__ or "", rounds=10, seed=1, labels=8, preset="claims")
    head = Path(options.output) / f"weak-head-{options.labels}.safetensors"
    correlation = weak_head(configured(options.preset, options.output, "r6", {}), options.labels, head)
    console.print(f"The proxy, fitted to {options.labels} ratings, correlates {correlation:.2f} with the true one.")
    changes = {
        "seed": options.seed,
        "rounds": options.rounds,
        "evaluation.every": 1,
        "rewards": [{"name": "aesthetic", "options": {"model": "shapes", "head": str(head)}}],
        "training.learning_rate": 6e-4,
        "prompts.per_round": 32,
    }
    config = configured(options.preset, options.output, "r6", changes)
    result = run(config)
    evaluations = [report.evaluations[0] for report in result.reports]
    rows = [
        [str(report.round), *(f"{evaluation.metrics[metric].mean:.3f}" for metric in METRICS)]
        for report, evaluation in zip(result.reports, evaluations, strict=True)
    ]
    table("\nTrained on the proxy alone; means on held-out prompts", ["round", *METRICS], rows)
    truth = [evaluation.metrics[HELD_OUT].mean for evaluation in evaluations]
    reward = [evaluation.metrics["reward"].mean for evaluation in evaluations]
    peak = max(range(len(truth)), key=truth.__getitem__)
    fall = compare([evaluations[-1]], [evaluations[peak]], HELD_OUT, config.evaluation.seeds_per_prompt)
    verdict(
        "R6",
        peak > 0 and fall.high < 0 and reward[-1] > reward[peak] and result.verdict.kind != "healthy",
        f"The proxy {reward[0]:.2f} -> {reward[peak]:.2f} -> {reward[-1]:.2f}; the true rating {truth[0]:.2f} -> "
        f"{truth[peak]:.2f} after round {peak}, then {show(fall)}; the run says: {result.verdict.message}",
    )


if __name__ == "__main__":
    main()
