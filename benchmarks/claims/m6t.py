"""M6 (MORLAIF, arXiv 2406.07295) for texts: a planted useless principle gets a weight near 0, an anti-aligned one a
negative one.

Simulated feedback on reviews by the embedded language model, wrong in a fifth of the pairs. The anti-aligned principle
is tone turned round, in place of it; of the useless one the labels are tossed, several times.

    python -m benchmarks.claims.m6t
"""

from __future__ import annotations

from benchmarks.claims.feedback_runs import EQUAL
from benchmarks.claims.text_feedback import LABELS, model, several, weights
from benchmarks.common import arguments, show, table, verdict
from raftdiff.evaluation import paired_interval
from raftdiff.preferences import Weight

TURNED = "less-tone"
TOSSED = 0.5  # the noise that leaves nothing of a label
COINS = 8


def shown(weight: Weight) -> list[str]:
    return [weight.name, f"{weight.weight:+.2f} ({weight.low:+.2f} to {weight.high:+.2f})"]


def main() -> None:
    options = arguments(__doc__ or "")
    output, models = options.output, several(options.output, EQUAL)
    turned = model(output, TURNED, noise=EQUAL.noise, count=LABELS, judge_seed=1)
    in_place = weights(output, {TURNED: turned, "length": models["length"]}, EQUAL)
    coins = [
        weights(output, models | {"coin": model(output, "coin", noise=TOSSED, count=LABELS, judge_seed=toss)}, EQUAL)[
            -1
        ]
        for toss in range(1, 1 + COINS)
    ]
    title = "\nWeights in overall preferences, in nats for a deviation (95% interval)"
    rows = [*map(shown, weights(output, models, EQUAL)), *map(shown, in_place), *map(shown, coins)]
    table(title, ["", "weight"], rows)
    mean = paired_interval([coin.weight for coin in coins])
    verdict(
        "M6T",
        mean.low < 0 < mean.high and in_place[0].high < 0,
        f"The {COINS} coins {show(mean, 2)}, tone turned round {shown(in_place[0])[1]}",
    )


if __name__ == "__main__":
    main()
