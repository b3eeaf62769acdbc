"""M2 (MORLAIF, arXiv 2406.07295) for texts: accuracy on overall preferences falls as principles are removed.

Simulated feedback on reviews by the embedded language model, of which there are two principles: one or the other is
left out.

    python -m benchmarks.claims.m2t
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.claims.feedback_runs import EQUAL, SEEDS, over_prompts, percent, right
from benchmarks.claims.text_feedback import NAMES, several, true_pairs, weighted, weights
from benchmarks.common import arguments, table, verdict


def answers(output: str, left: Sequence[str]) -> np.ndarray:
    """Whether the principles that are left are right about each pair of unseen texts, [N], mean over the seeds."""
    found = []
    for seed in SEEDS:
        models = {name: folder for name, folder in several(output, EQUAL, seed=seed).items() if name in left}
        found.append(right(true_pairs(output), weighted(output, models, weights(output, models, EQUAL, seed=seed))))
    return np.mean(found, axis=0)


def main() -> None:
    options = arguments(__doc__ or "")
    pairs, both_N = true_pairs(options.output), answers(options.output, NAMES)
    rows, falls = [["none", percent(over_prompts(pairs, both_N)), ""]], {}
    for name in NAMES:
        left_N = answers(options.output, [other for other in NAMES if other != name])
        falls[name] = over_prompts(pairs, left_N - both_N)
        rows.append([name, percent(over_prompts(pairs, left_N)), percent(falls[name], sign=True)])
    heading = f"\nA judge wrong in {EQUAL.noise:.0%}: right about overall preference, %"
    table(heading, ["left out", "right", "change"], rows)
    verdict(
        "M2T",
        all(fall.high < 0 for fall in falls.values()),
        "; ".join(f"without {name} {percent(fall, sign=True)} points" for name, fall in falls.items()),
    )


if __name__ == "__main__":
    main()
