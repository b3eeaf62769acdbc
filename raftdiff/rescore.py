"""What a run would have selected under other weights, another way to combine them, or other floors: its stored samples
ranked again by the values that they have. Nothing is generated, scored or trained."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.table import Table

from .build import build_algorithm
from .checkpoint import write_file
from .config import RewardConfig, RunConfig, parse_config
from .errors import ConfigError, DataError
from .protocols import Algorithm
from .registry import nearest
from .report import read_metrics
from .scoring import by_prompt, combination, stored
from .store import SampleStore
from .types import Example, Scored

Floor = Literal["base"] | float | None


@dataclass(frozen=True, kw_only=True)
class Rescored:
    """A round with what it selected, and what it would have.

    Rescored(round=3, scored={"0003-...": <Scored>}, before=[<Example>], after=[<Example>])
    """

    round: int
    scored: Mapping[str, Scored]
    """The samples that were selected from, with the new reward, by id."""
    before: Sequence[Example]
    after: Sequence[Example]

    @property
    def new(self) -> list[Example]:
        """What is selected now and was not before."""
        old = {_key(example) for example in self.before}
        return [example for example in self.after if _key(example) not in old]

    @property
    def gone(self) -> list[Example]:
        """What was selected before and is not now."""
        now = {_key(example) for example in self.after}
        return [example for example in self.before if _key(example) not in now]


def _key(example: Example) -> tuple[str, str]:
    return example.sample.id, example.rejected.id if example.rejected else ""


def read_weights(entries: Sequence[str]) -> dict[str, float]:
    """Reward to weight, of entries `NAME=VALUE` and YAML files; later ones go before earlier ones. A file maps names to
    weights, or has `rewards` like a run, such as the weights.yaml of `raftdiff preference weights`.

    Raises:
        ConfigError: an entry that is neither.
    """
    weights: dict[str, float] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if equals and not Path(entry).exists():
            weights[name] = _number(value, f"--weights {entry!r}")
        else:
            weights |= _weights_of(Path(entry))
    return weights


def _weights_of(path: Path) -> dict[str, float]:
    try:
        found: Any = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"--weights {path}: neither NAME=VALUE nor a YAML file ({why})") from None
    if isinstance(found, dict) and isinstance(found.get("rewards"), list):
        rewards = [RewardConfig.model_validate(reward) for reward in found["rewards"]]
        return {reward.reported_name: reward.weight for reward in rewards}
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"--weights {path}: give names with their weights, or `rewards` as a run has them")
    return {str(name): _number(value, f"{path}: {name}") for name, value in found.items()}


def read_floors(entries: Sequence[str]) -> dict[str, Floor]:
    """Reward to floor, of entries `NAME=base`, `NAME=VALUE` or `NAME=none`. Raises ConfigError for others."""
    floors: dict[str, Floor] = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        if value in ("base", "none"):
            floors[name] = "base" if value == "base" else None
        else:
            floors[name] = _number(value, f"--floor {entry!r}")
    return floors


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{where}: {value!r} is not a number")
    return number


def changed(
    config: RunConfig,
    *,
    weights: Mapping[str, float] | None = None,
    combine: str | None = None,
    floors: Mapping[str, Floor] | None = None,
) -> RunConfig:
    """The settings of a run with other weights, floors or way to combine; what is not named stays.

    Raises:
        ConfigError: a reward that the run does not have, or settings that do not fit.
    """
    weights, floors = weights or {}, floors or {}
    values = config.model_dump(mode="json")
    names = [reward.reported_name for reward in config.rewards]
    for name in (*weights, *floors):
        if name not in names:
            raise ConfigError(f"the run has no reward {name!r}{nearest(name, names)} (it has {', '.join(names)})")
    for name, reward in zip(names, values["rewards"], strict=True):
        reward["weight"] = weights.get(name, reward["weight"])
        reward["floor"] = floors.get(name, reward["floor"])
    return parse_config(values | {"combine": combine or config.combine}, where="rescore")


def rescore(config: RunConfig, new: RunConfig, *, allow_code: bool = False) -> list[Rescored]:
    """Each round of a run with what it selected and what it would have under the settings `new`.

    Raises:
        ConfigError: its algorithm does not select by stored rewards alone.
        DataError: the folder holds no round with its samples.
    """
    algorithm = build_algorithm(new, allow_code=allow_code)
    _check(algorithm, config)
    reports, store = read_metrics(config.folder / "metrics.jsonl"), SampleStore(config.folder)
    found = []
    for report in reports[1:]:
        grown = report.phase.grown
        scored = stored(store, grown, combination(new, reports, grown=grown))
        if scored:
            after = algorithm.select(by_prompt(scored), round=report.round, seed=config.seed, phase=report.phase)
            of_id = {s.sample.id: s for s in scored}
            before = store.read_selection(report.round)
            found.append(Rescored(round=report.round, scored=of_id, before=before, after=after))
    if not found:
        raise DataError(f"{config.folder} has no round whose samples and scores are stored")
    return found


def _check(algorithm: Algorithm, config: RunConfig) -> None:
    name = config.algorithm.name
    if not algorithm.samples:
        raise ConfigError(f"{name} selects from no samples of its own: there is nothing to rescore")
    if "log_prob" in algorithm.needs or "log_prob_and_value" in algorithm.needs:
        raise ConfigError(f"{name} trains on every sample, by its advantage: other weights change no selection")
    if algorithm.needs_log_ratio:
        raise ConfigError(f"{name} ranks by a log-ratio too, which is not stored: rescore runs without it")
    if algorithm.scores_data and config.data:
        raise ConfigError(f"{name} selects from your own data too, which is not stored: rescore runs without it")


# ------------------------------------------------------------------------------------------------ what is shown


def summary(rounds: Sequence[Rescored]) -> str:
    """How much of the selection changes, in one line."""
    selected, new = sum(len(r.after) for r in rounds), sum(len(r.new) for r in rounds)
    return (
        f"{new} of {selected} selected samples would be others ({new / max(selected, 1):.0%}), over {len(rounds)} "
        f"rounds; the run selected {sum(len(r.before) for r in rounds)}"
    )


def means_table(config: RunConfig, new: RunConfig, rounds: Sequence[Rescored]) -> Table:
    """Of each reward the weights, and its mean over all samples, over what was selected and over what would be."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("reward")
    for title in ("weight", "now", "all samples", "selected", "would be"):
        table.add_column(title, justify="right")
    everything = {r.round: [Example(sample=s.sample) for s in r.scored.values()] for r in rounds}
    for old, reward in zip(config.rewards, new.rewards, strict=True):
        name = reward.reported_name
        means = [
            _mean_part(name, [(r, examples) for r, examples in chosen])
            for chosen in (
                [(r, everything[r.round]) for r in rounds],
                [(r, r.before) for r in rounds],
                [(r, r.after) for r in rounds],
            )
        ]
        table.add_row(name, _weight(old), _weight(reward), *(f"{mean:.4g}" for mean in means))
    return table


