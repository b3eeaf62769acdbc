"""Run folders as the app shows them, read while they are written to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from raftdiff import scoring
from raftdiff.config import RunConfig, load_config
from raftdiff.errors import ConfigError
from raftdiff.evaluation import Verdict, run_verdict
from raftdiff.registry import nearest
from raftdiff.report import (
    NOT_CHARTED,
    Chart,
    Curve,
    draw_chart,
    guidance_label,
    order_of_metrics,
    read_metrics,
    role_of_metric,
)
from raftdiff.store import SampleStore
from raftdiff.types import RoundReport, Sample, Scored

DEPTH = 2  # folders below the folder of runs: those of comparisons lie one deeper
PLAIN = {"reward", "best_of_group", "log_ratio"}  # of a round's means, what is no single reward
SPREAD = {"diversity", "drift"}


class Runs:
    """The runs in a folder, by name: their path below it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def names(self) -> list[str]:
        """The run that was written to last comes first."""
        found = [
            path.parent for depth in range(1, DEPTH + 1) for path in self.folder.glob("*/" * depth + "config.yaml")
        ]
        root = self.folder.resolve()
        inside = [path for path in found if path.resolve().is_relative_to(root)]
        inside.sort(key=lambda path: (-_modified(path / "metrics.jsonl"), str(path)))
        return [path.relative_to(self.folder).as_posix() for path in inside]

    def open(self, name: str) -> RunFolder:
        """The run of a name that `names` gives; no other is looked for on the disk.

        Raises:
            ConfigError: there is no such run, or its config.yaml cannot be read.
        """
        names = self.names()
        if name not in names:
            raise ConfigError(f"there is no run {name!r} in the folder of runs{nearest(name, names)}")
        return RunFolder(self.folder / name, name)


class RunFolder:
    """One run."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self.config: RunConfig = load_config(path / "config.yaml")
        self.reports: list[RoundReport] = read_metrics(path / "metrics.jsonl")

    @property
    def signature(self) -> tuple:
        """Another one after everything that changes what is shown."""
        return (self.name, _size(self.path / "metrics.jsonl"), tuple(self.rounds), self.state)

    @property
    def state(self) -> str:
        """How far it is, in words."""
        done = self.reports[-1].round if self.reports else 0
        progress = f"{done} of {self.config.rounds} rounds"
        if self.training:
            return f"training, {progress} done"
        return f"finished, {progress}" if (self.path / "lora").exists() else f"not finished, {progress} done"

    @property
    def training(self) -> bool:
        """Whether a process holds the run's lock now, where the system says so (Linux). Trying the lock could keep a
        run from starting."""
        lock, locks = self.path / "lock", Path("/proc/locks")
        if not (lock.exists() and locks.exists()):
            return False
        held = {line.split()[5].rpartition(":")[2] for line in locks.read_text().splitlines() if " FLOCK " in line}
        return str(lock.stat().st_ino) in held

    @property
    def lora(self) -> Path | None:
        """The folder of the finished LoRA of an image model."""
        path = self.path / "lora"
        plain = self.config.adapter.method == "lora" and self.config.model.modality == "image"
        return path if plain and any(path.glob("*.safetensors")) else None

    # -- measures -------------------------------------------------------------------------------------------------

    @property
    def trained(self) -> list[str]:
        """Names of the rewards that are trained on, as the metrics have them."""
        scored = {name for report in self.reports for name in report.rewards} - PLAIN
        untrained = {reward.label or reward.name for reward in self.config.rewards if not reward.weight}
        return sorted(scored - untrained)

    @property
    def evaluated(self) -> list[RoundReport]:
        return [report for report in self.reports if report.evaluations]

    @property
    def verdict(self) -> Verdict | None:
        """The run's own, or None before the base is evaluated."""
        history = [report.evaluations[0] for report in self.evaluated]
        if not history:
            return None
        scored = {name for report in self.reports for name in report.rewards}
        held_out = sorted(set(history[0].metrics) - scored - PLAIN - SPREAD)
        return run_verdict(self.config.evaluation, self.evaluated, held_out)

    # -- pictures -------------------------------------------------------------------------------------------------

    @property
    def rounds(self) -> list[int]:
        """Rounds with samples drawn for training."""
        return SampleStore(self.path).rounds()

    @property
    def _held_out(self) -> SampleStore:
        folders = sorted(
            (self.path / "evaluation").glob("guidance-*"),
            key=lambda folder: folder.name != f"guidance-{self._first_scale:g}",
        )
        return SampleStore(folders[0] if folders else self.path / "evaluation")

    @property
    def _first_scale(self) -> float:
        return self.evaluated[0].evaluations[0].guidance_scale if self.evaluated else 1.0

    def grid(
        self, prompts: Sequence[str] = (), most: int = 8
    ) -> tuple[list[int], list[tuple[str, list[Sample | None]]]]:
        """The evaluated rounds, and for each held-out prompt its picture in each of them, from one seed."""
        store = self._held_out
        rounds = [report.round for report in self.evaluated]
        found: dict[str, dict[int, Sample]] = {}
        for round in rounds:
            for sample in _samples(store, round):
                if not prompts or sample.prompt.text in prompts:
                    found.setdefault(sample.prompt.text, {}).setdefault(round, sample)
        return rounds, [(text, [of.get(round) for round in rounds]) for text, of in list(found.items())[:most]]

    def prompts(self) -> list[str]:
        """Every prompt that has pictures, held-out ones first."""
        held_out = [sample.prompt.text for sample in _samples(self._held_out, 0)]
        drawn = [sample.prompt.text for round in self.rounds for sample in _samples(SampleStore(self.path), round)]
        return list(dict.fromkeys([*held_out, *drawn]))

    def extremes(self, round: int, prompts: Sequence[str] = (), most: int = 6) -> list[tuple[str, Scored, Scored]]:
        """For each prompt of a round its best and its worst sample, by the reward that was selected by."""
        groups: dict[str, list[Scored]] = {}
        for scored in self._scored(round):
            if scored.reward is not None and (not prompts or scored.sample.prompt.text in prompts):
                groups.setdefault(scored.sample.prompt.text, []).append(scored)
        ranked = [(text, sorted(group, key=lambda s: s.reward or 0.0)) for text, group in list(groups.items())[:most]]
        return [(text, group[-1], group[0]) for text, group in ranked]

    def _scored(self, round: int) -> list[Scored]:
        how = scoring.combination(self.config, self.reports, grown=round)
        store = SampleStore(self.path)
        known = store.read_scores(round)  # while a round is being scored, of some rewards only
        weights = {name: weight for name, weight in how.weights.items() if name in known}
        return scoring.stored(store, round, replace(how, weights=weights))


