"""The table of RAFT (arXiv 2304.06767, section 4) in small: the base, SFT on right answers, PPO, GRPO and RAFT beside
each other at an equal budget of tokens. The paper's finding is that RAFT's reward is not below PPO's.

    python -m benchmarks.claims.ppo
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.claims.text_runs import (
    METRICS,
    PRESET,
    base_policy,
    divergence,
    perplexity,
    right_answer,
    trained_policy,
    translation,
    unseen_prompts,
    written,
)
from benchmarks.common import arguments, difference, end, gains_table, show, table, verdict
from raftdiff.config import load_config, load_preset
from raftdiff.evaluation import distinct_2
from raftdiff.prompts import load_prompts
from raftdiff.rounds import Result, training_passes
from raftdiff.types import Sample


def right_answers(path: Path) -> str:
    """The training prompts that are not held out with their right translations, as `data.path` takes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held_out = unseen_prompts()
    prompts = [prompt.text for prompt in load_prompts(load_preset(PRESET).prompts.source)]
    answers = {prompt: right_answer(prompt) for prompt in prompts if prompt not in held_out}
    lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in answers.items()]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def methods(output: str) -> dict[str, dict[str, Any]]:
    """The settings in which each differs from the demo's, which are RAFT's."""
    return {
        "SFT": {
            "algorithm": {"name": "sft"},
            "data": {"path": right_answers(Path(output) / "right-answers.jsonl")},
            "training.epochs": 1,
        },
        "PPO": {
            "algorithm": {"name": "ppo"},
            "prompts.per_round": 32,
            "sampling.samples_per_prompt": 4,
            "training.learning_rate": 1e-3,
            "training.epochs": 4,
        },
        "GRPO": {
            "algorithm": {"name": "policy-gradient"},
            "prompts.per_round": 48,
            "training.batch_size": 64,
            "training.epochs": 2,
        },
        "RAFT": {},
    }


def row(name: str, samples: list[Sample], reward: float, policy: Any, kl: str, tokens: int) -> list[str]:
    lengths = [len(s.completion.tokens_T) for s in samples if s.completion is not None]
    shown = (
        f"{perplexity(policy):.3f}",
        f"{distinct_2([s.text or '' for s in samples]):.3f}",
        f"{np.mean(lengths):.1f}",
    )
    return [name, f"{reward:.3f}", *shown, kl, f"{tokens:,}"]


def main() -> None:
    options = arguments(__doc__ or "", budget=320_000)
    results: dict[str, Result] = {}
    for name, changes in methods(options.output).items():
        results[name] = translation(options.output, name.lower(), rounds=100, budget=options.budget, **changes)
    gains_table("Equal tokens", results, METRICS)
    raft = results["RAFT"]
    config = load_config(raft.folder / "config.yaml")
    before = written(raft, 0)
    rows = [row("base", before, raft.base[0].metrics["reward"].mean, base_policy(config), "0", 0)]
    for name, result in results.items():
        reward, tokens = end(result).metrics["reward"].mean, training_passes(result.reports)
        rows.append(row(name, written(result), reward, trained_policy(result), show(divergence(result), 2), tokens))
    columns = ["", "reward", "perplexity of right answers", "distinct-2 of all", "tokens", "log-ratio, nats", "spent"]
    table("\nAt the end of the budget", columns, rows)
    over = {name: difference(raft, results[name], "reward") for name in ("PPO", "GRPO")}
    verdict(
        "PPO",
        over["PPO"].high >= 0,
        "RAFT's reward less " + ", less ".join(f"{name}'s {show(gap)}" for name, gap in over.items()),
    )


if __name__ == "__main__":
    main()
