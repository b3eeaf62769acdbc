"""M6 (MORLAIF, arXiv 2406.07295): a planted useless principle gets a weight near 0, an anti-aligned one a negative one.

Simulated feedback on pictures of the embedded model, wrong in a fifth of the pairs. The anti-aligned principle is the
aesthetic one turned round, in place of it and beside it. Of the useless one the labels are tossed; as a model of tossed
labels is some function of the pictures and not 0, several are planted, each of other tosses.

    python -m benchmarks.claims.m6
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.claims.feedback_runs import (
    EQUAL,
    LABELS,
    NAMES,
    SEEDS,
    label_differences,
    model,
    overall_labels,
    principles,
    several,
    weights,
)
from benchmarks.common import arguments, show, table, verdict
from raftdiff.evaluation import paired_interval
from raftdiff.preferences import Weight, objective_weights
from raftdiff.principles import Principle
from raftdiff.types import Interval

COIN = Principle(name="coin", modality="image", direction="more", wording="a quality that means nothing")
TOSSED = 0.5  # the noise that leaves nothing of a label
COINS = 12
TURNED = "aesthetic, turned round"
RESAMPLES = 400


def planted(output: str, seed: int) -> dict[str, Path]:
    """Models of the principles and of the one that is turned round, about which the judge is wrong in other pairs."""
    principle = principles()["aesthetic"].model_copy(update={"direction": "less"})
    turned = model(output, principle, EQUAL.noise, LABELS, seed, judge_seed=1)
    return several(output, EQUAL, seed=seed) | {TURNED: turned}


def coins(output: str) -> list[Weight]:
    """What each useless principle weighs beside the others."""
    found = []
    for toss in range(1, 1 + COINS):
        coin = model(output, COIN, TOSSED, LABELS, 0, judge_seed=toss)
        found.append(weights(output, several(output, EQUAL) | {"coin": coin}, EQUAL)[-1])
    return found


def intervals(output: str, names: tuple[str, ...]) -> dict[str, Interval]:
    """Each weight, the mean over the seeds, with its 95% interval by the bootstrap over prompts."""
    labels = overall_labels(output, EQUAL, None, 0)
    models = [{n: f for n, f in planted(output, seed).items() if n in names} for seed in SEEDS]
    of_seed = [label_differences(of, labels) for of in models]
    order = list(models[0])
    ids = [label.chosen.prompt.id for label in labels]
    rows_of = [np.flatnonzero(np.array(ids) == prompt) for prompt in dict.fromkeys(ids)]
    rng = np.random.default_rng(0)

    def weighed(rows_N: np.ndarray) -> np.ndarray:
        return np.mean([[w.weight for w in objective_weights(order, d_NR[rows_N])] for d_NR in of_seed], axis=0)

    resampled = [
        np.concatenate([rows_of[i] for i in rng.integers(len(rows_of), size=len(rows_of))]) for _ in range(RESAMPLES)
    ]
    low_R, high_R = np.percentile([weighed(rows_N) for rows_N in resampled], [2.5, 97.5], axis=0)
    mean_R = weighed(np.arange(len(labels)))
    return {
        name: Interval(mean=float(mean), low=float(low), high=float(high), count=len(rows_of))
        for name, mean, low, high in zip(order, mean_R, low_R, high_R, strict=True)
    }


def main() -> None:
    options = arguments(__doc__ or "")
    others = tuple(name for name in NAMES if name != "aesthetic")
    sets: Mapping[str, tuple[str, ...]] = {
        "as they are": NAMES,
        "turned round in place": (*others, TURNED),
        "beside it": (*NAMES, TURNED),
    }
    found = {title: intervals(options.output, names) for title, names in sets.items()}
    rows = [[name, *(show(of[name], 2) if name in of else "" for of in found.values())] for name in (*NAMES, TURNED)]
    table("\nWeights in overall preferences, in nats for a deviation (95% interval over prompts)", ["", *found], rows)
    tossed = coins(options.output)
    rows = [[str(i), f"{w.weight:+.2f} ({w.low:+.2f} to {w.high:+.2f})"] for i, w in enumerate(tossed, start=1)]
    table("\nWhat each model of tossed labels weighs beside the six", ["coin", "weight"], rows)
    mean = paired_interval([w.weight for w in tossed])
    turned = found["turned round in place"][TURNED]
    verdict(
        "M6",
        mean.low < 0 < mean.high and turned.high < 0,
        f"The {COINS} coins {show(mean, 2)}, {sum(w.low > 0 or w.high < 0 for w in tossed)} of them apart from 0 by "
        f"their own intervals; the one turned round {show(turned, 2)}, beside the aesthetic one "
        f"{show(found['beside it'][TURNED], 2)}",
    )


if __name__ == "__main__":
    main()
