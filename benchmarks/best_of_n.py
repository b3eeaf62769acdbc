"""Best of N without training, on the embedded model: what the best of N candidates by the demo's rewards has over one,
in those rewards and in what they do not see.

    python -m benchmarks.best_of_n
"""

from __future__ import annotations

import torch

from benchmarks.common import arguments, show, table
from raftdiff.build import build_policy, build_reward
from raftdiff.config import RewardConfig, load_preset
from raftdiff.evaluation import paired_interval
from raftdiff.pipelines.loading import load_pipeline
from raftdiff.prompts import load_prompts
from raftdiff.scoring import score


def main() -> None:
    options = arguments(__doc__ or "", most=16, repeats=3, preset="claims")
    config = load_preset(options.preset)
    policy = build_policy(config, load_pipeline(config.model, "cpu"))
    prompts = load_prompts(config.evaluation.prompts or config.prompts.source)
    each = options.most * options.repeats
    seeds = list(range(each)) * len(prompts)
    samples = policy.sample([prompt for prompt in prompts for _ in range(each)], seeds)
    watched = [RewardConfig(name=r.name, weight=0.0, options=r.options) for r in config.evaluation.rewards]
    scored = score(samples, [build_reward(r) for r in (*config.rewards, *watched)], combine=config.combine)
    names = list(scored[0].parts)
    value = {"reward": torch.tensor([s.reward for s in scored])} | {
        name: torch.tensor([s.parts[name] for s in scored]) for name in names
    }
    value = {name: v.view(len(prompts), options.repeats, options.most) for name, v in value.items()}
    rows = []
    n = 2
    while n <= options.most:
        best = value["reward"][..., :n].argmax(-1, keepdim=True)
        gains = {name: (v.gather(-1, best)[..., 0] - v[..., 0]).flatten().double().numpy() for name, v in value.items()}
        units = [prompt.id for prompt in prompts for _ in range(options.repeats)]
        rows.append([str(n), *(show(paired_interval(gain, units)) for gain in gains.values())])
        n *= 2
    table("\nThe best of N over the first of them, mean (95% interval)", ["N", *value], rows)


if __name__ == "__main__":
    main()