def charts(runs: Sequence[RunFolder]) -> list[Chart]:
    """The rewards of one run at each guidance scale, or of several, at the first scale of each, over one another."""
    trained = {name for run in runs for name in run.trained}
    curves: dict[str, list[Curve]] = {}
    for run in runs:
        for name, curve in _held_out_curves(run, alone=len(runs) == 1):
            curves.setdefault(name, []).append(curve)
    order = sorted(curves, key=lambda name: order_of_metrics(name, trained))
    drawn = [draw_chart(name, role_of_metric(name, trained), curves[name]) for name in order]
    samples = [curve for run in runs for curve in _sample_curves(run, alone=len(runs) == 1)]
    if samples:
        drawn.append(draw_chart("samples drawn for training", "", samples))
    return drawn


def training_charts(runs: Sequence[RunFolder]) -> list[Chart]:
    """What training logged, a line for each run."""
    drawn = []
    logged = dict.fromkeys(n for run in runs for r in run.reports for n in r.training if n not in NOT_CHARTED)
    for name in logged:
        having = [(run, [r for r in run.reports if name in r.training]) for run in runs]
        lines = [
            Curve(label=run.name, at=[r.round for r in reports], values=[r.training[name] for r in reports])
            for run, reports in having
            if reports
        ]
        drawn.append(draw_chart(name, "", lines))
    return drawn


def _held_out_curves(run: RunFolder, *, alone: bool) -> list[tuple[str, Curve]]:
    found = []
    scales = [e.guidance_scale for e in run.evaluated[0].evaluations] if run.evaluated else []
    for k, scale in enumerate(scales if alone else scales[:1]):
        evaluations = [(r.round, r.evaluations[k]) for r in run.evaluated if len(r.evaluations) > k]
        for name in evaluations[0][1].metrics:
            points = [(round, e.metrics[name]) for round, e in evaluations if name in e.metrics]
            curve = Curve(
                label=guidance_label(scale, evaluations[0][1].modality) if alone else run.name,
                at=[round for round, _ in points],
                values=[interval.mean for _, interval in points],
                lows=[interval.low for _, interval in points],
                highs=[interval.high for _, interval in points],
            )
            found.append((name, curve))
    return found


def _sample_curves(run: RunFolder, *, alone: bool) -> list[Curve]:
    wanted = {"best_of_group": "best of each prompt", "reward": "mean of all"} if alone else {"reward": run.name}
    having = [report for report in run.reports if report.rewards]
    return [
        Curve(label=label, at=[r.round for r in having], values=[r.rewards.get(key, np.nan) for r in having])
        for key, label in wanted.items()
        if having
    ]


def _samples(store: SampleStore, round: int) -> list[Sample]:
    folder = store.samples_folder / f"round-{round:04d}"
    return list(_read(store.samples_folder.parent, round, _modified(folder)))


@lru_cache(maxsize=64)
def _read(folder: Path, round: int, modified: float) -> tuple[Sample, ...]:
    """A round's samples without their latents; `modified` makes a folder that has grown another one."""
    return tuple(replace(s, latents=None, trajectory=None) for s in SampleStore(folder).read_samples(round))


def _modified(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
