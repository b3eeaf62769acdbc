"""M4 (MORLAIF, arXiv 2406.07295): small preference models align a larger generator.

RAFT on the embedded language model, going on with reviews, with a preference model of their tone as the only reward:
one of an eighth of the generator's size, one of its own size. They learn the same simulated feedback. Judged by the
judge without errors on held-out prompts, and by the sentiment reward, which no model saw.

    python -m benchmarks.claims.m4
"""

from __future__ import annotations

from transformers import LlamaForCausalLM

from benchmarks.claims.text_feedback import SHAPES, aligned, backbone, model, reward
from benchmarks.common import arguments, difference, end, gains_table, show, table, verdict
from raftdiff.reward_models.preference import preference_meta
from raftdiff.types import Interval

METRICS = ("true-tone", "true-length", "sentiment", "diversity")


def parameters(output: str, size: str) -> int:
    return sum(p.numel() for p in LlamaForCausalLM.from_pretrained(backbone(output, size)).parameters())


def main() -> None:
    options = arguments(__doc__ or "", noise=0.1)
    output = options.output
    rows, results = [], {}
    for size in SHAPES:
        folder = model(output, "tone", noise=options.noise, size=size)
        found = preference_meta(folder)
        rows.append([size, f"{parameters(output, size):,}", str(found["pairs"]), show(Interval(**found["held_out"]))])
        results[size] = aligned(output, f"m4-{size}", [reward(folder, "tone")])
    table("\nPreference models", ["", "parameters", "pairs", "agrees with held-out labels"], rows)
    gains_table("RAFT on a preference model alone", results, METRICS)
    gain = end(results["small"]).gains["true-tone"]
    less = difference(results["small"], results["own-size"], "true-tone")
    verdict(
        "M4",
        gain.low > 0,
        f"the small one over the base {show(gain)} of 9 grades, less the one of own size {show(less)}",
    )


if __name__ == "__main__":
    main()
