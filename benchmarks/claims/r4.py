"""R4 (RAFT, arXiv 2304.06767): adding any constant to the rewards of a prompt changes nothing in `local` selection,
while `global` selection loses prompts.

    python -m benchmarks.claims.r4
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.common import arguments, configured, table, verdict
from raftdiff.algorithms.raft import Raft
from raftdiff.build import build
from raftdiff.scoring import score
from raftdiff.types import Group, Phase


def main() -> None:
    options = arguments(__doc__ or "", prompts=64, preset="claims")
    config = configured(options.preset, options.output, "r4", {})
    run = build(config)
    prompts = run.prompts[: options.prompts]
    k = config.sampling.samples_per_prompt
    samples = run.policy.sample([p for p in prompts for _ in range(k)], list(range(len(prompts) * k)))
    scored = score(samples, run.rewards, combine=config.combine)
    groups = [
        Group(
            prompt=prompt,
            samples=tuple(
                replace(s, sample=replace(s.sample, id=f"{i}-{j}")) for j, s in enumerate(scored[i * k : (i + 1) * k])
            ),
        )
        for i, prompt in enumerate(prompts)
    ]
    deviation = float(np.std([s.reward for s in scored if s.reward is not None]))
    rng = np.random.default_rng(0)
    rows, same, lost = [], [], []
    before = {name: _selected(name, groups) for name in ("local", "global")}
    for size in (0.0, 0.5, 1.0, 2.0, 4.0):
        constants = rng.normal(0, size * deviation, len(groups))
        shifted = [
            replace(g, samples=tuple(replace(s, reward=s.reward + c) for s in g.samples if s.reward is not None))
            for g, c in zip(groups, constants, strict=True)
        ]
        local, everywhere = _selected("local", shifted), _selected("global", shifted)
        same.append(local == before["local"])
        lost.append(_prompts(everywhere))
        rows.append([f"{size:g}", "yes" if same[-1] else "no", str(_prompts(local)), str(lost[-1])])
    table(
        f"\nA constant drawn for each of {len(groups)} prompts, K = {k}",
        ["deviation of the constants", "local is bit-identical", "prompts in local", "prompts in global"],
        rows,
    )
    verdict("R4", all(same) and lost[-1] < lost[0], f"global covers {lost[0]} prompts without and {lost[-1]} with them")


def _selected(name: str, groups) -> list[str]:
    return [e.sample.id for e in Raft(selection=name).select(groups, round=1, seed=0, phase=Phase(grown=1))]


def _prompts(ids: list[str]) -> int:
    return len({i.split("-")[0] for i in ids})


if __name__ == "__main__":
    main()
