"""A run as people read it: metrics.jsonl, one self-contained report.html, picture grids, a table for the terminal.

The report holds its pictures, curves and styles inside, loads nothing, and runs no script. Prompts, configs and
names come from anywhere, so the template escapes everything.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
import pydantic
import torch
from PIL import Image
from rich.table import Table
from rich.text import Text

from .checkpoint import fsync_folder, write_file
from .errors import DataError, StorageError
from .evaluation import Trend, Verdict
from .objectives import Together
from .types import Evaluation, Interval, Modality, RoundReport, Sample, Scored

TEMPLATES = Path(__file__).parent / "templates"
SMALL_SIDE = 128  # pictures up to this size stay lossless and are shown with hard pixels
LARGEST_SIDE = 512  # larger ones are scaled down to it
ABSENT = "\N{EN DASH}"
NOT_CHARTED = ("learning_rate", "steps", "skipped_steps")  # of what training logs

PAIRS = 24  # prompts shown before and after


# ------------------------------------------------------------------------------------------------ metrics.jsonl


def append_metrics(path: Path, report: RoundReport) -> None:
    """Add one line of canonical JSON (sorted keys, no spaces, values that are not finite as null) and flush it to
    the disk. What a killed process left of an unfinished line is cut off first.

    Raises:
        StorageError: the line could not be written; the file is left without it.
    """
    line = (json.dumps(_plain(report), sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n").encode()
    try:
        new = not path.exists()
        with path.open("x+b" if new else "r+b", buffering=0) as file:  # a buffer would write again on closing
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
            file.seek(whole)
            try:
                rest = line
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(whole)
                raise
        if new:
            fsync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"could not add {len(line)} bytes to {path}: {error.strerror}; free some space") from error


def read_metrics(path: Path) -> list[RoundReport]:
    """The reports of a run, in the order they were written; none where there is no file yet. A last line without
    its line end was never finished, and is left out.

    Raises:
        DataError: a line is not a round report.
    """
    return [_parse(line, path, number) for number, line in enumerate(_lines(path), start=1)]


def truncate_metrics(path: Path, last_round: int) -> None:
    """Drop the reports of rounds after `last_round`, which a resumed run does again."""
    kept = [line for number, line in enumerate(_lines(path), start=1) if _parse(line, path, number).round <= last_round]
    if path.exists():
        write_file(path, b"".join(line + b"\n" for line in kept))


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _parse(line: bytes, path: Path, number: int) -> RoundReport:
    try:
        return _adapter().validate_python(_null_to_nan(json.loads(line)))
    except (ValueError, pydantic.ValidationError) as error:
        raise DataError(
            f"{path}, line {number}: not a round report ({error}); remove the line, or take the file from a backup"
        ) from error


@cache
def _adapter() -> pydantic.TypeAdapter[RoundReport]:
    return pydantic.TypeAdapter(RoundReport)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _null_to_nan(value: Any) -> Any:
    """No field of a round report is optional, so that null can only be a value that was not finite."""
    if isinstance(value, dict):
        return {key: _null_to_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_null_to_nan(item) for item in value)
    return math.nan if value is None else value


# ------------------------------------------------------------------------------------------------ base against aligned


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric, base against aligned, as text of matching precision."""

    guidance: str
    metric: str
    role: Literal["trained", "not trained on", ""]
    base: str
    aligned: str
    gain: str
    interval: str
    interval_values: Interval | None
    verdict: Literal["better", "worse", "unsure"]


