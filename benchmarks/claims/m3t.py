"""M3 (MORLAIF, arXiv 2406.07295) for texts: every scalariser beats the single preference model as a reward, and wins
40% to 60% against each other one.

Simulated feedback on reviews by the embedded language model. Each of the seven picks the best of 6 texts of the base
for unseen prompts, which is selection; the weighted sum, the worst case and the single model also train the generator.
The exact overall judge decides who wins.

    python -m benchmarks.claims.m3t
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from benchmarks.claims.feedback_runs import EQUAL, HARDER, OVERALL, SEEDS, Judges, percent
from benchmarks.claims.m3 import AS_LABELS, AS_PAIRS, SCALARIZERS, best, wins
from benchmarks.claims.text_feedback import (
    CANDIDATES,
    LABELS,
    NAMES,
    aligned,
    exact,
    reward,
    scores,
    several,
    single,
    weights,
)
from benchmarks.common import arguments, console, difference, gains_table, show, table, verdict
from raftdiff.evaluation import paired_interval
from raftdiff.rounds import Result
from raftdiff.types import Interval

ONE = {AS_LABELS: (len(NAMES) + 1) * LABELS, AS_PAIRS: LABELS}
METRICS = ("true-overall", "true-tone", "true-length", "sentiment", "diversity")


def picks(output: str, judges: Judges, seed: int) -> dict[str, np.ndarray]:
    """The unseen text of each prompt that each reward would take, [P]."""
    models = several(output, judges, seed=seed)
    found = weights(output, models, judges, seed=seed)
    one = {name: scores(output, single(output, judges, count=count, seed=seed)) for name, count in ONE.items()}
    return best({w: scores(output, models[w.name]) for w in found}, one, CANDIDATES)


def selected(output: str, judges: Judges) -> tuple[dict[str, Interval], list[float]]:
    """Print what each picks; the share of prompts that each scalariser wins against one model of as many labels, and
    those of each pair of scalarisers."""
    of_seed = [picks(output, judges, seed) for seed in SEEDS]
    of = {name: [found[name] for found in of_seed] for name in of_seed[0]}
    value_N = exact(output, OVERALL)
    drawn_P = value_N.reshape(-1, CANDIDATES).mean(1)
    rows = [
        [
            name,
            show(paired_interval(np.mean([value_N[picked_P] for picked_P in picked], axis=0) - drawn_P)),
            *(percent(wins(value_N, picked, of[one])) for one in ONE),
        ]
        for name, picked in of.items()
    ]
    noise = f"wrong about a principle in {judges.noise:.0%}, about the whole in {judges.overall_noise:.0%}"
    columns = ["best of 6 by", "true overall, over a random one", *(f"wins against {one}, %" for one in ONE)]
    table(f"\nSelected, not trained; a judge {noise}", columns, rows)
    against = {how: wins(value_N, of[how], of[AS_LABELS]) for how in SCALARIZERS}
    return against, [wins(value_N, of[a], of[b]).mean for a, b in combinations(SCALARIZERS, 2)]


def runs(output: str, judges: Judges) -> dict[str, Result]:
    """RAFT on two of the scalarisers, and on one model."""
    models = several(output, judges)
    weighed = [reward(models[w.name], w.name, w.weight) for w in weights(output, models, judges)]
    one = single(output, judges, count=ONE[AS_LABELS])
    return {how: aligned(output, f"m3-{how}", weighed, combine=how) for how in ("weighted-linear", "worst-case")} | {
        AS_LABELS: aligned(output, "m3-one", [reward(one, OVERALL)])
    }


def main() -> None:
    options = arguments(__doc__ or "")
    found = {judges: selected(options.output, judges) for judges in (EQUAL, HARDER)}
    against, pairwise = found[EQUAL]
    trained = runs(options.output, HARDER)
    gains_table(f"Trained, {HARDER.name}; true grades are of 1 to 9", trained, METRICS)
    over = {how: difference(trained[how], trained[AS_LABELS], "true-overall") for how in list(trained)[:2]}
    console.print(f"Scalarisers against each other: {min(pairwise):.1%} to {max(pairwise):.1%} of the prompts")
    verdict(
        "M3T",
        all(share.low > 0.5 for share in against.values()) and min(pairwise) >= 0.4 and max(pairwise) <= 0.6,
        f"Selected with noise 20%, {sum(share.low > 0.5 for share in against.values())} of {len(against)} beat one "
        f"model, where the whole is harder to judge {sum(s.low > 0.5 for s in found[HARDER][0].values())}; trained, "
        f"over one: {', '.join(f'{how} {show(gain)}' for how, gain in over.items())}",
    )


if __name__ == "__main__":
    main()
