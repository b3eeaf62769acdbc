"""R5 (RAFT, arXiv 2304.06767, section 5): sampled off the resolution it was trained at, the base falls; RAFT on a few
prompts restores the reward on those and on other prompts.

The comparison of cost with DDPO is no part of this file.

    python -m benchmarks.claims.r5
"""

from __future__ import annotations

from benchmarks.common import arguments, configured, run, show, table, verdict

METRICS = ("reward", "clip", "shapes-oracle", "shapes-rating", "diversity")


def main() -> None:
    options = arguments(__doc__ or "", size=48, seed=1, preset="claims")
    bare = [
        f"a {color} {shape}" for color in ("red", "green", "blue", "yellow", "purple") for shape in ("circle", "square")
    ]
    own = {
        "prompts.source": bare,
        "prompts.per_round": None,
        "sampling.samples_per_prompt": 10,
        "rounds": 6,
        "seed": options.seed,
    }
    at_size = own | {"model.height": options.size, "model.width": options.size}
    others = [
        f"{'an' if color == 'orange' else 'a'} {color} {shape}"
        for color in ("red", "green", "blue", "orange")
        for shape in ("triangle", "cross")
    ]
    rows, restored, fallen = [], {}, {}
    for label, held_out in (("the 10 training prompts", None), ("8 other prompts", others)):
        changes = {"evaluation.prompts": held_out, "evaluation.seeds_per_prompt": 12}
        name = "same" if held_out is None else "other"
        native = run(configured(options.preset, options.output, f"r5-native-{name}", own | changes | {"rounds": 1}))
        off = run(configured(options.preset, options.output, f"r5-{options.size}-{name}", at_size | changes))
        base, aligned = off.base[0], off.reports[-1].evaluations[0]
        restored[label], fallen[label] = aligned.gains, base
        for metric in METRICS[1:]:
            at_native = native.base[0].metrics[metric]
            rows.append(
                [
                    label,
                    metric,
                    f"{at_native.mean:.3f}",
                    f"{base.metrics[metric].mean:.3f}",
                    f"{aligned.metrics[metric].mean:.3f}",
                    show(aligned.gains[metric]),
                ]
            )
        fallen[label] = native.base[0].metrics["clip"].mean - base.metrics["clip"].mean
    table(
        f"\n{options.size} pixels; the base was trained at 32",
        ["prompts", "metric", "base at 32", f"base at {options.size}", "aligned", "gain (95% interval)"],
        rows,
    )
    falls = all(value > 0 for value in fallen.values())
    gains = {label: gain["reward"] for label, gain in restored.items()}
    verdict(
        "R5",
        falls and all(gain.low > 0 for gain in gains.values()),
        f"the base falls: {falls}; trained reward restored: "
        + "; ".join(f"{label} {show(gain)}" for label, gain in gains.items()),
    )


if __name__ == "__main__":
    main()