def comparison(base: Sequence[Evaluation], aligned: Sequence[Evaluation], trained: Collection[str]) -> list[Row]:
    """The rows of the table: for each guidance scale of `aligned` its metrics, the trained ones first."""
    base_at = {evaluation.guidance_scale: evaluation for evaluation in base}
    rows = []
    for evaluation in aligned:
        before = base_at.get(evaluation.guidance_scale)
        for name in sorted(evaluation.metrics, key=lambda name: order_of_metrics(name, trained)):
            after, gain = evaluation.metrics[name], evaluation.gains.get(name)
            digits = _digits(gain or after)
            gained, interval = format_interval(gain) if gain else (ABSENT, ABSENT)
            rows.append(
                Row(
                    guidance=guidance_label(evaluation.guidance_scale, evaluation.modality),
                    metric=name,
                    role=role_of_metric(name, trained),
                    base=_number(before.metrics[name].mean, digits) if before and name in before.metrics else ABSENT,
                    aligned=_number(after.mean, digits),
                    gain=gained,
                    interval=interval,
                    interval_values=gain if gain and gain.count else None,
                    verdict="unsure" if not gain or not gain.excludes_zero else "better" if gain.mean > 0 else "worse",
                )
            )
    return rows


def against_base(
    reports: Sequence[RoundReport], verdict: Verdict, trained: Collection[str]
) -> tuple[int | None, list[Row]]:
    """The round that is exported and its comparison with the base; None and no rows where the base alone was
    evaluated."""
    evaluated = [report for report in reports if report.evaluations]
    if len(evaluated) < 2:
        return None, []
    aligned = evaluated[verdict.best or -1]
    return aligned.round, comparison(evaluated[0].evaluations, aligned.evaluations, trained)


def by_guidance(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each guidance scale, under its label."""
    return [(guidance, list(group)) for guidance, group in groupby(rows, lambda row: row.guidance)]


def guidance_label(scale: float, modality: Modality = "image") -> str:
    """What distinguishes the evaluations of one model."""
    if modality == "text":
        return "held-out prompts"
    return "without guidance" if scale <= 1 else f"guidance scale {scale:g}"


def role_of_metric(name: str, trained: Collection[str]) -> Literal["trained", "not trained on", ""]:
    if name in ("diversity", "drift"):
        return ""
    return "trained" if name == "reward" or name in trained else "not trained on"


def order_of_metrics(name: str, trained: Collection[str]) -> tuple[int, str]:
    if name == "reward":
        return 0, name
    return {"trained": 1, "not trained on": 2, "": 3}[role_of_metric(name, trained)], name


def _digits(interval: Interval) -> int:
    """Decimals that show two digits of the uncertainty."""
    half_width = (interval.high - interval.low) / 2
    if not half_width > 0:
        return 3
    return min(max(1 - math.floor(math.log10(half_width)), 0), 4)


def _number(value: float, digits: int, *, signed: bool = False) -> str:
    if not math.isfinite(value):
        return ABSENT
    shown = round(value, digits) + 0.0  # -0.0 + 0.0 is 0.0: what rounds to nothing has no sign
    return f"{shown:{'+' if signed else ''},.{digits}f}".replace("-", "\N{MINUS SIGN}")


def terminal_table(base: Sequence[Evaluation], aligned: Sequence[Evaluation], trained: Collection[str]) -> Table:
    """Base against aligned with the gains' intervals, for the end of a run."""
    rows = comparison(base, aligned, trained)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("metric")
    table.add_column("", style="dim")
    for title in ("base", "aligned", "gain"):
        table.add_column(title, justify="right")
    table.add_column("95% interval")
    styles = {"better": "green", "worse": "red", "unsure": ""}
    guidance = None
    for row in rows:
        if row.guidance != guidance:
            guidance = row.guidance
            table.add_row(Text(guidance, style="italic"))
        style = styles[row.verdict]
        table.add_row(
            Text(row.metric), row.role, row.base, row.aligned, Text(row.gain, style=style), Text(row.interval)
        )
    return table


# ------------------------------------------------------------------------------------------------ pictures


def image_grid(images: Sequence[torch.Tensor], columns: int, *, scale: int = 1, gap: int = 2) -> Image.Image:
    """Pictures of one size, uint8 [3, height, width], in rows of `columns` on white. Each pixel becomes
    `scale` x `scale` pixels; `gap` is between pictures, before scaling."""
    assert len({image.shape for image in images}) == 1
    _, height, width = images[0].shape
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[y : y + height, x : x + width] = image.permute(1, 2, 0).numpy()
    grid = Image.fromarray(canvas)
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An output in the report: a picture as a data address, or a text."""

    address: str | None = None
    small: bool = False
    text: str | None = None


def picture(sample: Sample) -> Picture:
    """A sample as a page shows it."""
    if sample.image is None:
        return Picture(text=sample.text or "")
    image = Image.fromarray(sample.image.permute(1, 2, 0).numpy())
    small = max(image.size) <= SMALL_SIDE
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    kind = "png" if small else "webp"
    data = io.BytesIO()
    image.save(data, kind, quality=88)
    return Picture(address=f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}", small=small)


def side_by_side(before: Sequence[Sample], after: Sequence[Sample], most: int) -> list[tuple[Sample, Sample]]:
    """The first seed of each prompt that both have, of at most `most` prompts."""
    aligned = {(sample.prompt.id, sample.seed): sample for sample in after}
    pairs: dict[str, tuple[Sample, Sample]] = {}
    for sample in before:
        other = aligned.get((sample.prompt.id, sample.seed))
        if other is not None and len(pairs) < most:
            pairs.setdefault(sample.prompt.id, (sample, other))
    return list(pairs.values())


# ------------------------------------------------------------------------------------------------ curves


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a chart: a value at each place along it (round, passes, seconds), with its interval where there is
    one."""

    label: str
    at: Sequence[float]
    values: Sequence[float]
    lows: Sequence[float] = ()
    highs: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A curve in the coordinates of its chart, as SVG paths and points."""

    label: str
    path: str
    band: str
    points: list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A small line chart in a box of `WIDTH` x `HEIGHT`, ready for the template."""

    title: str
    role: str
    drawings: list[Drawing]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]

    WIDTH = 360
    HEIGHT = 190
    LEFT, RIGHT, TOP, BOTTOM = 46, 350, 12, 164


