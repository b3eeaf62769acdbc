"""S1 (ReST, arXiv 2308.08998, figure 3): every Improve step raises the reward.

python -m benchmarks.claims.s1
"""

from __future__ import annotations

from itertools import pairwise

from benchmarks.claims.rest_runs import METRICS, one_grow
from benchmarks.common import arguments, compare, show, table, verdict
from raftdiff.config import load_config


def main() -> None:
    options = arguments(__doc__ or "")
    result = one_grow(options.output)
    evaluations = [report.evaluations[0] for report in result.reports]
    rows = [
        [str(i), *(f"{evaluation.metrics[metric].mean:.3f}" for metric in METRICS)]
        for i, evaluation in enumerate(evaluations)
    ]
    table("\nOne Grow, Improve after Improve; means on held-out prompts", ["Improve", *METRICS], rows)
    per_prompt = load_config(result.folder / "config.yaml").evaluation.seeds_per_prompt
    steps = [compare([after], [before], "reward", per_prompt) for before, after in pairwise(evaluations)]
    verdict("S1", all(step.mean > 0 for step in steps), "each Improve adds " + ", ".join(map(show, steps)))


if __name__ == "__main__":
    main()
