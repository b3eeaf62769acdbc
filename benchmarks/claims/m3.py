"""M3 (MORLAIF, arXiv 2406.07295): every scalariser beats the single preference model as a reward, and wins 40% to 60%
against each other one.

Simulated feedback on pictures of the embedded model. What is trained and what is only selected: each of the seven picks
the best of 8 of the base's pictures for unseen prompts, which is selection; two of them and the single model also train
the generator, by a short run of RAFT each. The exact overall judge decides who wins.

    python -m benchmarks.claims.m3
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np

from benchmarks.claims.feedback_runs import (
    CANDIDATES,
    EQUAL,
    HARDER,
    LABELS,
    NAMES,
    OVERALL,
    SEEDS,
    Judges,
    exact,
    percent,
    reward,
    scores,
    several,
    single,
    standing,
    trained,
    weights,
)
from benchmarks.common import arguments, console, difference, gains_table, show, table, verdict
from raftdiff.evaluation import paired_interval
from raftdiff.objectives import scalarize
from raftdiff.preferences import Weight
from raftdiff.rounds import Result
from raftdiff.types import Interval

SCALARIZERS = (
    "weighted-linear",
    "worst-case",
    "soft-max-min",
    "uncertainty-weighted",
    "lower-quantile",
    "max-median",
    "bernoulli-nash",
)
AS_LABELS, AS_PAIRS = "one, as many labels", "one, as many pairs"
ONE = {AS_LABELS: (len(NAMES) + 1) * LABELS, AS_PAIRS: LABELS}


def picks(output: str, judges: Judges, seed: int) -> dict[str, np.ndarray]:
    """The unseen picture of each prompt that each reward would take, [P]."""
    models = several(output, judges, seed=seed)
    found = weights(output, models, judges, count=LABELS, seed=seed)
    one = {name: scores(output, single(output, judges, count=count, seed=seed)) for name, count in ONE.items()}
    return best({w: scores(output, models[w.name]) for w in found}, one, CANDIDATES)


def best(
    score_of: Mapping[Weight, np.ndarray], one: Mapping[str, np.ndarray], candidates: int
) -> dict[str, np.ndarray]:
    """Where the best of each prompt's candidates is, [P], by each scalariser of the weighed scores [N] and by each
    single score [N]."""
    weight_of = {w.name: w.weight for w in score_of}
    z_RN = [w.weight * standing(score_N) for w, score_N in score_of.items()]
    of_sample = [dict(zip(weight_of, z_R, strict=True)) for z_R in zip(*z_RN, strict=True)]
    rewards = {how: np.array([scalarize(z, weight_of, how) for z in of_sample]) for how in SCALARIZERS} | dict(one)
    first_P = np.arange(0, len(of_sample), candidates)
    return {name: first_P + value_N.reshape(-1, candidates).argmax(1) for name, value_N in rewards.items()}


def wins(value_N: np.ndarray, left: list[np.ndarray], right: list[np.ndarray]) -> Interval:
    """How often the pick on the left is truly better, equal ones for one half, mean over the seeds."""
    of_seed = [(np.sign(value_N[a] - value_N[b]) + 1) / 2 for a, b in zip(left, right, strict=True)]
    return paired_interval(np.mean(of_seed, axis=0))


def selected(output: str, judges: Judges) -> tuple[dict[str, Interval], list[float]]:
    """Print what each picks; the share of prompts that each scalariser wins against one model of as many labels, and
    those of each pair of scalarisers."""
    of_seed = [picks(output, judges, seed) for seed in SEEDS]
    of = {name: [found[name] for found in of_seed] for name in of_seed[0]}
    rows = []
    for name, picked in of.items():
        cells = [name]
        for quality in (OVERALL, "aesthetic"):
            value_N = exact(output, quality)
            drawn_P = value_N.reshape(-1, CANDIDATES).mean(1)
            cells.append(show(paired_interval(np.mean([value_N[picked_P] for picked_P in picked], axis=0) - drawn_P)))
        cells += [percent(wins(exact(output, OVERALL), picked, of[one])) for one in ONE]
        same = np.mean([a == b for a, b in zip(picked, of["weighted-linear"], strict=True)])
        rows.append([*cells, f"{100 * same:.0f}"])
    noise = f"wrong about a principle in {judges.noise:.0%}, about the whole in {judges.overall_noise:.0%}"
    columns = ["best of 8 by", "true overall, over a random one", "true aesthetic"]
    columns += [f"wins against {one}, %" for one in ONE]
    table(f"\nSelected, not trained; a judge {noise}", [*columns, "same as linear, %"], rows)
    against = {how: wins(exact(output, OVERALL), of[how], of[AS_LABELS]) for how in SCALARIZERS}
    pairwise = [wins(exact(output, OVERALL), of[a], of[b]).mean for a, b in combinations(SCALARIZERS, 2)]
    console.print(f"Scalarisers against each other: {min(pairwise):.1%} to {max(pairwise):.1%} of the prompts")
    return against, pairwise


def runs(output: str, judges: Judges) -> dict[str, Result]:
    """RAFT on two of the scalarisers, and on one model."""
    models = several(output, judges)
    found = weights(output, models, judges, count=LABELS)
    weighed = [reward(models[w.name], w.name, round(w.weight, 4)) for w in found]
    linear, worst = (trained(output, how, weighed, how) for how in ("weighted-linear", "worst-case"))
    one = trained(output, "one", [reward(single(output, judges, count=ONE[AS_LABELS]), OVERALL)])
    return {"weighted-linear": linear, "worst-case": worst, AS_LABELS: one}


def main() -> None:
    options = arguments(__doc__ or "")
    against, pairwise = {}, {}
    for judges in (EQUAL, HARDER):
        against[judges], pairwise[judges] = selected(options.output, judges)
    results = runs(options.output, HARDER)
    metrics = [f"true-{OVERALL}", "true-aesthetic", "shapes-oracle", "diversity"]
    gains_table("Trained, a judge that finds the whole harder", results, metrics)
    over_one = {how: difference(results[how], results[AS_LABELS], f"true-{OVERALL}") for how in list(results)[:2]}
    rows = [[f"{how} less {AS_LABELS}", show(over)] for how, over in over_one.items()]
    table("\nTrue overall grade, 1 to 9, at the end", ["", "difference"], rows)
    close = all(0.4 <= share <= 0.6 for of in pairwise.values() for share in of)
    verdict(
        "M3",
        close and all(share.low > 0.5 for share in against[EQUAL].values()),
        f"Selected with noise 20%, {sum(s.low > 0.5 for s in against[EQUAL].values())} of 7 beat one model; where the "
        f"whole is harder to judge, {sum(s.low > 0.5 for s in against[HARDER].values())}; against each other within "
        f"40% to 60%: {close}. Trained, over one: "
        + ", ".join(f"{how} {show(over)}" for how, over in over_one.items()),
    )


if __name__ == "__main__":
    main()
