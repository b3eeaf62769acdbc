"""M5 (MORLAIF, arXiv 2406.07295): changing only the weights moves the behavior; no preference model is trained again.

Simulated feedback on pictures of the embedded model; the same preference models throughout. First the best of 8 by each
principle alone, which is selection; then two short runs of RAFT, all weight on the aesthetic principle, and all on
placement: the size, the position and the relation that a prompt asks for. The exact judge measures.

    python -m benchmarks.claims.m5
"""

from __future__ import annotations

import numpy as np

from benchmarks.claims.feedback_runs import CANDIDATES, HARDER, NAMES, exact, reward, scores, several, trained
from benchmarks.common import arguments, difference, gains_table, show, table, verdict
from raftdiff.evaluation import paired_interval

WEIGHTED = ("aesthetic", "placement")
METRICS = (*(f"true-{name}" for name in NAMES), "shapes-oracle", "diversity")


def selection_table(output: str) -> None:
    """What the best of 8 by each principle alone has of each, over a random one."""
    rows = []
    for chosen_by, folder in several(output, HARDER).items():
        best_P = scores(output, folder).reshape(-1, CANDIDATES).argmax(1)
        gains = []
        for quality in NAMES:
            value_PN = exact(output, quality).reshape(-1, CANDIDATES)
            gains.append(paired_interval(value_PN[np.arange(len(best_P)), best_P] - value_PN.mean(1)))
        rows.append([chosen_by, *(show(gain) for gain in gains)])
    table("\nSelected, not trained: the best of 8 over a random one, each 0 to 1", ["all weight on", *NAMES], rows)


def main() -> None:
    options = arguments(__doc__ or "")
    selection_table(options.output)
    models = several(options.output, HARDER)
    results = {
        alone: trained(options.output, alone, [reward(models[name], name, float(name == alone)) for name in NAMES])
        for alone in WEIGHTED
    }
    gains_table("Trained; true grades are of 1 to 9", results, METRICS)
    less = {metric: difference(*results.values(), metric) for metric in METRICS}
    rows = [[metric, show(interval)] for metric, interval in less.items()]
    table("\nAll weight on the aesthetic principle less all on placement", ["", "difference"], rows)
    taste, placement = (less[f"true-{name}"] for name in WEIGHTED)
    verdict(
        "M5",
        taste.low > 0 and placement.high < 0,
        f"Weight on the aesthetic principle less weight on placement: true aesthetic grade {show(taste)}, true "
        f"placement {show(placement)}",
    )


if __name__ == "__main__":
    main()
