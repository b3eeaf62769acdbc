"""M5 (MORLAIF, arXiv 2406.07295) for texts: changing only the weights moves the behavior; no preference model is
trained again.

Simulated feedback on reviews by the embedded language model. The same two small preference models throughout, of tone
and of length: RAFT with all weight on the one, on the other, and on both. The exact judge measures.

    python -m benchmarks.claims.m5t
"""

from __future__ import annotations

from benchmarks.claims.text_feedback import aligned, model, reward
from benchmarks.common import arguments, difference, gains_table, show, verdict

METRICS = ("true-tone", "true-length", "sentiment", "diversity")
WEIGHTS = {"tone": (1.0, 0.0), "length": (0.0, 1.0), "both": (1.0, 1.0)}


def main() -> None:
    options = arguments(__doc__ or "", noise=0.1)
    models = {name: model(options.output, name, noise=options.noise) for name in ("tone", "length")}
    results = {
        alone: aligned(
            options.output,
            f"m5-{alone}",
            [reward(folder, name, weight) for (name, folder), weight in zip(models.items(), weights, strict=True)],
        )
        for alone, weights in WEIGHTS.items()
    }
    gains_table("All weight on one preference model, or on both", results, METRICS)
    tone, length = (difference(results["tone"], results["length"], f"true-{name}") for name in models)
    verdict(
        "M5T",
        tone.low > 0 and length.high < 0,
        f"Weight on tone less weight on length: true tone {show(tone)}, true length {show(length)}, of 9 grades",
    )


if __name__ == "__main__":
    main()