def draw_chart(title: str, role: str, curves: Sequence[Curve], *, quantity: bool = False) -> Chart:
    """Scale the curves to one box; values that are not finite are left out. Along them are rounds, passes or seconds,
    or with `quantity` any numbers."""
    places = [at for curve in curves for at in curve.at]
    heights = [v for curve in curves for v in (*curve.values, *curve.lows, *curve.highs) if math.isfinite(v)] or [0.0]
    ticks, digits = _ticks(min(heights), max(heights))
    low, high = min(*heights, ticks[0]), max(*heights, ticks[-1])
    first, last = min(places), max(places)

    def x(r: float) -> float:
        share = (r - first) / (last - first) if last > first else 0.5
        return round(Chart.LEFT + 8 + share * (Chart.RIGHT - Chart.LEFT - 16), 1)

    def y(value: float) -> float:
        return round(Chart.BOTTOM - (value - low) / (high - low) * (Chart.BOTTOM - Chart.TOP), 1)

    drawings = []
    for curve in curves:
        points = [(x(r), y(v)) for r, v in zip(curve.at, curve.values, strict=True) if math.isfinite(v)]
        edges = [
            (x(r), y(a), y(b))
            for r, a, b in zip(curve.at, curve.lows, curve.highs, strict=bool(curve.lows))
            if math.isfinite(a) and math.isfinite(b)
        ]
        band = [(at, a) for at, a, _ in edges] + [(at, b) for at, _, b in reversed(edges)]
        drawings.append(
            Drawing(label=curve.label, path=_path(points), band=_path(band) + "Z" if band else "", points=points)
        )
    places, decimals = _ticks(first, last)
    x_ticks = [
        (x(at), _number(at, decimals) if quantity else _short(at))
        for at in places
        if first <= at <= last and (quantity or at == int(at))
    ]
    y_ticks = [(y(tick), _number(tick, digits)) for tick in ticks]
    return Chart(title=title, role=role, drawings=drawings, x_ticks=x_ticks, y_ticks=y_ticks)


