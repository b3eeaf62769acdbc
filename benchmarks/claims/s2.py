"""S2 (ReST, arXiv 2308.08998, table 1): one Grow without a filter is about the base; two Grows with fewer Improve
steps are better than one with more.

    python -m benchmarks.claims.s2
"""

from __future__ import annotations

from benchmarks.claims.rest_runs import METRICS, one_grow, one_grow_no_filter, two_grows
from benchmarks.common import arguments, difference, end, gains_table, show, verdict


def main() -> None:
    options = arguments(__doc__ or "")
    results = {
        "G1 I0": one_grow_no_filter(options.output),
        "G1 I4": one_grow(options.output),
        "G2 I3": two_grows(options.output),
    }
    gains_table("ReST", results, METRICS)
    plain, more = end(results["G1 I0"]).gains["reward"], difference(results["G2 I3"], results["G1 I4"], "reward")
    verdict(
        "S2",
        not plain.excludes_zero and more.low > 0,
        f"G1 I0 against the base {show(plain)}; G2 I3 over G1 I4 {show(more)}",
    )


if __name__ == "__main__":
    main()
