"""D4 (Diffusion-DPO, arXiv 2311.12908, section 5.2): where the data are no better than the base, DPO on preferences
beats the base and SFT on their winners.

The pairs are two samples of the base for each prompt, so the data are about as good as the base.

    python -m benchmarks.claims.d4
"""

from __future__ import annotations

from benchmarks.claims.dpo_runs import METRICS, offline, sft
from benchmarks.common import arguments, difference, end, gains_table, show, verdict


def main() -> None:
    options = arguments(__doc__ or "")
    results = {"DPO": offline(options.output, samples=2), "SFT on winners": sft(options.output, samples=2)}
    gains_table("The same pairs", results, METRICS)
    over_base = end(results["DPO"]).gains["reward"]
    over_sft = difference(results["DPO"], results["SFT on winners"], "reward")
    verdict(
        "D4",
        over_base.low > 0 and over_sft.low > 0,
        f"DPO over the base {show(over_base)}, over SFT on winners {show(over_sft)}",
    )


if __name__ == "__main__":
    main()
