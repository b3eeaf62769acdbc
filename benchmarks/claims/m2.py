"""M2 (MORLAIF, arXiv 2406.07295): accuracy on overall preferences falls as principles are removed.

Simulated feedback on pictures of the embedded model; the principles are dropped one at a time, by what they weigh, and
what is left is weighed anew.

    python -m benchmarks.claims.m2
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.claims.feedback_runs import (
    EQUAL,
    EXACT,
    NAMES,
    SEEDS,
    Judges,
    over_prompts,
    percent,
    right,
    several,
    true_pairs,
    weighted,
    weights,
)
from benchmarks.common import arguments, table, verdict


def heaviest_first(output: str, judges: Judges) -> list[str]:
    """The principles by their mean weight over the seeds."""
    of_seed = [weights(output, several(output, judges, seed=seed), judges) for seed in SEEDS]
    mean = {name: np.mean([w.weight for of in of_seed for w in of if w.name == name]) for name in NAMES}
    return sorted(NAMES, key=lambda name: -mean[name])


def answers(output: str, judges: Judges, left: Sequence[str]) -> np.ndarray:
    """Whether the principles that are left are right about each pair of unseen pictures, [N], mean over the seeds."""
    found = []
    for seed in SEEDS:
        models = {name: folder for name, folder in several(output, judges, seed=seed).items() if name in left}
        found.append(right(true_pairs(output), weighted(output, models, weights(output, models, judges))))
    return np.mean(found, axis=0)


def main() -> None:
    options = arguments(__doc__ or "")
    output, pairs = options.output, true_pairs(options.output)
    falls = {}
    for judges in (EXACT, EQUAL):
        order = heaviest_first(output, judges)
        for title, dropped in (("the heaviest first", order), ("the lightest first", order[::-1])):
            of_count = [answers(output, judges, dropped[gone:]) for gone in range(len(dropped))]
            rows = [["none", percent(over_prompts(pairs, of_count[0])), ""]]
            for gone in range(1, len(dropped)):
                change = over_prompts(pairs, of_count[gone] - of_count[gone - 1])
                after = percent(over_prompts(pairs, of_count[gone]))
                rows.append([f"and {dropped[gone - 1]}", after, percent(change, sign=True)])
            falls[judges, title] = over_prompts(pairs, of_count[-1] - of_count[0])
            heading = f"\nA judge wrong in {judges.noise:.0%}: right about overall preference, %; {title}"
            table(heading, ["dropped", "right", "change"], rows)
    shown = {title: percent(fall, sign=True) for (judges, title), fall in falls.items() if judges == EQUAL}
    verdict(
        "M2",
        all(fall.high < 0 for fall in falls.values()),
        f"From six principles to one, noise 20%, points: {'; '.join(f'{t} {fall}' for t, fall in shown.items())}",
    )


if __name__ == "__main__":
    main()
