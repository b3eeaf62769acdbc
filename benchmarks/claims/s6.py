"""S6 (ReST, arXiv 2308.08998, section 4): the per-prompt percentile keeps every prompt and a high global threshold
loses some; the gap between the trained reward and one that is held out grows with the number of Grows.

    python -m benchmarks.claims.s6
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.claims.rest_runs import two_grows
from benchmarks.common import arguments, show, table, verdict
from raftdiff.algorithms.rest import Rest
from raftdiff.config import RunConfig, load_config
from raftdiff.report import read_metrics
from raftdiff.scoring import by_prompt, combination, stored
from raftdiff.store import SampleStore
from raftdiff.types import Group, Phase, Sample

GLOBAL = (0.5, 0.7, 0.8, 0.9)


def groups_of(folder: Path, config: RunConfig) -> list[Group]:
    """The first Grow of a run, as its selection saw it."""
    how = combination(config, read_metrics(folder / "metrics.jsonl"), grown=1)
    return by_prompt(stored(SampleStore(folder), 1, how))


def prompts_in(samples: list[Sample]) -> int:
    return len({sample.prompt.id for sample in samples})


def main() -> None:
    options = arguments(__doc__ or "")
    result = two_grows(options.output)
    groups = groups_of(result.folder, load_config(result.folder / "config.yaml"))
    kept = {}
    for rule in ("percentile", "global"):
        for threshold in GLOBAL:
            chosen = Rest(rule=rule, thresholds=(threshold,)).select(groups, round=1, seed=1, phase=Phase(grown=1))
            kept[rule, threshold] = prompts_in([example.sample for example in chosen])
    table(
        f"\nPrompts that keep a sample, of {len(groups)}",
        ["rule", *(f"{threshold:g}" for threshold in GLOBAL)],
        [[rule, *(str(kept[rule, t]) for t in GLOBAL)] for rule in ("percentile", "global")],
    )
    ends = [result.reports[3].evaluations[0], result.reports[6].evaluations[0]]
    rows = [
        [f"G{g}", show(e.gains["reward"]), show(e.gains["shapes-oracle"]), show(e.gains["shapes-rating"])]
        for g, e in enumerate(ends, start=1)
    ]
    table("\nGains over the base", ["after", "reward (trained)", "oracle (held out)", "rating (held out)"], rows)
    spread = [e.metrics["reward"].high - e.metrics["reward"].low for e in ends]
    oracle_spread = [e.metrics["shapes-oracle"].high - e.metrics["shapes-oracle"].low for e in ends]
    gaps = [
        e.gains["reward"].mean / s - e.gains["shapes-oracle"].mean / o
        for e, s, o in zip(ends, spread, oracle_spread, strict=True)
    ]
    covers = all(kept["percentile", t] == len(groups) for t in GLOBAL)
    loses = kept["global", GLOBAL[-1]] < len(groups)
    verdict(
        "S6",
        covers and loses and gaps[1] > gaps[0],
        f"percentile keeps every prompt: {covers}; global {GLOBAL[-1]:g} keeps {kept['global', GLOBAL[-1]]}; gap of "
        f"gains in units of their intervals {gaps[0]:.2f} -> {gaps[1]:.2f}",
    )


if __name__ == "__main__":
    main()
