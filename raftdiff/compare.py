"""Several methods from one base, on the same prompts, rewards and seeds, at an equal budget of denoiser passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from pydantic import Field, ValidationError
from rich.table import Table

from .checkpoint import write_file
from .config import Positive, RunConfig, Settings, dump_config, load_config, load_preset, parse_config
from .errors import ConfigError, ResumeError
from .evaluation import distance, paired_interval
from .report import (
    Chart,
    Curve,
    Picture,
    draw_chart,
    format_interval,
    order_of_metrics,
    page,
    picture,
    read_metrics,
    role_of_metric,
)
from .rounds import Display, Run, run_rounds
from .store import SampleStore
from .types import Evaluation, Interval, RoundReport, Sample

FolderName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
MOST_ROUNDS = 10_000  # of a method that states none: the budget ends it
PROMPTS_SHOWN = 12


class CompareConfig(Settings):
    """A comparison."""

    name: str = "compare"
    """The comparison's folder inside `output`."""
    output: str = "runs"
    """Where it stands."""
    budget: Positive
    """Denoiser passes (of a language model, tokens) for each method and seed: a row forward is 1, forward and backward
    3. Evaluations are not counted. The round that spends the last of them is finished."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    """Run seeds; every method runs once with each."""
    preset: str | None = None
    """The preset that `base` changes."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Settings of a run, the same for all methods."""
    methods: Annotated[dict[FolderName, dict[str, Any]], Field(min_length=1)]
    """Name to the settings in which a method differs from `base`."""

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name

    def runs(self) -> list[tuple[str, RunConfig]]:
        """Method and configuration of every run.

        Raises:
            ConfigError: a setting that does not exist or does not fit.
        """
        start = load_preset(self.preset).model_dump(mode="json") if self.preset else {}
        fixed = {"output": str(self.folder), "budget": self.budget}
        configs = []
        for method, changes in self.methods.items():
            for seed in self.seeds:
                values = merged(start, {"rounds": MOST_ROUNDS}, self.base, changes, fixed, {"seed": seed})
                values["name"] = f"{method}-{seed}"
                configs.append((method, parse_config(values, where=f"compare, method {method}")))
        return configs


def load_compare(path: Path | str) -> CompareConfig:
    """Read a YAML file.

    Raises:
        ConfigError: with the key that is wrong.
    """
    try:
        return CompareConfig.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{path}: {'; '.join(lines)}; docs/compare.md has an example") from None


