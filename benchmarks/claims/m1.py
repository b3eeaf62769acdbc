"""M1 (MORLAIF, arXiv 2406.07295): several preference models together predict overall preference better than one at
equal labels.

Simulated feedback on pictures of the embedded model. Several: n labels for each of six principles, and n overall labels
on other prompts, by which the six are weighed; one model: as many overall labels as these together, 7 n, or as many
pairs, n. Right is who agrees with the exact overall judge on unseen prompts.

    python -m benchmarks.claims.m1
"""

from __future__ import annotations

import numpy as np

from benchmarks.claims.feedback_runs import (
    EQUAL,
    EXACT,
    HARDER,
    LABELS,
    NAMES,
    OVERALL,
    SEEDS,
    Judges,
    exact,
    over_prompts,
    percent,
    right,
    scores,
    several,
    single,
    standing,
    true_pairs,
    weighted,
    weights,
)
from benchmarks.common import arguments, table, verdict
from raftdiff.errors import DataError
from raftdiff.preferences import objective_weights

ROWS = ("several, weighed", "several, equal weights", "one, as many labels", "one, as many pairs")


def answers(output: str, judges: Judges, count: int, seed: int) -> dict[str, np.ndarray]:
    """Whether each is right about each pair of unseen pictures, [N]."""
    models = several(output, judges, count=count, seed=seed)
    equal_N = sum((standing(scores(output, folder)) for folder in models.values()), np.zeros(1))
    try:
        weighed_N = weighted(output, models, weights(output, models, judges, count=count, seed=seed))
    except DataError:  # too few overall labels for finite weights
        weighed_N = equal_N
    one = [single(output, judges, count=n, seed=seed) for n in (len(NAMES) * count + count, count)]
    every = (weighed_N, equal_N, *(scores(output, folder) for folder in one))
    return {row: right(true_pairs(output), score_N) for row, score_N in zip(ROWS, every, strict=True)}


def by_principle(output: str, judges: Judges) -> list[str]:
    """How often each model is right about its own principle."""
    cells = []
    for name, folder in several(output, judges).items():
        pairs = true_pairs(output, name)
        cells.append(percent(over_prompts(pairs, right(pairs, scores(output, folder)))))
    return cells


def ceiling(output: str) -> str:
    """How often a weighted sum of the exact principles themselves is right."""
    pairs = true_pairs(output)
    difference_NR = np.stack([exact(output, n)[pairs.better] - exact(output, n)[pairs.worse] for n in NAMES], axis=1)
    found = objective_weights(NAMES, difference_NR)
    return percent(over_prompts(pairs, (difference_NR @ [w.raw for w in found] > 0).astype(float)))


def main() -> None:
    options = arguments(__doc__ or "", counts=[80, 160, LABELS])
    output, pairs = options.output, true_pairs(options.output)
    gains = {}
    for judges in (EXACT, EQUAL, HARDER):
        found = {n: [answers(output, judges, n, seed) for seed in SEEDS] for n in options.counts}
        mean = {n: {row: np.mean([f[row] for f in of], axis=0) for row in ROWS} for n, of in found.items()}
        rows = [[row, *(percent(over_prompts(pairs, mean[n][row])) for n in mean)] for row in ROWS]
        for one in ROWS[2:]:
            gained = {n: over_prompts(pairs, mean[n][ROWS[0]] - mean[n][one]) for n in mean}
            gains[judges, one] = gained[options.counts[-1]]
            rows.append([f"weighed less {one}", *(percent(gained[n], sign=True) for n in mean)])
        noise = f"wrong about a principle in {judges.noise:.0%}, about the whole in {judges.overall_noise:.0%}"
        table(f"\nRight about overall preference, %; a judge {noise}", ["", *(f"n = {n}" for n in mean)], rows)
    of_each = {judges: by_principle(output, judges) for judges in (EXACT, EQUAL)}
    table(
        f"\nEach model right about its own principle, n = {options.counts[-1]}, %",
        ["", *(judges.name for judges in of_each)],
        [[name, *(cells[i] for cells in of_each.values())] for i, name in enumerate(NAMES)],
    )
    table("\nThe exact principles themselves, weighed, %", ["", OVERALL], [["", ceiling(output)]])
    shown = {judges: percent(gains[judges, ROWS[2]], sign=True) for judges in (EXACT, EQUAL, HARDER)}
    verdict(
        "M1",
        gains[EQUAL, ROWS[2]].low > 0,
        f"Several less one at as many labels, points: {shown[EQUAL]} with noise 20% in both; {shown[EXACT]} without; "
        f"{shown[HARDER]} where the judge is wrong about a principle in 10% and about the whole in 30%",
    )


if __name__ == "__main__":
    main()
