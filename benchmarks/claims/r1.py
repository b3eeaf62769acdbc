"""R1 (RAFT, arXiv 2304.06767, section 4): the final reward does not fall as K grows, by shrinking steps; K = 1 is flat.

python -m benchmarks.claims.r1
"""

from __future__ import annotations

from itertools import pairwise

from benchmarks.common import arguments, compare, configured, run, show, table, verdict


def main() -> None:
    options = arguments(__doc__ or "", K=[1, 2, 4, 8, 16], seeds=[1], preset="claims")
    evaluations = {}
    for k in options.K:
        for seed in options.seeds:
            changes = {
                "seed": seed,
                "sampling.samples_per_prompt": k,
                # of one sample there is nothing to choose: K = 1 is training on one's own samples
                "algorithm.options": {"selection": "random" if k == 1 else "local"},
            }
            config = configured(options.preset, options.output, f"r1-k{k}-seed{seed}", changes)
            result = run(config)
            evaluations.setdefault(k, []).append(result.reports[-1].evaluations[0])
            evaluations.setdefault(0, [])
            if len(evaluations[0]) < len(evaluations[k]):
                evaluations[0].append(result.base[0])
    per_prompt = config.evaluation.seeds_per_prompt
    metrics = ("reward", "clip", "shapes-oracle", "shapes-rating", "diversity")
    gains = {k: compare(evaluations[k], evaluations[0], "reward", per_prompt) for k in options.K}
    rows = [
        [str(k), *(show(compare(evaluations[k], evaluations[0], metric, per_prompt)) for metric in metrics)]
        for k in options.K
    ]
    table("\nGain over the base on held-out prompts, by K; mean (95% interval)", ["K", *metrics], rows)
    steps = [compare(evaluations[b], evaluations[a], "reward", per_prompt) for a, b in pairwise(options.K)]
    rising = all(step.high > 0 for step in steps)  # no step is down beyond its interval
    flat = gains[options.K[0]].low <= 0 <= gains[options.K[0]].high
    shrinking = steps[-1].mean < max(step.mean for step in steps)
    verdict(
        "R1",
        rising and flat and shrinking,
        f"no step down: {rising}; K = 1 flat: {flat} ({show(gains[options.K[0]])}); the last doubling adds less than "
        f"the best one: {shrinking} ({', '.join(f'{s.mean:+.3f}' for s in steps)})",
    )


if __name__ == "__main__":
    main()