def merged(*settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, later ones over earlier ones; `options` of an algorithm are replaced as a whole."""
    result: dict[str, Any] = {}
    for values in settings:
        for key, value in values.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping) and key != "options"
            result[key] = merged(result[key], value) if both else value
    return result


def compare(
    config: CompareConfig, build: Callable[..., Run], display: Callable[[RunConfig], AbstractContextManager[Display]]
) -> list[Outcome]:
    """Run what has not been run yet, and write compare.html. Runs that broke off are gone on with.

    Raises:
        ResumeError: the folder holds a run of the same name with other settings.
    """
    outcomes = []
    for method, run_config in config.runs():
        begun = (run_config.folder / "config.yaml").exists()
        if begun and dump_config(load_config(run_config.folder / "config.yaml")) != dump_config(run_config):
            raise ResumeError(f"{run_config.folder} holds a run with other settings; give the comparison a new name")
        if not (run_config.folder / "lora" / "manifest.json").exists():
            with display(run_config) as shown:
                shown.say(f"{run_config.name}:")
                run_rounds(build(run_config, display=shown), resume=begun)
        outcomes.append(read_outcome(method, run_config))
    write_comparison(config, outcomes)
    return outcomes


# ------------------------------------------------------------------------------------------------ what came out


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished run of a comparison."""

    method: str
    config: RunConfig
    reports: Sequence[RoundReport]
    before: Sequence[Sample]
    """The base's pictures on the held-out prompts, in the order of prompt, then seed."""
    after: Sequence[Sample]
    """The pictures of the model that spent the budget."""

    @property
    def last(self) -> Evaluation:
        return next(r.evaluations[0] for r in reversed(self.reports) if r.evaluations)

    def spent(self, upto: int | None = None) -> tuple[int, float]:
        """Denoiser passes and seconds of the rounds up to one, evaluations apart."""
        costs = [
            cost
            for report in self.reports
            if upto is None or report.round <= upto
            for cost in report.ledger
            if cost.stage != "evaluate"
        ]
        return sum(cost.passes for cost in costs), sum(cost.seconds for cost in costs)

    def seconds(self, stage: str) -> float:
        return sum(cost.seconds for report in self.reports for cost in report.ledger if cost.stage == stage)

    def drift(self) -> list[float]:
        """The `distance` of each held-out sample from the base's of the same prompt and seed, 0 to 1."""
        return [distance(*pair) for pair in zip(self.before, self.after, strict=True)]


def read_outcome(method: str, config: RunConfig) -> Outcome:
    """A finished run from its folder."""
    reports = read_metrics(config.folder / "metrics.jsonl")
    evaluated = [report for report in reports if report.evaluations]
    store = SampleStore(config.folder / "evaluation" / f"guidance-{evaluated[0].evaluations[0].guidance_scale:g}")
    return Outcome(
        method=method,
        config=config,
        reports=reports,
        before=store.read_samples(0),
        after=store.read_samples(evaluated[-1].round),
    )


def gain(outcomes: Sequence[Outcome], metric: str, over: Sequence[Outcome] | None = None) -> Interval:
    """What a method's runs gain in a metric over the base, or over another method's runs with the same seeds: paired
    by prompt and seed, the interval over prompts."""
    differences: list[np.ndarray] = []
    prompts: list[str] = []
    for i, outcome in enumerate(outcomes):
        value_N = _values(outcome, metric)
        other_N = _values(over[i], metric) if over else _base_values(outcome, metric)
        differences.append(value_N - other_N)
        prompts += [sample.prompt.id for sample in outcome.after]
    return paired_interval(np.concatenate(differences), prompts)


def _values(outcome: Outcome, metric: str) -> np.ndarray:
    return np.array(outcome.drift() if metric == "drift" else outcome.last.per_sample[metric], dtype=float)


def _base_values(outcome: Outcome, metric: str) -> np.ndarray:
    if metric == "drift":
        return np.zeros(len(outcome.before))
    return np.array(outcome.reports[0].evaluations[0].per_sample[metric], dtype=float)


def by_method(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The runs of each method, in the order of their seeds."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.method, []).append(outcome)
    return groups


def metrics_of(outcomes: Sequence[Outcome]) -> list[str]:
    """Every metric of the evaluations, the trained ones first, then how far the pictures moved."""
    trained = outcomes[0].config.trained_rewards
    return [*sorted(outcomes[0].last.metrics, key=lambda name: order_of_metrics(name, trained)), "drift"]


# ------------------------------------------------------------------------------------------------ compare.html


@dataclass(frozen=True, kw_only=True)
class Line:
    """One method in the table."""

    method: str
    gains: Mapping[str, Interval]
    passes: int
    seconds: float
    scorer_seconds: float
    rounds: int


def lines(outcomes: Sequence[Outcome]) -> list[Line]:
    """The table: each method's gains over the base at the end of its budget, and means over its runs of what it
    spent."""
    metrics = metrics_of(outcomes)
    return [
        Line(
            method=method,
            gains={metric: gain(runs, metric) for metric in metrics},
            passes=round(float(np.mean([run.spent()[0] for run in runs]))),
            seconds=float(np.mean([run.spent()[1] for run in runs])),
            scorer_seconds=float(np.mean([run.seconds("score") for run in runs])),
            rounds=round(float(np.mean([run.reports[-1].round for run in runs]))),
        )
        for method, runs in by_method(outcomes).items()
    ]


def table(outcomes: Sequence[Outcome]) -> Table:
    """Each method's gains over the base and what it spent, for the terminal."""
    shown, found = Table(box=None, pad_edge=False, header_style="bold"), lines(outcomes)
    shown.add_column("gain in")
    for line in found:
        shown.add_column(line.method, justify="right")
    for metric in found[0].gains:
        shown.add_row(metric, *("\n".join(format_interval(line.gains[metric])) for line in found))
    shown.add_row("passes", *(f"{line.passes:,}" for line in found))
    shown.add_row("seconds", *(f"{line.seconds:.0f}" for line in found))
    shown.add_row("rounds", *(str(line.rounds) for line in found))
    return shown


def write_comparison(config: CompareConfig, outcomes: Sequence[Outcome]) -> Path:
    """Write compare.html into the comparison's folder.

    Raises:
        StorageError: the file could not be written.
    """
    trained = outcomes[0].config.trained_rewards
    metrics = metrics_of(outcomes)
    html = page(
        "compare.html.jinja",
        title=config.name,
        budget=config.budget,
        seeds=len(config.seeds),
        metrics=[(name, role_of_metric(name, trained)) for name in metrics],
        lines=lines(outcomes),
        interval=format_interval,
        charts=_charts(outcomes, metrics[:-1], trained),
        chart_box=Chart,
        rows=_pictures(outcomes),
        methods=list(by_method(outcomes)),
        config_yaml=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    )
    path = config.folder / "compare.html"
    write_file(path, html.encode())
    return path


def _charts(outcomes: Sequence[Outcome], metrics: Sequence[str], trained: Sequence[str]) -> list[tuple[str, Chart]]:
    """Each metric against denoiser passes, and the reward against time; of the first seed's runs."""
    firsts = [runs[0] for runs in by_method(outcomes).values()]
    charts = [("passes", _chart(firsts, metric, trained, axis=0)) for metric in metrics]
    return [*charts[:1], ("seconds", _chart(firsts, "reward", trained, axis=1)), *charts[1:]]


def _chart(outcomes: Sequence[Outcome], metric: str, trained: Sequence[str], axis: int) -> Chart:
    curves = []
    for outcome in outcomes:
        evaluated = [r for r in outcome.reports if r.evaluations and metric in r.evaluations[0].metrics]
        found = [r.evaluations[0].metrics[metric] for r in evaluated]
        curves.append(
            Curve(
                label=outcome.method,
                at=[outcome.spent(r.round)[axis] for r in evaluated],
                values=[interval.mean for interval in found],
            )
        )
    return draw_chart(metric, role_of_metric(metric, trained), curves)


def _pictures(outcomes: Sequence[Outcome]) -> list[tuple[str, list[Picture]]]:
    """The first seed of each of the first prompts: prompt, then the base's and every method's picture."""
    firsts = [runs[0] for runs in by_method(outcomes).values()]
    shown: dict[str, tuple[str, list[Picture]]] = {}
    for i, before in enumerate(firsts[0].before):
        if before.prompt.id not in shown and len(shown) < PROMPTS_SHOWN:
            pictures = [picture(before), *(picture(run.after[i]) for run in firsts)]
            shown[before.prompt.id] = (before.prompt.text, pictures)
    return list(shown.values())
