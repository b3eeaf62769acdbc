"""R5 (RAFT, arXiv 2304.06767, section 5): sampled off the resolution it was trained at, the base falls; RAFT on 10
prompts restores the reward on those and on other prompts, with at least 20 times fewer denoiser passes than DDPO.

The 10 prompts name every color and shape, the others are combinations that are not among them; the dose of RAFT was
chosen on a third set of combinations. The reward is CLIP, which is what falls. DDPO has the settings that were best of
those tried (docs/policy-gradient.md), and gets up to 20 times the passes of RAFT, or as many as it needs to reach it.

    python -m benchmarks.claims.r5
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.common import arguments, configured, gains_table, run, show, table, verdict
from raftdiff.build import build
from raftdiff.config import load_config
from raftdiff.rounds import Result, evaluate_run, training_passes
from raftdiff.shapes.captions import COLORS, SHAPES
from raftdiff.types import Prompt

METRICS = ("reward", "shapes-oracle", "shapes-rating", "diversity")
TIMES = (1, 2, 5, 10, 20)
RAFT: Mapping[str, Any] = {"training.steps": 20, "sampling.guidance_scale": 1.5}
DDPO: Mapping[str, Any] = {
    "algorithm": {"name": "policy-gradient", "options": {"clip": 1e-2, "steps_per_sample": 5}},
    "sampling.guidance_scale": 1.0,
    "training.learning_rate": 3e-3,
    "training.batch_size": 128,
    "training.steps": None,
    "training.ema_decay": 0.0,
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


def best(result: Result) -> float:
    """The highest reward on the held-out prompts."""
    return max(report.evaluations[0].metrics["reward"].mean for report in result.reports if report.evaluations)


def reached(result: Result, reward: float) -> int | None:
    """Denoiser passes until the held-out reward was first as high, evaluations apart."""
    for i, report in enumerate(result.reports):
        if report.evaluations and report.evaluations[0].metrics["reward"].mean >= reward:
            return training_passes(result.reports[: i + 1])
    return None


def main() -> None:
    options = arguments(__doc__ or "", size=48, seed=1, rounds=4, preset="claims")
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
    spent = training_passes(raft.reports)
    for times in TIMES:
        ddpo_settings = off | DDPO | {"rounds": 1000, "budget": times * spent}
        ddpo = run(configured(options.preset, options.output, "r5-ddpo", ddpo_settings))
        if reached(ddpo, best(raft)) is not None:
            break
    base = [native.base[0], raft.base[0]]
    table(
        f"\nThe base on the other prompts, at 32 and at {options.size} pixels",
        ["", "at 32", f"at {options.size}"],
        [[m, *(f"{e.metrics[m].mean:.3f}" for e in base)] for m in METRICS],
    )
    gains_table(f"{options.size} pixels, 9 other prompts", {"RAFT": raft, "DDPO": ddpo}, METRICS)
    own = build(load_config(raft.folder / "config.yaml"))
    _, on_trained = evaluate_run(replace(own, held_out=[Prompt(text=text) for text in trained]))
    falls = base[1].metrics["reward"].mean < base[0].metrics["reward"].mean
    restored = {"the 10 prompts": on_trained[0].gains["reward"], "9 others": raft.aligned[0].gains["reward"]}
    by_raft, by_ddpo = reached(raft, best(raft)), reached(ddpo, best(raft))
    assert by_raft is not None
    ratio = (by_ddpo or training_passes(ddpo.reports)) / by_raft
    cost = f"RAFT reached its best in {by_raft:,} passes, DDPO " + (
        f"in {by_ddpo:,}, {ratio:.1f} times as many"
        if by_ddpo
        else f"not in {training_passes(ddpo.reports):,}, {ratio:.0f} times as many (it reached {best(ddpo):.2f})"
    )
    verdict(
        "R5",
        falls and all(gain.low > 0 for gain in restored.values()) and ratio >= 20,
        f"the base falls: {falls}; restored: "
        + "; ".join(f"{label} {show(gain)}" for label, gain in restored.items())
        + f". {cost}",
    )


if __name__ == "__main__":
    main()
