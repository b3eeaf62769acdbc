"""R5 (RAFT, arXiv 2304.06767, section 5): sampled off the resolution it was trained at, the base falls; RAFT on 10
prompts restores the reward on those and on other prompts, with at least 20 times fewer passes than DDPO for the same.

The 10 prompts name every color and shape, the others are combinations that are not among them; the settings of both
methods were chosen on a third set of combinations (docs/log.md). The reward is CLIP, which is what falls. DDPO goes on
until it is where RAFT was at its best, or to 20 times the passes of RAFT. With `--ddpo published` it has the clip range
and rate of its authors' code instead, all steps and guidance.

    python -m benchmarks.claims.r5
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.common import arguments, configured, console, gains_table, run, show, table, verdict
from raftdiff.build import build
from raftdiff.config import load_config
from raftdiff.rounds import Result, evaluate_run, training_passes
from raftdiff.shapes.captions import COLORS, SHAPES
from raftdiff.types import Prompt

METRICS = ("reward", "shapes-oracle", "shapes-rating", "diversity")
TIMES = (1, 2, 4, 6, 8, 12, 16, 20)
RAFT: Mapping[str, Any] = {"training.steps": 10, "training.learning_rate": 1e-3, "sampling.guidance_scale": 1.5}
FIXED: Mapping[str, Any] = {"sampling.guidance_scale": 1.0, "training.steps": None, "training.ema_decay": 0.0}
DDPO: Mapping[str, Mapping[str, Any]] = {
    "tuned": FIXED
    | {
        "algorithm": {"name": "policy-gradient", "options": {"clip": 1e-2, "steps_per_sample": 5}},
        "training.learning_rate": 1e-3,
        "training.batch_size": 64,
    },
    "published": FIXED
    | {
        "algorithm": {"name": "policy-gradient", "options": {"clip": 1e-4}},
        "sampling.guidance_scale": 1.5,
        "training.learning_rate": 3e-4,
        "training.batch_size": 32,
    },
}


def captions() -> tuple[list[str], list[str], list[str]]:
    """To train on, to choose the dose on, to report on."""
    colors, shapes = list(COLORS), list(SHAPES)
    pairs = [(color, shape) for color in colors for shape in shapes]
    trained = [(colors[i % len(colors)], shapes[(i + i // len(colors)) % len(shapes)]) for i in range(10)]
    rest = [pair for pair in pairs if pair not in trained]
    chosen_on = rest[::3]
    reported = [pair for pair in rest if pair not in chosen_on]

    def text(pairs: list[tuple[str, str]]) -> list[str]:
        return [f"{'an' if color[0] in 'aeiou' else 'a'} {color} {shape}" for color, shape in pairs]

    return text(trained), text(chosen_on), text(reported)


def course(result: Result) -> list[tuple[int, float]]:
    """Denoiser passes, evaluations apart, and the reward on the held-out prompts then."""
    reports = result.reports
    return [
        (training_passes(reports[: i + 1]), report.evaluations[0].metrics["reward"].mean)
        for i, report in enumerate(reports)
        if report.evaluations
    ]


def peak(result: Result) -> tuple[int, float]:
    return max(course(result), key=lambda point: point[1])


def reached(result: Result, reward: float) -> int | None:
    """Passes until the held-out reward was first as high."""
    return next((passes for passes, mean in course(result) if mean >= reward), None)


def main() -> None:
    options = arguments(__doc__ or "", size=48, seed=1, rounds=6, ddpo="tuned", preset="claims")
    trained, _, reported = captions()
    shared = {
        "seed": options.seed,
        "model.scheduler": "DDIMScheduler",  # whose steps DDPO can make random
        "prompts.source": trained,
        "prompts.per_round": None,
        "sampling.samples_per_prompt": 10,
        "evaluation.guidance_scales": [1.5],
        "evaluation.prompts": reported,
        "evaluation.seeds_per_prompt": 12,
        "evaluation.every": 1,
        "rewards": [{"name": "clip", "options": {"model": "shapes"}}],
        "combine": "sum",
    }
    small = {"rounds": 1, "training.steps": 1, "sampling.samples_per_prompt": 2}
    native = run(configured(options.preset, options.output, "r5-native", shared | RAFT | small))
    off = shared | {"model.height": options.size, "model.width": options.size}
    raft = run(configured(options.preset, options.output, "r5-raft", off | RAFT | {"rounds": options.rounds}))
    spent, (by_raft, best) = training_passes(raft.reports), peak(raft)
    ddpo_settings = off | DDPO[options.ddpo] | {"rounds": 1000, "evaluation.every": 4}
    for times in TIMES:
        name = f"r5-ddpo-{options.ddpo}"
        ddpo = run(configured(options.preset, options.output, name, ddpo_settings | {"budget": times * spent}))
        if reached(ddpo, best) is not None:
            break
    base = [native.base[0], raft.base[0]]
    table(
        f"\nThe base on the other prompts, at 32 and at {options.size} pixels",
        ["", "at 32", f"at {options.size}"],
        [[m, *(f"{e.metrics[m].mean:.3f}" for e in base)] for m in METRICS],
    )
    gains_table(f"{options.size} pixels, 9 other prompts, at the end", {"RAFT": raft, "DDPO": ddpo}, METRICS)
    for label, result in (("RAFT", raft), ("DDPO", ddpo)):
        points = [f"{passes:,}: {mean:.1f}" for passes, mean in course(result)]
        console.print(f"{label}, reward after so many passes: {', '.join(points)}", highlight=False)
    own = build(load_config(raft.folder / "config.yaml"))
    _, on_trained = evaluate_run(replace(own, held_out=[Prompt(text=text) for text in trained]))
    falls = base[1].metrics["reward"].mean < base[0].metrics["reward"].mean
    restored = {"the 10 prompts": on_trained[0].gains["reward"], "9 others": raft.aligned[0].gains["reward"]}
    by_ddpo = reached(ddpo, best)
    ratio = (by_ddpo or training_passes(ddpo.reports)) / by_raft
    verdict(
        "R5",
        falls and all(gain.low > 0 for gain in restored.values()) and ratio >= 20,
        f"the base falls: {falls}; restored: "
        + "; ".join(f"{label} {show(gain)}" for label, gain in restored.items())
        + f". RAFT is at its best, {best:.2f}, after {by_raft:,} passes, DDPO ({options.ddpo}) "
        + (f"there after {by_ddpo:,}: " if by_ddpo else f"at {peak(ddpo)[1]:.2f} at most after ")
        + ("" if by_ddpo else f"{training_passes(ddpo.reports):,}: more than ")
        + f"{ratio:.1f} times as many",
    )


if __name__ == "__main__":
    main()