def _short(at: float) -> str:
    return "base" if at == 0 else f"{at / 1000:g}k" if at >= 10_000 else f"{at:g}"


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points) if points else ""


def _ticks(low: float, high: float) -> tuple[list[float], int]:
    """About four round numbers from at most `low` to at least `high`, and the decimals that they need."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)], max(0, -math.floor(math.log10(step) + 1e-9))


def _charts(reports: Sequence[RoundReport], trained: Collection[str]) -> list[Chart]:
    timeline = [(float(report.round), report.evaluations) for report in reports]
    by_scale: dict[float, list[tuple[float, Evaluation]]] = {}
    for at, evaluations in timeline:
        for evaluation in evaluations:
            by_scale.setdefault(evaluation.guidance_scale, []).append((at, evaluation))
    names = {name for evaluated in by_scale.values() for _, e in evaluated for name in e.metrics}
    charts = []
    for name in sorted(names, key=lambda name: order_of_metrics(name, trained)):
        curves = []
        for scale, evaluated in by_scale.items():
            found = [(at, e.metrics[name]) for at, e in evaluated if name in e.metrics]
            if found:
                curves.append(
                    Curve(
                        label=guidance_label(scale, evaluated[0][1].modality),
                        at=[at for at, _ in found],
                        values=[interval.mean for _, interval in found],
                        lows=[interval.low for _, interval in found],
                        highs=[interval.high for _, interval in found],
                    )
                )
        charts.append(draw_chart(name, role_of_metric(name, trained), curves))
    charts += [_statistic_chart(name, by_scale) for name in _statistics(by_scale)]
    groups = [
        Curve(label=label, at=[r.round for r in having], values=[r.rewards[key] for r in having])
        for key, label in (("best_of_group", "best of each prompt"), ("reward", "mean of all"))
        if (having := [r for r in reports if key in r.rewards])
    ]
    if groups:
        charts.append(draw_chart("samples drawn for training", "", groups))
    logged = dict.fromkeys(name for report in reports for name in report.training if name not in NOT_CHARTED)
    for name in logged:
        having = [report for report in reports if name in report.training]
        values = [report.training[name] for report in having]
        curve = Curve(label=name, at=[report.round for report in having], values=values)
        charts.append(draw_chart(f"training: {name}", "", [curve]))
    return charts


def _statistics(by_scale: Mapping[float, Sequence[tuple[float, Evaluation]]]) -> list[str]:
    names = dict.fromkeys(name for evaluated in by_scale.values() for _, e in evaluated for name in e.statistics)
    return [name for name in names if name != "spread"]


def _statistic_chart(name: str, by_scale: Mapping[float, Sequence[tuple[float, Evaluation]]]) -> Chart:
    """A statistic of the held-out pictures over the rounds, at each guidance scale."""
    curves = [
        Curve(label=guidance_label(scale), at=[at for at, _ in having], values=[m.mean for _, m in having])
        for scale, evaluated in by_scale.items()
        if (having := [(at, e.statistics[name]) for at, e in evaluated if name in e.statistics])
    ]
    return draw_chart(f"pictures: {name}", "", curves)


# ------------------------------------------------------------------------------------------------ report.html


@dataclass(frozen=True, kw_only=True)
class Total:
    """A line of the ledger, summed over rounds."""

    stage: str
    seconds: float
    passes: int


def write_report(
    run_folder: Path,
    *,
    title: str,
    reports: Sequence[RoundReport],
    verdict: Verdict,
    before: Sequence[Sample],
    after: Sequence[Sample],
    best: Sequence[Scored],
    worst: Sequence[Scored],
    config_yaml: str,
    load_line: str,
    trained: Collection[str],
    together: Together | None = None,
    trends: Mapping[str, Trend] | None = None,
) -> Path:
    """Write `report.html` into a run folder, atomically: any moment shows a whole report, the old or the new.

    Args:
        reports: of all rounds, in order; the first is round 0, the base model's evaluations.
        verdict: on the evaluated rounds; its `best` is shown as the aligned model, the last one if that is the base.
        before, after: samples of the base and the aligned model; those of the same prompt and seed are shown side by
            side, one seed for each of the first `PAIRS` prompts.
        best, worst: samples of the last round.
        config_yaml: the run's settings, without secrets.
        load_line: the code that loads the adapter.
        trained: names of the rewards that the run trains on; `reward`, their combination, always is.
        together: what the samples of the last round say of several rewards, which then have a section.
        trends: where each of them goes in the evaluations, if there are two.

    Returns:
        The path of the report.

    Raises:
        StorageError: the file could not be written.
    """
    aligned_round, rows = against_base(reports, verdict, trained)
    ledger = totals(reports)
    html = page(
        "report.html.jinja",
        title=title,
        verdict=verdict,
        headline=rows[0] if rows else None,
        aligned_round=aligned_round,
        tables=by_guidance(rows),
        pairs=[(one.prompt.text, picture(one), picture(other)) for one, other in side_by_side(before, after, PAIRS)],
        charts=_charts(reports, trained),
        chart_box=Chart,
        together=together,
        trends=trends or {},
        extremes=[("Best", _cards(best)), ("Worst", _cards(worst))],
        ledger=ledger,
        reports=reports,
        config_yaml=config_yaml,
        load_line=load_line,
        seconds=sum(line.seconds for line in ledger),
        passes=sum(line.passes for line in ledger),
    )
    path = run_folder / "report.html"
    write_file(path, html.encode())
    return path


def _cards(samples: Sequence[Scored]) -> list[tuple[Scored, Picture]]:
    return [(scored, picture(scored.sample)) for scored in samples]


def totals(reports: Sequence[RoundReport]) -> list[Total]:
    """The ledger: stages in the order they first ran, summed over the rounds."""
    stages = dict.fromkeys(line.stage for report in reports for line in report.ledger)
    return [
        Total(
            stage=stage,
            seconds=sum(line.seconds for r in reports for line in r.ledger if line.stage == stage),
            passes=sum(line.passes for r in reports for line in r.ledger if line.stage == stage),
        )
        for stage in stages
    ]


def duration(seconds: float | None) -> str:
    """Two figures that matter: `42 s`, `3 min 20 s`, `5 h 10 min`, `2 d 3 h`."""
    if seconds is None or math.isnan(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= large:
            return f"{whole // large} {name} {whole % large // small} {small_name}"
    return f"{whole} s"


def _forest(interval: Interval) -> dict[str, float]:
    """Where the ends and the mean of an interval lie in a strip 120 wide with zero in its middle."""
    reach = max(abs(interval.low), abs(interval.high), abs(interval.mean)) or 1.0
    places = {"low": interval.low, "high": interval.high, "mean": interval.mean}
    return {name: round(60 + 55 * value / reach, 1) for name, value in places.items()}


def page(template: str, **values: Any) -> str:
    """A page from one of the templates; everything that is put in is escaped."""
    return environment(TEMPLATES).get_template(template).render(**values)


def format_interval(interval: Interval) -> tuple[str, str]:
    """The mean, signed, and the ends, with as many decimals as the interval deserves."""
    digits = _digits(interval)
    ends = f"{_number(interval.low, digits)} to {_number(interval.high, digits)}"
    return _number(interval.mean, digits, signed=True), ends


@cache
def environment(folder: Path) -> jinja2.Environment:
    """The templates of a folder, and those here for them to import from; everything that is put in is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    environment.filters["forest"] = _forest
    environment.filters["correlation"] = lambda value: _number(value, 2)
    environment.filters["score"] = lambda value: ABSENT if value is None else _number(value, 3)
    return environment
