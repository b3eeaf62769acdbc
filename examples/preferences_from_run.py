"""Preferences for offline DPO from the samples that a run scored: of each prompt in each round, the best and the worst.

python examples/preferences_from_run.py runs/demo preferences
raftdiff train run.yaml                              # with algorithm.options.source: offline, data.path: preferences
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from raftdiff.algorithms.dpo import Dpo
from raftdiff.config import load_config
from raftdiff.report import read_metrics
from raftdiff.scoring import by_prompt, combination, stored
from raftdiff.store import SampleStore
from raftdiff.types import Example, Phase, Sample


def preferences(run: Path) -> Iterator[Example]:
    """Pairs by the combined reward of the run's configuration."""
    config, store = load_config(run / "config.yaml"), SampleStore(run)
    reports = read_metrics(run / "metrics.jsonl")
    for round in store.rounds():
        groups = by_prompt(stored(store, round, combination(config, reports, grown=round)))
        yield from Dpo().select(groups, round=round, seed=config.seed, phase=Phase(grown=round))


def write(pairs: Iterator[Example], folder: Path) -> int:
    """A picture for each side, and a metadata.jsonl with a line for each pair; the number of pairs."""
    folder.mkdir(parents=True)
    lines = []
    for pair in pairs:
        assert pair.rejected is not None
        names = {"chosen": save(pair.sample, folder), "rejected": save(pair.rejected, folder)}
        lines.append(json.dumps(names | {"text": pair.sample.prompt.text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return len(lines)


def save(sample: Sample, folder: Path) -> str:
    """The name of the file."""
    assert sample.image is not None
    Image.fromarray(sample.image.permute(1, 2, 0).contiguous().numpy()).save(folder / f"{sample.id}.png")
    return f"{sample.id}.png"


if __name__ == "__main__":
    run, folder = map(Path, sys.argv[1:])
    print(f"{write(preferences(run), folder)} preferences in {folder}")
