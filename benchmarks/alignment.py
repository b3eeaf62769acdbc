"""Does aligning with CLIP make the model listen? The oracle, which reads the pixels and is never trained on, decides.

The prompts are those where the base does not listen: of the training captions and, apart from them, of the held-out
ones, those that the base draws right in at most half of its pictures. Which ones is decided on pictures from other
seeds than those that are compared.

    python -m benchmarks.alignment
"""

from __future__ import annotations

from benchmarks.common import arguments, compare, configured, console, run, show, table, verdict
from raftdiff.build import build_policy
from raftdiff.pipelines.diffusion import DiffusionPolicy
from raftdiff.pipelines.loading import load_pipeline
from raftdiff.prompts import load_prompts
from raftdiff.shapes.captions import parse
from raftdiff.shapes.oracle import strict

METRICS = ("clip", "shapes-oracle", "shapes-strict", "shapes-rating", "diversity")


TRIES = 4  # pictures by which a caption is judged to be listened to or not


def ignored(source: str, count: int, policy: DiffusionPolicy) -> list[str]:
    """The first `count` captions of `source` that the base draws right in at most half of its tries."""
    prompts = load_prompts(source)
    chosen: list[str] = []
    for start in range(0, len(prompts), 16):
        part = prompts[start : start + 16]
        rows = [prompt for prompt in part for _ in range(TRIES)]
        samples = policy.sample(rows, [10_000 + i for i in range(len(rows))])
        right = [strict(s.image.permute(1, 2, 0).numpy(), parse(s.prompt.text)) for s in samples if s.image is not None]
        for i, prompt in enumerate(part):
            if sum(right[i * TRIES : (i + 1) * TRIES]) <= TRIES / 2:
                chosen.append(prompt.text)
        if len(chosen) >= count:
            break
    return chosen[:count]


def main() -> None:
    options = arguments(__doc__ or "", seeds=[1], prompts=320, held_out=96, preset="shapes-clip")
    base_config = configured(options.preset, options.output, "alignment", {})
    console.print("looking for captions that the base does not listen to")
    policy = build_policy(base_config, load_pipeline(base_config.model))
    held_out = ignored("shapes:single/400/22", options.held_out, policy)
    training = [p for p in ignored("shapes:single/1200/21", options.prompts, policy) if p not in set(held_out)]
    console.print(f"{len(training)} to train on, {len(held_out)} held out")
    aligned, control, base = [], [], []
    for seed in options.seeds:
        for selection, results in (("local", aligned), ("random", control)):
            changes = {
                "seed": seed,
                "algorithm.options": {"selection": selection},
                "prompts.source": training,
                "evaluation.prompts": held_out,
            }
            config = configured(options.preset, options.output, f"alignment-{selection}-{seed}", changes)
            result = run(config)
            results.append(result.reports[-1].evaluations)
        base.append(result.base)
    per_prompt = config.evaluation.seeds_per_prompt
    for i, scale in enumerate(config.evaluation.guidance_scales):
        a, c, b = ([evaluations[i] for evaluations in group] for group in (aligned, control, base))
        rows = [
            [
                metric,
                f"{sum(e.metrics[metric].mean for e in b) / len(b):.3f}",
                show(compare(a, b, metric, per_prompt)),
                show(compare(c, b, metric, per_prompt)),
                show(compare(a, c, metric, per_prompt)),
            ]
            for metric in METRICS
        ]
        table(
            f"\nGuidance {scale:g}, held-out captions that the base does not listen to; mean (95% interval)",
            ["metric", "base", "selected - base", "random - base", "selected - random"],
            rows,
        )
    firsts = [[evaluations[0] for evaluations in group] for group in (aligned, base, control)]
    over_base = compare(firsts[0], firsts[1], "shapes-oracle", per_prompt)
    over_control = compare(firsts[0], firsts[2], "shapes-oracle", per_prompt)
    verdict(
        "CLIP makes it listen",
        over_base.low > 0 and over_control.low > 0,
        f"oracle {show(over_base)} over the base, {show(over_control)} over random selection",
    )


if __name__ == "__main__":
    main()
