"""R3 (RAFT, arXiv 2304.06767, section 3) for texts, where the log-ratio is exact: raising beta of the KL-regularised
ranking lowers the divergence from the base and, weakly, the reward.

    python -m benchmarks.claims.r3t
"""

from __future__ import annotations

from benchmarks.claims.text_runs import continuation, divergence, log_ratios, written
from benchmarks.common import arguments, difference, gains_table, show, table, verdict
from raftdiff.evaluation import paired_interval

METRICS = ("reward", "diversity")


def main() -> None:
    options = arguments(__doc__ or "", betas=[0.0, 0.02, 0.1])
    results = {
        f"beta {beta:g}": continuation(
            options.output, f"r3-beta{beta:g}", **{"algorithm": {"name": "raft", "options": {"kl_beta": beta}}}
        )
        for beta in options.betas
    }
    gains_table("Continuations, sentiment", results, METRICS)
    rows = [[name, show(divergence(result))] for name, result in results.items()]
    table("\nDivergence of a text from the base", ["", "nats"], rows)
    free, *_, held = results.values()
    prompts = [sample.prompt.id for sample in written(held)]
    closer = paired_interval(log_ratios(held) - log_ratios(free), prompts)
    weaker = difference(held, free, "reward")
    verdict(
        "R3T",
        closer.high < 0 and weaker.low <= 0,
        f"The largest beta less none: divergence {show(closer)} nats, reward {show(weaker)}",
    )


if __name__ == "__main__":
    main()
