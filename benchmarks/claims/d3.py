"""D3 (DPO, arXiv 2305.18290, section 6.1): the frontier of reward against divergence from the base is not below PPO's.

Continuations of reviews with the sentiment reward, evaluated after every round, each method with several weights of its
penalty. DPO is online: the best against the worst of each prompt's samples by that same reward. A method's frontier at
a divergence is the highest that its curves, drawn straight between rounds, have up to there.

    python -m benchmarks.claims.d3
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.claims.text_runs import continuation, log_ratios, written
from benchmarks.common import arguments, show, table, verdict
from raftdiff.evaluation import paired_interval
from raftdiff.rounds import Result

Curve = list[tuple[float, np.ndarray]]
"""The base, then the model after each round: divergence in nats, and the reward of each held-out text [N]."""


def dpo(beta: float) -> dict[str, Any]:
    return {
        "algorithm": {"name": "dpo", "options": {"beta": beta}},
        "rounds": 7,
        "prompts.per_round": 96,
        "training.epochs": 4,
    }


def ppo(coefficient: float) -> dict[str, Any]:
    return {
        "algorithm": {"name": "ppo", "options": {"kl_coefficient": coefficient, "kl_target": None}},
        "rounds": 8,
        "prompts.per_round": 64,
        "sampling.samples_per_prompt": 4,
        "training.epochs": 4,
    }


def curve(result: Result) -> Curve:
    points = []
    for report in result.reports:
        reward_N = np.array(report.evaluations[0].per_sample["reward"], dtype=float)
        points.append((float(log_ratios(result, report.round).mean()) if report.round else 0.0, reward_N))
    return points


def at_most(curves: list[Curve], divergence: float) -> np.ndarray:
    """The rewards [N] whose mean is the highest that any of the curves has up to a divergence."""
    reached = [reward_N for points in curves for kl, reward_N in points if kl <= divergence]
    for points in curves:
        for (start, before_N), (stop, after_N) in pairwise(points):
            if start <= divergence < stop:
                share = (divergence - start) / (stop - start)
                reached.append((1 - share) * before_N + share * after_N)
    return max(reached, key=np.mean)


def main() -> None:
    options = arguments(__doc__ or "", betas=[0.1, 0.5], coefficients=[0.02, 0.1], nats=[0.25, 0.5, 1.0, 2.0])
    shared = {"evaluation.every": 1, "evaluation.seeds_per_prompt": 4, "training.learning_rate": 1e-3}
    made: dict[str, list[Result]] = {
        "DPO": [continuation(options.output, f"d3-dpo{b:g}", **shared, **dpo(b)) for b in options.betas],
        "PPO": [continuation(options.output, f"d3-ppo{c:g}", **shared, **ppo(c)) for c in options.coefficients],
    }
    curves = {name: [curve(result) for result in results] for name, results in made.items()}
    for name, weights in (("DPO", options.betas), ("PPO", options.coefficients)):
        rows = [
            [f"{weight:g}", *(f"{reward_N.mean():.3f} at {kl:.2f}" for kl, reward_N in points)]
            for weight, points in zip(weights, curves[name], strict=True)
        ]
        columns = ["weight", "base", *map(str, range(1, max(map(len, rows)) - 1))]
        table(f"\n{name}, held-out prompts: reward at a divergence in nats, by round", columns, rows)
    prompts = [sample.prompt.id for sample in written(made["DPO"][0])]
    rows, gaps = [], []
    for nats in options.nats:
        own_N, other_N = (at_most(curves[name], nats) for name in ("DPO", "PPO"))
        gaps.append(paired_interval(own_N - other_N, prompts))
        rows.append([f"{nats:g}", f"{own_N.mean():.3f}", f"{other_N.mean():.3f}", show(gaps[-1])])
    table("\nThe highest reward up to a divergence", ["nats", "DPO", "PPO", "DPO less PPO"], rows)
    verdict(
        "D3",
        all(gap.high >= 0 for gap in gaps),
        "DPO less PPO up to so many nats: " + ", ".join(f"{row[0]}: {row[-1]}" for row in rows),
    )


if __name__ == "__main__":
    main()
