"""S2 (ReST, arXiv 2308.08998, table 1) for translations: one Grow without a filter is about the base; two Grows with
fewer Improve steps are better than one with more.

    python -m benchmarks.claims.s2t
"""

from __future__ import annotations

from benchmarks.claims.text_runs import METRICS, rest
from benchmarks.common import arguments, difference, end, gains_table, show, verdict


def main() -> None:
    options = arguments(__doc__ or "")
    results = {
        "G1 I0": rest(options.output, "g1i0", grows=1, thresholds=(0.0,), rule="global"),
        "G1 I4": rest(options.output, "g1i4", grows=1, thresholds=(0.5, 0.75, 0.875, 0.9)),
        "G2 I3": rest(options.output, "g2i3", grows=2, thresholds=(0.5, 0.75, 0.875)),
    }
    gains_table("ReST, translation", results, METRICS)
    plain, more = end(results["G1 I0"]).gains["reward"], difference(results["G2 I3"], results["G1 I4"], "reward")
    verdict(
        "S2T",
        not plain.excludes_zero and more.low > 0,
        f"G1 I0 against the base {show(plain)}; G2 I3 over G1 I4 {show(more)}",
    )


if __name__ == "__main__":
    main()