def _weight(reward: RewardConfig) -> str:
    floor = "" if reward.floor is None else f", at least {reward.floor}"
    return f"{reward.weight:g}{floor}"


def _mean_part(name: str, chosen: Sequence[tuple[Rescored, Sequence[Example]]]) -> float:
    """The mean raw value over examples, by their weights; NaN where none has it."""
    total = weight = 0.0
    for r, examples in chosen:
        for example in examples:
            parts = r.scored[example.sample.id].parts if example.sample.id in r.scored else {}
            if name in parts and example.weight > 0:
                total, weight = total + example.weight * parts[name], weight + example.weight
    return total / weight if weight else math.nan


def changes_table(rounds: Sequence[Rescored], most: int) -> Table:
    """The first changes, prompt by prompt: the seeds that go and that come, with their raw values."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("round", "prompt", "was selected", "would be"):
        table.add_column(title)
    rows = [(r, prompt) for r in rounds for prompt in dict.fromkeys(e.sample.prompt.text for e in (*r.new, *r.gone))]
    for r, prompt in rows[:most]:
        sides = ["\n".join(_shown(r, e) for e in side if e.sample.prompt.text == prompt) for side in (r.gone, r.new)]
        table.add_row(str(r.round), prompt, *sides)
    return table


def _shown(rescored: Rescored, example: Example) -> str:
    parts = rescored.scored[example.sample.id].parts if example.sample.id in rescored.scored else {}
    return f"{example.sample.id}: " + ", ".join(f"{name} {value:.4g}" for name, value in parts.items())


def write_selection(path: Path, rounds: Sequence[Rescored]) -> None:
    """A CSV of every sample: round, id, seed, prompt, its raw values, the new reward, whether it was selected and would
    be. Raises StorageError where it cannot be written."""
    names = list(dict.fromkeys(name for r in rounds for s in r.scored.values() for name in s.parts))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["round", "sample_id", "seed", "prompt", *names, "reward", "selected", "would_be"])
    for r in rounds:
        before, after = ({example.sample.id for example in side} for side in (r.before, r.after))
        for sample_id, s in r.scored.items():
            values = [s.parts.get(name, "") for name in names]
            reward = "" if s.reward is None else s.reward
            flags = [int(sample_id in before), int(sample_id in after)]
            writer.writerow([r.round, sample_id, s.sample.seed, s.sample.prompt.text, *values, reward, *flags])
    write_file(path, text.getvalue().encode())
