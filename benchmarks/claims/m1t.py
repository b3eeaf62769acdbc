"""M1 (MORLAIF, arXiv 2406.07295) for texts: several preference models together predict overall preference better than
one at equal labels.

Simulated feedback on reviews by the embedded language model. Several: n labels for each of two principles, and n
overall labels on other prompts, by which the two are weighed; one model: as many overall labels as these together, 3 n,
or as many pairs, n. All are language models of an eighth of the generator's size that begin at random weights. Right is
who agrees with the exact overall judge on unseen prompts.

    python -m benchmarks.claims.m1t
"""

from __future__ import annotations

import numpy as np

from benchmarks.claims.feedback_runs import EQUAL, HARDER, SEEDS, Judges, over_prompts, percent, right
from benchmarks.claims.text_feedback import LABELS, NAMES, scores, several, single, true_pairs, weighted, weights
from benchmarks.common import arguments, table, verdict

ROWS = ("several, weighed", "one, as many labels", "one, as many pairs")


def answers(output: str, judges: Judges, count: int, seed: int) -> dict[str, np.ndarray]:
    """Whether each is right about each pair of unseen texts, [N]; the principles alone as well."""
    models = several(output, judges, count=count, seed=seed)
    weighed_N = weighted(output, models, weights(output, models, judges, count=count, seed=seed))
    one = [single(output, judges, count=n, seed=seed) for n in ((len(NAMES) + 1) * count, count)]
    every = dict(zip(ROWS, (weighed_N, *(scores(output, folder) for folder in one)), strict=True))
    every |= {f"{name} alone": scores(output, folder) for name, folder in models.items()}
    return {row: right(true_pairs(output), score_N) for row, score_N in every.items()}


def main() -> None:
    options = arguments(__doc__ or "", counts=[320, 640, LABELS])
    pairs, gains = true_pairs(options.output), {}
    for judges in (EQUAL, HARDER):
        mean = {}
        for n in options.counts:
            of_seed = [answers(options.output, judges, n, seed) for seed in SEEDS]
            mean[n] = {row: np.mean([found[row] for found in of_seed], axis=0) for row in of_seed[0]}
        rows = [[row, *(percent(over_prompts(pairs, mean[n][row])) for n in mean)] for row in of_seed[0]]
        for one in ROWS[1:]:
            gained = {n: over_prompts(pairs, mean[n][ROWS[0]] - mean[n][one]) for n in mean}
            gains[judges, one] = gained[options.counts[-1]]
            rows.append([f"weighed less {one}", *(percent(gained[n], sign=True) for n in mean)])
        noise = f"wrong about a principle in {judges.noise:.0%}, about the whole in {judges.overall_noise:.0%}"
        table(f"\nRight about overall preference, %; a judge {noise}", ["", *(f"n = {n}" for n in mean)], rows)
    shown = {judges: percent(gains[judges, ROWS[1]], sign=True) for judges in (EQUAL, HARDER)}
    verdict(
        "M1T",
        gains[EQUAL, ROWS[1]].low > 0,
        f"Several less one at as many labels, points: {shown[EQUAL]} with noise 20% in both; {shown[HARDER]} where the "
        "judge is wrong about a principle in 10% and about the whole in 30%",
    )


if __name__ == "__main__":
    main()
