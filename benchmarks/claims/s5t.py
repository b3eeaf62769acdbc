"""S5 (ReST, arXiv 2308.08998, section 3) for translations: leaving the original data D out of the mixture increases
drift.

D is 768 lines of the careless parallel corpus that the base was trained on. It goes through the same thresholds as the
samples: the global one filters it, a prompt's own percentile keeps the single text of a prompt whatever it is worth.

    python -m benchmarks.claims.s5t
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.claims.text_runs import METRICS, log_ratios, rest, unseen_prompts, written
from benchmarks.common import arguments, difference, drift_difference, gains_table, show, table, verdict
from raftdiff.evaluation import paired_interval
from raftdiff.shapes.texts import corpus

RULES = ("percentile", "global")
THRESHOLDS = (0.5, 0.75, 0.875)


def parallel(path: Path, count: int) -> str:
    """Careless translations, as `data.path` takes them, but of no held-out prompt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held_out = unseen_prompts()
    texts = [text for text in corpus("translation", count, 5) if text.prompt not in held_out]
    lines = [json.dumps({"prompt": text.prompt, "completion": text.completion}) for text in texts]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def main() -> None:
    options = arguments(__doc__ or "", count=768)
    data = {"path": parallel(Path(options.output) / "parallel.jsonl", options.count)}
    rows, further = [], {}
    for rule in RULES:
        name = "g2i3" if rule == "percentile" else f"g2i3-{rule}"
        kept = rest(options.output, f"{name}-data", grows=2, thresholds=THRESHOLDS, rule=rule, data=data)
        without = rest(options.output, name, grows=2, thresholds=THRESHOLDS, rule=rule)
        gains_table(f"Two Grows, three Improve steps, {rule}", {"with D": kept, "without D": without}, METRICS)
        kept_N, without_N = log_ratios(kept), log_ratios(without)
        further[rule] = paired_interval(without_N - kept_N, [sample.prompt.id for sample in written(kept)])
        rows.append(
            [
                rule,
                f"{kept_N.mean():.2f}",
                f"{without_N.mean():.2f}",
                show(further[rule]),
                show(drift_difference(without, kept)),
                show(difference(without, kept, "reward")),
            ]
        )
    columns = ["", "nats with D", "without", "without less with", "share of bigrams that changed", "reward"]
    table("\nDivergence of a text from the base", columns, rows)
    verdict(
        "S5T",
        all(gap.low > 0 for gap in further.values()),
        "divergence without D less with it: " + ", ".join(f"{rule} {show(gap)} nats" for rule, gap in further.items()),
    )


if __name__ == "__main__":
    main()
