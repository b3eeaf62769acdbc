"""R2 (RAFT, arXiv 2304.06767, text): raising the temperature lowers the first best of K and raises diversity.

The first round's candidates alone, so nothing is trained.

    python -m benchmarks.claims.r2
"""

from __future__ import annotations

import numpy as np

from benchmarks.claims.text_runs import PRESET, base_policy, unseen_prompts
from benchmarks.common import arguments, configured, show, table, verdict
from raftdiff.build import build_reward
from raftdiff.config import RewardConfig
from raftdiff.evaluation import diversity, paired_interval
from raftdiff.prompts import load_prompts
from raftdiff.scoring import score
from raftdiff.types import Interval, Prompt

COLUMNS = ("mean of K", "best of K", "distinct-2 of K")


def candidates(
    temperature: float, task: str, prompts: list[Prompt], reward: str, k: int, output: str
) -> dict[str, np.ndarray]:
    """For each prompt the mean and the best reward of K texts of the base, and their distinct-2, [P]."""
    policy = base_policy(configured(PRESET, output, f"r2-{task}", {"sampling.temperature": temperature}))
    samples = policy.sample([prompt for prompt in prompts for _ in range(k)], [*range(len(prompts) * k)])
    scored = score(samples, [build_reward(RewardConfig(name=reward))], combine="sum")
    reward_PK = np.array([s.reward for s in scored], dtype=float).reshape(len(prompts), k)
    spread = diversity([samples[start : start + k] for start in range(0, len(samples), k)])
    return dict(zip(COLUMNS, (np.nanmean(reward_PK, 1), np.nanmax(reward_PK, 1), np.array(spread)), strict=True))


def main() -> None:
    options = arguments(__doc__ or "", k=8, temperatures=[0.7, 0.85, 1.0, 1.2])
    tasks = {
        "translation": (load_prompts(unseen_prompts()), "shapes-translation"),
        "continuation": (load_prompts("shapes-text:continuation/96/7"), "sentiment"),
    }
    changes: dict[str, list[Interval]] = {}
    for task, (prompts, reward) in tasks.items():
        found = {t: candidates(t, task, prompts, reward, options.k, options.output) for t in options.temperatures}
        rows = [[f"{t:g}", *(f"{value.mean():.3f}" for value in values.values())] for t, values in found.items()]
        table(f"\n{task}, {reward}, K = {options.k}", ["temperature", *COLUMNS], rows)
        coolest, hottest = found[min(found)], found[max(found)]
        changes[task] = [paired_interval(hottest[name] - coolest[name]) for name in COLUMNS]
    verdict(
        "R2",
        all(best.high < 0 and spread.low > 0 for _, best, spread in changes.values()),
        "; ".join(
            f"{task}, hottest less coolest: mean {show(mean)}, best of K {show(best)}, distinct-2 {show(spread)}"
            for task, (mean, best, spread) in changes.items()
        ),
    )


if __name__ == "__main__":
    main()
