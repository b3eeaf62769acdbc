"""R6 (RAFT, arXiv 2304.06767, section 6; Gao et al., arXiv 2210.10760): with a weak proxy for a reward, what is held
out peaks and then falls, and the run says so.

The proxy is compressibility: the smaller the picture as a JPEG, the better. What is held out is the oracle score.

    python -m benchmarks.claims.r6
"""

from __future__ import annotations

from benchmarks.common import arguments, configured, run, show, table, verdict

METRICS = ("reward", "shapes-oracle", "shapes-rating", "diversity")


def main() -> None:
    options = arguments(__doc__ or "", rounds=6, seed=1, preset="claims")
    changes = {
        "seed": options.seed,
        "rounds": options.rounds,
        "evaluation.every": 1,
        "rewards": [{"name": "jpeg"}],
        "training.learning_rate": 6e-4,
        "prompts.per_round": 32,
    }
    result = run(configured(options.preset, options.output, "r6", changes))
    evaluations = [report.evaluations[0] for report in result.reports]
    rows = [
        [str(report.round), *(f"{evaluation.metrics[metric].mean:.3f}" for metric in METRICS)]
        for report, evaluation in zip(result.reports, evaluations, strict=True)
    ]
    table("\nTrained on compressibility alone; means on held-out prompts", ["round", *METRICS], rows)
    oracle = [evaluation.metrics["shapes-oracle"].mean for evaluation in evaluations]
    reward = [evaluation.metrics["reward"].mean for evaluation in evaluations]
    peak = max(range(len(oracle)), key=oracle.__getitem__)
    fell = evaluations[-1].gains["shapes-oracle"]
    verdict(
        "R6",
        0 < peak < len(oracle) - 1 and fell.high < 0 and reward[-1] > reward[0] and result.verdict.kind != "healthy",
        f"reward {reward[0]:.2f} -> {reward[-1]:.2f}; oracle peaks after round {peak} and ends at {show(fell)} of the "
        f"base; the run says: {result.verdict.message}",
    )


if __name__ == "__main__":
    main()
