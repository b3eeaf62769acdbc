"""S3 (ReST, arXiv 2308.08998, section 4): best of N goes on helping after ReST, and after ReST with N up to 10 it is at
least what behavior cloning has with N = 200.

The base is the behavior cloning: it was trained on the careless parallel corpus.

    python -m benchmarks.claims.s3
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.claims.text_runs import base_policy, rest, trained_policy, unseen_prompts
from benchmarks.common import arguments, show, table, verdict
from raftdiff.build import build_reward
from raftdiff.config import RewardConfig, load_config
from raftdiff.evaluation import paired_interval
from raftdiff.prompts import load_prompts
from raftdiff.scoring import score


def right(policy: Any, n: int) -> np.ndarray:
    """Whether each of n translations of each held-out prompt is strictly right, 0 or 1, [P, n]."""
    prompts = load_prompts(unseen_prompts())
    samples = policy.sample([prompt for prompt in prompts for _ in range(n)], [*range(len(prompts) * n)])
    reward = RewardConfig(name="shapes-translation", options={"strict": True})
    scored = score(samples, [build_reward(reward)], combine="sum")
    return np.array([s.reward or 0.0 for s in scored]).reshape(-1, n)  # a flawed one is not right


def best_of(right_PN: np.ndarray, n: int) -> np.ndarray:
    """The best of n, the mean over all disjoint draws of n, [P]."""
    draws = right_PN.shape[1] // n
    return right_PN[:, : draws * n].reshape(len(right_PN), draws, n).max(-1).mean(-1)


def main() -> None:
    options = arguments(__doc__ or "", few=8, many=200)
    result = rest(options.output, "g1i4", grows=1, thresholds=(0.5, 0.75, 0.875, 0.9))
    base = base_policy(load_config(result.folder / "config.yaml"))
    base_PN = right(base, options.many)
    rest_PN = right(trained_policy(result), options.few)
    sizes = [*(n for n in (1, 2, 4, 8, 16, 32, 64) if n < options.many), options.many]
    rows = [
        [str(n), f"{best_of(base_PN, n).mean():.3f}", f"{best_of(rest_PN, n).mean():.3f}" if n <= options.few else ""]
        for n in sizes
    ]
    table("\nShare of strictly right translations among the best of N", ["N", "base (BC)", "ReST G1 I4"], rows)
    level = paired_interval(best_of(rest_PN, options.few) - best_of(base_PN, options.many))
    rises = [paired_interval(best_of(PN, options.few) - best_of(PN, 1)).low > 0 for PN in (base_PN, rest_PN)]
    verdict(
        "S3",
        level.high >= 0 and all(rises),
        f"ReST with N = {options.few} less the base with N = {options.many} {show(level)}; "
        f"the best of {options.few} is above one sample: base {rises[0]}, ReST {rises[1]}",
    )


if __name__ == "__main__":
    main()
