"""LoRAs that were each trained on one reward, mixed at inference (rewarded soups, Rame et al., arXiv 2306.04488): what
each mixture has on held-out prompts, and what runs on several rewards have beside them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.table import Table

from .build import build_policy, build_prompts, build_reward, default_device, load_model
from .checkpoint import write_file
from .config import RewardConfig, RunConfig
from .errors import ConfigError, DataError, WeightsError
from .evaluation import measure
from .prompts import load_prompts
from .protocols import Reward
from .report import Chart, Curve, draw_chart, format_interval, page, role_of_metric
from .rounds import HELD_OUT_ROUND
from .sampling import jobs
from .scoring import score_parts
from .types import Evaluation, Sample

Tell = Callable[[str], None]
"""Called with what comes next."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """LoRAs at their weights, on the held-out prompts.

    Mixture(name="0.25 clip + 0.75 aesthetic", weights=(0.25, 0.75), evaluation=<Evaluation>)
    """

    name: str
    weights: tuple[float, ...]
    """Of each LoRA of the soup; empty for a run beside it."""
    evaluation: Evaluation


@dataclass(frozen=True, kw_only=True)
class Soup:
    """What was measured.

    Soup(base=<Evaluation>, mixtures=[<Mixture>], axes=("clip", "aesthetic"))
    """

    base: Evaluation
    mixtures: Sequence[Mixture]
    axes: tuple[str, ...]
    """The rewards that the LoRAs were trained on."""

    def on_front(self, mixture: Mixture) -> bool:
        """Whether no other one is as good in the mean of every axis and better in one."""
        own = self.means(mixture)
        others = [self.means(other) for other in self.mixtures]
        return not any(all(o >= v for o, v in zip(other, own, strict=True)) and other != own for other in others)

    def means(self, mixture: Mixture) -> tuple[float, ...]:
        return tuple(mixture.evaluation.metrics[name].mean for name in self.axes)


def shares(count: int, parts: int) -> list[tuple[float, ...]]:
    """Every way to share 1 among `count` in steps of 1 / `parts`, all of the first one first.

    >>> shares(2, 2)
    [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    """

    def counts(count: int, left: int) -> list[tuple[int, ...]]:
        if count == 1:
            return [(left,)]
        return [(first, *rest) for first in range(left, -1, -1) for rest in counts(count - 1, left - first)]

    return [tuple(n / parts for n in row) for row in counts(count, parts)]


def mix(
    configs: Sequence[RunConfig],
    *,
    beside: Sequence[RunConfig] = (),
    parts: int = 4,
    prompts: str | None = None,
    seeds_per_prompt: int | None = None,
    allow_code: bool = False,
    pipeline: Any = None,
    rewards: Mapping[str, Reward] | None = None,
    tell: Tell = lambda line: None,
) -> Soup:
    """Evaluate mixtures of the LoRAs of finished runs, by the settings of the first: its model, guidance, held-out
    prompts and seeds.

    Args:
        beside: runs whose LoRAs are evaluated alone.
        parts: weights go in steps of 1 / `parts`.
        pipeline, rewards: live ones, in place of those that the settings name.

    Raises:
        ConfigError: fewer than two runs, runs of other models, of texts, or of one reward with two settings.
        DataError: a run that is not finished.
        WeightsError: a LoRA that does not fit the model.
    """
    from .pipelines.loading import attach_lora

    check(configs, beside, parts)
    first = configs[0]
    make = partial(build_reward, device=default_device(), live=rewards, allow_code=allow_code)
    wanted = _rewards([*configs, *beside])
    tell(f"loading {first.model.path} and its rewards")
    judges = [make(reward).reward for reward in wanted]
    pipeline = load_model(first.model, default_device()) if pipeline is None else pipeline
    policy = build_policy(first, pipeline)
    if not hasattr(pipeline, "set_adapters"):
        raise WeightsError(f"{type(pipeline).__name__} cannot mix LoRAs: it has no set_adapters")
    held_out = load_prompts(prompts) if prompts else build_prompts(first)[1]
    per_prompt = seeds_per_prompt or first.evaluation.seeds_per_prompt
    scale = (first.evaluation.guidance_scales or [policy.guidance_scale])[0]
    drawn = jobs(held_out, per_prompt, run_seed=first.seed, round=HELD_OUT_ROUND)

    def evaluated(base: Evaluation | None = None) -> Evaluation:
        samples: list[Sample] = policy.sample([j.prompt for j in drawn], [j.seed for j in drawn], guidance_scale=scale)
        values = {judge.name: score_parts(samples, judge, max_failed=first.max_failed) for judge in judges}
        return measure(samples, values, guidance_scale=scale, base=base)

    tell("the base")
    with policy.reference():
        base = evaluated()
    adapters = [f"soup_{i}" for i in range(len(configs) + len(beside))]
    for name, config in zip(adapters, (*configs, *beside), strict=True):
        attach_lora(pipeline, config.folder / "lora", name)
    mixtures = []
    for weights in shares(len(configs), parts):
        name = " + ".join(f"{w:g} {c.name}" for w, c in zip(weights, configs, strict=True) if w)
        tell(name)
        pipeline.set_adapters(adapters[: len(configs)], list(weights))
        mixtures.append(Mixture(name=name, weights=weights, evaluation=evaluated(base)))
    for config, adapter in zip(beside, adapters[len(configs) :], strict=True):
        tell(config.name)
        pipeline.set_adapters([adapter], [1.0])
        mixtures.append(Mixture(name=config.name, weights=(), evaluation=evaluated(base)))
    axes = dict.fromkeys(name for config in configs for name in config.trained_rewards)
    return Soup(base=base, mixtures=mixtures, axes=tuple(axes))


def check(configs: Sequence[RunConfig], beside: Sequence[RunConfig], parts: int) -> None:
    """Raise what `mix` raises for runs that cannot be mixed, before anything is loaded."""
    if len(configs) < 2:
        raise ConfigError("a soup needs at least two runs, each trained on its own reward")
    if parts < 1:
        raise ConfigError(f"the grid has {parts} steps; give at least 1")
    for config in (*configs, *beside):
        if config.model.modality != "image" or config.adapter.method != "lora":
            raise ConfigError(f"{config.folder}: only LoRAs of text-to-image pipelines can be mixed")
        if (config.model.path, config.model.revision) != (configs[0].model.path, configs[0].model.revision):
            raise ConfigError(f"{config.folder} and {configs[0].folder} are of different models")
        if not (config.folder / "lora" / "manifest.json").exists():
            raise DataError(f"{config.folder} is not finished: it has no LoRA; `raftdiff resume` goes on with it")


def _rewards(configs: Sequence[RunConfig]) -> list[RewardConfig]:
    """Every reward of the runs once."""
    found: dict[str, RewardConfig] = {}
    for config in configs:
        for reward in (*config.rewards, *config.evaluation.rewards):
            known = found.setdefault(reward.reported_name, reward)
            if (known.name, known.options) != (reward.name, reward.options):
                raise ConfigError(f"the runs mean different rewards by {reward.reported_name!r}: give one a `label`")
    return list(found.values())


# ------------------------------------------------------------------------------------------------ what is shown


def table(soup: Soup) -> Table:
    """Each mixture's gains over the base; a star where it is on the front of the trained rewards."""
    names = _metrics(soup)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("mixture", "front", *names):
        shown.add_column(title, overflow="fold")
    for mixture in soup.mixtures:
        gains = ["\n".join(format_interval(mixture.evaluation.gains[name])) for name in names]
        shown.add_row(mixture.name, "*" if soup.on_front(mixture) else "", *gains)
    return shown


def write_soup(folder: Path, soup: Soup) -> Path:
    """Write soup.csv and soup.html, which is returned. Raises StorageError where they cannot be written."""
    names = _metrics(soup)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["mixture", "front", *names])
    writer.writerow(["base", "", *(soup.base.metrics[name].mean for name in names)])
    for mixture in soup.mixtures:
        means = [mixture.evaluation.metrics[name].mean for name in names]
        writer.writerow([mixture.name, int(soup.on_front(mixture)), *means])
    write_file(folder / "soup.csv", text.getvalue().encode())
    html = page(
        "soup.html.jinja",
        title=folder.name,
        metrics=[(name, role_of_metric(name, soup.axes)) for name in names],
        mixtures=[(mixture, soup.on_front(mixture)) for mixture in soup.mixtures],
        interval=format_interval,
        charts=charts(soup),
        chart_box=Chart,
    )
    write_file(folder / "soup.html", html.encode())
    return folder / "soup.html"


def charts(soup: Soup) -> list[Chart]:
    """Each pair of the trained rewards against each other: the mixtures of a soup of two as a curve, of more as points,
    the base and the runs beside it as points."""
    found = []
    for x, y in combinations(soup.axes, 2):
        points = [("base", soup.base), *((m.name, m.evaluation) for m in soup.mixtures if not m.weights)]
        mixed = [m.evaluation for m in soup.mixtures if m.weights]
        groups = [("mixtures", mixed)] if len(soup.mixtures[0].weights) == 2 else [("", [e]) for e in mixed]
        curves = [
            Curve(label=label, at=[e.metrics[x].mean for e in es], values=[e.metrics[y].mean for e in es])
            for label, es in (*groups, *((label, [e]) for label, e in points))
            if all(math.isfinite(e.metrics[name].mean) for e in es for name in (x, y))
        ]
        found.append(draw_chart(f"{y} against {x}", "", curves, quantity=True))
    return found


def _metrics(soup: Soup) -> list[str]:
    return [*soup.axes, *(name for name in soup.base.metrics if name not in soup.axes)]
