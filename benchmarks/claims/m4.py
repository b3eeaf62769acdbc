"""M4 (MORLAIF, arXiv 2406.07295): small preference models align a larger generator.

RAFT on the embedded language model, going on with reviews, with a preference model as the only reward: one of an eighth
of the generator's size, one of its own size, both begun at random weights. They learn the same simulated feedback: the
exact judge's choices between texts of the base, wrong on purpose at a stated rate. Judged by that judge without errors
on held-out prompts, and by the sentiment reward, which no model saw.

    python -m benchmarks.claims.m4
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from benchmarks.claims.text_runs import REVIEWS, base_policy, continuation
from benchmarks.common import arguments, configured, difference, end, gains_table, show, table, verdict
from raftdiff.feedback import Feedback, label_run
from raftdiff.principles import load_principles
from raftdiff.prompts import load_prompts, sample_seed
from raftdiff.reward_models.judge import build_judge
from raftdiff.reward_models.preference import preference_meta
from raftdiff.reward_models.preference_training import Fit, train_text_model
from raftdiff.rounds import Result
from raftdiff.shapes import WEIGHTS
from raftdiff.store import SampleStore
from raftdiff.types import Interval

GENERATOR = WEIGHTS / "text"
PRINCIPLE = "shapes-text/tone"
HELD_OUT = "shapes-text:continuation/96/8"
EXACT = {"name": "judge", "label": "tone", "options": {"principle": PRINCIPLE, "judge": "oracle"}}
METRICS = ("tone", "sentiment", "diversity")
FIT = Fit(epochs=3, learning_rate=1e-3, batch_size=32)
CANDIDATES, PAIRS = 6, 12  # of each prompt
SHAPES: dict[str, dict[str, int]] = {
    "small": {
        "hidden_size": 48,
        "head_dim": 24,
        "intermediate_size": 144,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
    "own-size": {},
}


def untrained(folder: Path, **shape: int) -> Path:
    """The generator's architecture with random weights, in another shape where one is given, and its tokenizer."""
    torch.manual_seed(3)
    LlamaForCausalLM(AutoConfig.from_pretrained(GENERATOR, **shape)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(GENERATOR).save_pretrained(folder)
    return folder


def labelled(run: Path, noise: float) -> Feedback:
    """The judge's choices between texts of the base for the training prompts."""
    store = SampleStore(run)
    if not store.rounds():
        wanted = [(p, k) for p in load_prompts(REVIEWS) for k in range(CANDIDATES)]
        policy = base_policy(configured("demo-text", str(run.parent), run.name, {}))
        store.write_samples(
            1, 0, policy.sample([p for p, _ in wanted], [sample_seed(0, 1, p.id, k) for p, k in wanted])
        )
    options = {"noise": noise}
    judge = build_judge("oracle", options)
    label_run(run, judge, load_principles([PRINCIPLE]), made_of=("oracle", options), per_prompt=PAIRS)
    return Feedback(run)


def parameters(folder: Path) -> int:
    return sum(p.numel() for p in LlamaForCausalLM.from_pretrained(folder).parameters())


def aligned(output: str, name: str, reward: dict[str, Any]) -> Result:
    """Four rounds of RAFT on one reward."""
    judged = {
        "evaluation.prompts": HELD_OUT,
        "evaluation.seeds_per_prompt": 4,
        "evaluation.rewards": [EXACT, {"name": "sentiment"}],
    }
    return continuation(output, f"m4-{name}", rounds=4, rewards=[reward], **judged)


def main() -> None:
    options = arguments(__doc__ or "", noise=0.1)
    output = Path(options.output)
    feedback = labelled(output / "text-m4-labels", options.noise)
    (principle,) = feedback.principles
    preferences = feedback.preferences(principle.name)
    rows, results = [], {}
    for name, shape in SHAPES.items():
        backbone = untrained(output / f"text-m4-backbone-{name}", **shape)
        folder = output / f"text-m4-preference-{name}"
        if not (folder / "manifest.json").exists():
            train_text_model(preferences, principle, folder, model=str(backbone), fit=FIT)
        found = preference_meta(folder)
        rows.append([name, f"{parameters(backbone):,}", str(found["pairs"]), show(Interval(**found["held_out"]))])
        results[name] = aligned(options.output, name, {"name": "preference", "options": {"path": str(folder)}})
    table("\nPreference models", ["", "parameters", "pairs", "agrees with held-out labels"], rows)
    gains_table("RAFT on a preference model alone", results, METRICS)
    gain = end(results["small"]).gains["tone"]
    less = difference(results["small"], results["own-size"], "tone")
    verdict(
        "M4",
        gain.low > 0,
        f"the small one over the base {show(gain)} of 9 grades, less the one of own size {show(less)}",
    )


if __name__ == "__main__":
    main()
