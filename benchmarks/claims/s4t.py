"""S4 (ReST, arXiv 2308.08998, figure 5) for translations: behaviour cloning is at least as good as the offline-RL
losses, of which GOLD is one for texts alone. At a low temperature it shows what of a difference is sharpness.

    python -m benchmarks.claims.s4t
"""

from __future__ import annotations

from benchmarks.claims.s3 import right
from benchmarks.claims.text_runs import METRICS, rest, trained_policy
from benchmarks.common import arguments, difference, gains_table, show, table, verdict
from raftdiff.rounds import Result

LOSSES = ("bc", "vmpo", "bvmpo", "oac", "gold")


def right_when_cold(result: Result, temperature: float) -> str:
    """The share of strictly right translations where the model is sampled at a temperature, four of each prompt."""
    policy = trained_policy(result)
    policy.temperature = temperature
    return f"{right(policy, 4).mean():.3f}"


def main() -> None:
    options = arguments(__doc__ or "", temperature=0.2)
    results = {
        loss: rest(options.output, f"loss-{loss}", grows=1, thresholds=(0.5, 0.75), loss_type=loss) for loss in LOSSES
    }
    gains_table("One Grow, two Improve steps", results, METRICS)
    rows = [[loss, right_when_cold(result, options.temperature)] for loss, result in results.items()]
    table(f"\nStrictly right at temperature {options.temperature:g}", ["", "share"], rows)
    behind = {loss: difference(results["bc"], results[loss], "reward") for loss in LOSSES[1:]}
    verdict(
        "S4T",
        all(interval.high >= 0 for interval in behind.values()),
        "BC less each: " + ", ".join(f"{loss} {show(interval)}" for loss, interval in behind.items()),
    )


if __name__ == "__main__":
    main()
