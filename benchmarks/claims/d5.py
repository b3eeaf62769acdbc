"""D5 (Diffusion-DPO, arXiv 2311.12908, appendix): both too small and too large a beta lose.

python -m benchmarks.claims.d5
"""

from __future__ import annotations

from benchmarks.claims.dpo_runs import METRICS, offline
from benchmarks.common import arguments, difference, end, gains_table, show, verdict


def main() -> None:
    options = arguments(__doc__ or "", betas=[10.0, 100.0, 1000.0, 10000.0])
    results = {beta: offline(options.output, beta) for beta in options.betas}
    gains_table("The same pairs", {f"beta {beta:g}": result for beta, result in results.items()}, METRICS)
    best = max(results, key=lambda beta: end(results[beta]).gains["reward"].mean)
    ends = {beta: difference(results[best], results[beta], "reward") for beta in (min(results), max(results))}
    verdict(
        "D5",
        best not in ends and all(interval.low > 0 for interval in ends.values()),
        f"best at beta {best:g}; above the ends by "
        + ", ".join(f"{show(interval)} (beta {beta:g})" for beta, interval in ends.items()),
    )


if __name__ == "__main__":
    main()
