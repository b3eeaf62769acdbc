"""R3 (RAFT, arXiv 2304.06767, section 3): raising beta of the KL-regularised ranking lowers drift from the base and,
weakly, the reward.

    python -m benchmarks.claims.r3
"""

from __future__ import annotations

from benchmarks.common import (
    arguments,
    configured,
    difference,
    drift,
    drift_difference,
    gains_table,
    run,
    show,
    verdict,
)

METRICS = ("reward", "shapes-oracle", "shapes-rating", "diversity")


def main() -> None:
    options = arguments(__doc__ or "", betas=[0.0, 100.0, 1000.0], rounds=3, seed=1, preset="claims")
    results = {}
    for beta in options.betas:
        changes = {
            "seed": options.seed,
            "rounds": options.rounds,
            "evaluation.every": options.rounds,
            "algorithm.options": {"kl_beta": beta},
        }
        results[f"beta {beta:g}"] = run(configured(options.preset, options.output, f"r3-beta{beta:g}", changes))
    gains_table("R3", results, METRICS)
    free, *_, held = results.values()
    closer, weaker = drift_difference(held, free), difference(held, free, "reward")
    means = ", ".join(f"{name} {drift(result).mean():.4f}" for name, result in results.items())
    verdict(
        "R3",
        closer.high < 0 and weaker.low <= 0,
        f"drift: {means}; the largest beta less none: drift {show(closer, 4)}, reward {show(weaker)}",
    )


if __name__ == "__main__":
    main()
