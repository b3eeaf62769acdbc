"""S4 (ReST, arXiv 2308.08998, figure 5): behaviour cloning is at least as good as the offline-RL losses.

V-MPO, BVMPO and OAC are surrogates here, weights on the denoising error (docs/rest.md).

    python -m benchmarks.claims.s4
"""

from __future__ import annotations

from benchmarks.claims.rest_runs import METRICS, rest
from benchmarks.common import arguments, difference, gains_table, show, verdict

LOSSES = ("bc", "vmpo", "bvmpo", "oac")


def main() -> None:
    options = arguments(__doc__ or "")
    results = {
        loss: rest(options.output, f"loss-{loss}", grows=1, thresholds=(0.5, 0.75), loss_type=loss) for loss in LOSSES
    }
    gains_table("One Grow, two Improve steps", results, METRICS)
    behind = {loss: difference(results["bc"], results[loss], "reward") for loss in LOSSES[1:]}
    verdict(
        "S4",
        all(interval.high >= 0 for interval in behind.values()),
        "BC less each: " + ", ".join(f"{loss} {show(interval)}" for loss, interval in behind.items()),
    )


if __name__ == "__main__":
    main()
