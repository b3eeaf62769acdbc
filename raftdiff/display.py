"""Progress in the terminal: a bar for each stage, with the numbers that matter, and a line for each round."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .config import RunConfig
from .types import RoundReport


class Terminal:
    """A `raftdiff.rounds.Display` for a person."""

    def __init__(self, console: Console, config: RunConfig):
        self.console = console
        self.rounds = "" if config.budget else f"/{config.rounds}"
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            transient=True,
        )
        self._task: int | None = None

    def __enter__(self) -> Terminal:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, round: int, name: str, total: int) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)  # type: ignore[arg-type]
        where = f"round {round}{self.rounds}" if round else "base"
        self._task = self._progress.add_task(f"{where} · {name}", total=total, numbers="")

    def advance(self, count: int = 1, metrics: Mapping[str, float] | None = None) -> None:
        if self._task is not None:
            numbers = "  ".join(f"{k} {metrics[k]:.3g}" for k in ("loss", "gradient_norm") if metrics and k in metrics)
            self._progress.update(self._task, advance=count, numbers=numbers)  # type: ignore[arg-type]

    def round_done(self, report: RoundReport) -> None:
        parts = [f"round {report.round}{self.rounds}" if report.round else "base"]
        if report.requested:
            parts.append(
                f"{report.scored} scored, {report.failed} failed, {report.skipped} skipped, {report.selected} selected"
            )
        if report.training.get("steps"):
            logged = [name for name in ("loss", "accuracy") if name in report.training]
            numbers = [f"{name} {report.training[name]:.4f}" for name in logged]
            parts.append(", ".join([f"{report.training['steps']:.0f} steps", *numbers]))
        for evaluation in report.evaluations[:1]:
            parts += [f"{name} {interval.mean:.3g}" for name, interval in evaluation.metrics.items()]
        parts.append(f"{sum(cost.seconds for cost in report.ledger):.0f} s")
        self.console.print(" · ".join(parts), highlight=False)

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, markup=False)
