"""What the benchmarks share: runs that are kept and gone on with, and paired comparisons of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from raftdiff.build import build
from raftdiff.cli import quiet_libraries
from raftdiff.compare import read_outcome
from raftdiff.config import RunConfig, dump_config, load_config, load_preset, parse_config
from raftdiff.display import Terminal
from raftdiff.evaluation import paired_interval
from raftdiff.rounds import Result, run_rounds
from raftdiff.types import Evaluation, Interval

console = Console(width=None if sys.stdout.isatty() else 180)  # tables in a log are not broken


def arguments(description: str, **options: Any) -> argparse.Namespace:
    """The command line of a benchmark: `--output` and the given options with their defaults."""
    quiet_libraries()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", default="runs/benchmarks", help="where the runs are kept; finished ones are reused")
    for name, default in options.items():
        multiple = {"nargs": "+", "type": type(default[0])} if isinstance(default, list) else {"type": type(default)}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, **multiple, help=" ")
    return parser.parse_args()


def configured(preset: str, output: str, name: str, changes: Mapping[str, Any]) -> RunConfig:
    """A preset with dotted settings changed, as the run `name`."""
    values = load_preset(preset).model_dump(mode="json")
    for key, value in {**changes, "name": name, "output": output, "tracker": "none"}.items():
        *sections, last = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[last] = value
    return parse_config(values, where=name)


def run(config: RunConfig) -> Result:
    """Run it, or go on with what its folder holds of it."""
    begun = (config.folder / "config.yaml").exists()
    unbounded = {"budget": None}  # a run may go on with more
    kept = load_config(config.folder / "config.yaml") if begun else config
    if dump_config(kept.model_copy(update=unbounded)) != dump_config(config.model_copy(update=unbounded)):
        raise SystemExit(f"{config.folder} holds a run with other settings; remove it, or choose another --output")
    with Terminal(console, config) as display:
        display.say(f"{config.name}:")
        return run_rounds(build(config, display=display), resume=begun)


def compare(left: Sequence[Evaluation], right: Sequence[Evaluation], metric: str, seeds_per_prompt: int) -> Interval:
    """Left minus right, paired by prompt and seed, over one or more runs of each (run seed by run seed).

    A prompt is one unit of the bootstrap: its images and its runs are not independent.
    """
    differences, prompts = [], []
    for a, b in zip(left, right, strict=True):
        difference = np.array(a.per_sample[metric], dtype=float) - np.array(b.per_sample[metric], dtype=float)
        differences.append(difference)
        prompts += [str(i // seeds_per_prompt) for i in range(len(difference))]
    return paired_interval(np.concatenate(differences), prompts)


def end(result: Result) -> Evaluation:
    """The model that a run ended with, on the held-out prompts, at the first guidance scale."""
    return next(report.evaluations[0] for report in reversed(result.reports) if report.evaluations)


def gains_table(title: str, results: Mapping[str, Result], metrics: Sequence[str]) -> None:
    """What each run gained over its base on the held-out prompts."""
    rows = [[name, *(show(end(result).gains[metric]) for metric in metrics)] for name, result in results.items()]
    table(f"\n{title}: gain over the base on held-out prompts, mean (95% interval)", ["", *metrics], rows)


def difference(left: Result, right: Result, metric: str) -> Interval:
    """Left minus right at the end of both, paired by prompt and seed."""
    per_prompt = load_config(left.folder / "config.yaml").evaluation.seeds_per_prompt
    return compare([end(left)], [end(right)], metric, per_prompt)


def drift(result: Result) -> np.ndarray:
    """How far each held-out picture moved from the base's: root mean square difference of pixels (0 to 1)."""
    return np.array(read_outcome("", load_config(result.folder / "config.yaml")).drift())


def drift_difference(left: Result, right: Result) -> Interval:
    """Left minus right, paired by prompt and seed."""
    per_prompt = load_config(left.folder / "config.yaml").evaluation.seeds_per_prompt
    moved = drift(left) - drift(right)
    return paired_interval(moved, [str(i // per_prompt) for i in range(len(moved))])


def show(interval: Interval, digits: int = 3) -> str:
    return f"{interval.mean:+.{digits}f} ({interval.low:+.{digits}f} to {interval.high:+.{digits}f})"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def verdict(claim: str, holds: bool, detail: str) -> None:
    """The one line that a claim's benchmark ends with."""
    said = f"{claim} {'holds' if holds else 'does not hold'}: {detail}"
    console.print(said, highlight=False, markup=False, soft_wrap=True)


def finished(folder: Path) -> bool:
    return (folder / "lora" / "manifest.json").is_file()
