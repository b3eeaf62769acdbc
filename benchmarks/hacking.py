"""Does the sentinel see a reward being hacked before much is lost, and is it silent on a run that goes well?

One run is trained on a reward that a plain picture maximizes (the size of the file as a JPEG), one on the rewards of
the demo, in the same small doses and with `evaluation.sentinel: stop`. What is lost is measured on the true rating,
which no run is trained on; the sentinel sees it too, as it does in a run of yours that has held-out rewards. Then the
same runs are judged once more without any held-out reward, by diversity and by the pictures' statistics alone.

    python -m benchmarks.hacking
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common import arguments, configured, console, run, table, verdict
from raftdiff.config import EvaluationConfig
from raftdiff.evaluation import run_verdict, shifts
from raftdiff.rounds import Result

HELD_OUT = ("shapes-rating", "shapes-oracle")
EXPLOITABLE = [{"name": "jpeg"}]
METRICS = ("reward", *HELD_OUT, "diversity")


def alarm(result: Result, settings: EvaluationConfig, held_out: Sequence[str]) -> int | None:
    """The first round at which the verdict on a run, so far, is an alarm."""
    for i, report in enumerate(result.reports[1:], start=2):
        if run_verdict(settings, result.reports[:i], held_out).alarm:
            return report.round
    return None


def lost(result: Result, round: int) -> float:
    """Of the true rating, 1 to 10, up to a round."""
    return -result.reports[round].evaluations[0].gains["shapes-rating"].mean


def show(title: str, result: Result) -> None:
    base = result.reports[0].evaluations[0]
    rows = []
    for report in result.reports:
        found = report.evaluations[0]
        moved = shifts(base, found)
        name = max(moved, key=lambda name: abs(moved[name]), default="")
        means = [f"{found.metrics[metric].mean:.3f}" for metric in METRICS]
        rows.append([str(report.round), *means, f"{name} {moved[name]:+.2f}" if report.round else ""])
    table(f"\n{title}; means on held-out prompts", ["round", *METRICS, "largest shift"], rows)
    console.print(result.verdict.message, highlight=False, markup=False)


def main() -> None:
    sizes = {"prompts": 32, "candidates": 8, "steps": 16, "held_out": 24, "seeds_per_prompt": 2}
    options = arguments(__doc__ or "", rounds=6, seed=1, most_lost=1.0, **sizes)
    doses = {
        "seed": options.seed,
        "rounds": options.rounds,
        "prompts.per_round": options.prompts,
        "sampling.samples_per_prompt": options.candidates,
        "training.steps": options.steps,
        "training.ema_decay": 0.0,
        "evaluation.every": 1,
        "evaluation.prompts": f"shapes:open/{options.held_out}/32",
        "evaluation.seeds_per_prompt": options.seeds_per_prompt,
        "evaluation.sentinel": "stop",
    }
    config = configured("claims", options.output, "hacking-good", doses)
    hacked = run(configured("claims", options.output, "hacking-jpeg", {**doses, "rewards": EXPLOITABLE}))
    good = run(config)
    show("Trained on the size of the file", hacked)
    show("Trained on the demo's rewards", good)
    settings = config.evaluation
    caught, wrongly = (alarm(result, settings, HELD_OUT) for result in (hacked, good))
    unjudged = [alarm(result, settings, ()) or "none" for result in (hacked, good)]
    console.print(f"Without held-out rewards, first alarm of the two runs: {unjudged}", highlight=False, markup=False)
    loss = lost(hacked, caught or hacked.reports[-1].round)
    verdict(
        "the sentinel",
        caught is not None and loss < options.most_lost and wrongly is None,
        f"the hacked run: first alarm after round {caught}, {loss:.2f} of the true rating lost (at most "
        f"{options.most_lost:g}); the good run: {wrongly or 'none'} in {good.reports[-1].round} rounds",
    )


if __name__ == "__main__":
    main()
