"""Is it the selection? The demo's run against the same run with random selection, at the same dose, over seeds.

python -m benchmarks.control
"""

from __future__ import annotations

from benchmarks.common import arguments, compare, configured, run, show, table, verdict

METRICS = ("reward", "aesthetic", "clip", "shapes-rating", "shapes-oracle", "diversity")


def main() -> None:
    options = arguments(__doc__ or "", seeds=[1, 2, 3])
    aligned, control, base = [], [], []
    for seed in options.seeds:
        for selection, results in (("local", aligned), ("random", control)):
            changes = {"seed": seed, "algorithm.options": {"selection": selection}}
            config = configured("demo", options.output, f"control-{selection}-{seed}", changes)
            result = run(config)
            results.append(result.reports[-1].evaluations[0])
        base.append(result.base[0])
    per_prompt = config.evaluation.seeds_per_prompt
    rows = [
        [
            metric,
            show(compare(aligned, control, metric, per_prompt)),
            show(compare(aligned, base, metric, per_prompt)),
            show(compare(control, base, metric, per_prompt)),
        ]
        for metric in METRICS
    ]
    table(
        f"\nHeld-out prompts, seeds {options.seeds}, guidance {aligned[0].guidance_scale:g}; mean (95% interval)",
        ["metric", "selected - random", "selected - base", "random - base"],
        rows,
    )
    gain = compare(aligned, control, "reward", per_prompt)
    verdict("the gain over random selection", gain.low > 0, f"trained reward {show(gain)}")


if __name__ == "__main__":
    main()
