"""Simulated feedback on reviews by the embedded language model, and preference models of it, which claims of MORLAIF
(arXiv 2406.07295) on texts share; each is made once.

The judge is the exact oracle behind the interface of a judge, wrong on purpose in a stated share of the pairs. The
preference models have the generator's tokenizer and architecture and begin at random weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from benchmarks.claims.feedback_runs import OVERALL, Judges, Pairs, drawn, fill, judged, label_differences, pairs_of
from benchmarks.claims.text_runs import REVIEWS, base_policy, continuation
from benchmarks.common import configured
from raftdiff.preferences import Preference, Weight, objective_weights
from raftdiff.principles import Principle, load_principles
from raftdiff.reward_models.judge_oracle import MEASURES
from raftdiff.reward_models.preference import PreferenceReward
from raftdiff.reward_models.preference_training import Fit, train_text_model
from raftdiff.rounds import Result
from raftdiff.shapes import WEIGHTS
from raftdiff.store import SampleStore
from raftdiff.types import Sample

GENERATOR = WEIGHTS / "text"
PRINCIPLES = "shapes-text"
NAMES = ("tone", "length")
LABELS = 1280  # of each principle, where nothing else is said
LABELED, WEIGHED, UNSEEN = 1, 2, 3  # rounds of the pool
PROMPTS = {LABELED: REVIEWS, WEIGHED: "shapes-text:continuation/128/9", UNSEEN: "shapes-text:continuation/128/10"}
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


@cache
def pool(output: str) -> Path:
    """A run folder with texts of the base, a round for each part of the prompts; no prompt is in two of them."""
    folder = Path(output) / "text-feedback"
    fill(folder, PROMPTS, CANDIDATES, lambda: base_policy(configured("demo-text", output, folder.name, {})))
    return folder


@cache
def unseen(output: str) -> list[Sample]:
    """What everything is measured on, by prompt, `CANDIDATES` of each."""
    return SampleStore(pool(output)).read_samples(UNSEEN)


@cache
def known(name: str) -> Principle:
    """A principle of the set; `less-tone` is tone turned round, `coin` is a quality that means nothing."""
    if name == "coin":
        return Principle(name=name, modality="text", direction="more", wording="a quality that means nothing")
    (found,) = load_principles([f"{PRINCIPLES}/{name.removeprefix('less-')}"])
    return found.model_copy(update={"direction": "less"}) if name.startswith("less-") else found


@cache
def preferences(output: str, principle: str, noise: float, round: int, judge_seed: int = 0) -> list[Preference | None]:
    """What the judge says of some pairs of each prompt of a round; None for a tie."""
    options = {"noise": noise, "seed": judge_seed}
    return judged(pool(output), known(principle), options, round=round, per_prompt=PAIRS)


def backbone(output: str, size: str) -> Path:
    """The generator's architecture with random weights, in the shape of a size, and its tokenizer."""
    folder = pool(output) / f"backbone-{size}"
    torch.manual_seed(3)
    LlamaForCausalLM(AutoConfig.from_pretrained(GENERATOR, **SHAPES[size])).save_pretrained(folder)
    AutoTokenizer.from_pretrained(GENERATOR).save_pretrained(folder)
    return folder


def model(
    output: str,
    principle: str,
    *,
    noise: float,
    size: str = "small",
    count: int | None = None,
    seed: int = 0,
    rounds: Sequence[int] = (LABELED,),
    judge_seed: int = 0,
) -> Path:
    """The folder of a preference model of so many labels of one principle, or of all there are."""
    folder = pool(output) / "models" / f"{principle}-{size}-noise{noise:g}-{count or 'all'}-{seed}-{judge_seed}"
    if not (folder / "manifest.json").exists():
        labels = [label for round in rounds for label in preferences(output, principle, noise, round, judge_seed)]
        learned = drawn(labels, count or len(labels), seed)
        fit = replace(FIT, seed=seed)
        train_text_model(learned, known(principle), folder, model=str(backbone(output, size)), fit=fit)
    return folder


def several(output: str, judges: Judges, *, count: int = LABELS, seed: int = 0) -> dict[str, Path]:
    """A preference model of each principle."""
    return {name: model(output, name, noise=judges.noise, count=count, seed=seed) for name in NAMES}


def single(output: str, judges: Judges, *, count: int, seed: int = 0) -> Path:
    """One preference model of overall labels."""
    rounds = (LABELED, WEIGHED)
    return model(output, OVERALL, noise=judges.overall_noise, count=count, seed=seed, rounds=rounds)


def overall_labels(output: str, judges: Judges, count: int, seed: int) -> list[Preference]:
    """Overall labels on the prompts that weigh."""
    return drawn(preferences(output, OVERALL, judges.overall_noise, WEIGHED), count, seed)


def weights(
    output: str, models: Mapping[str, Path], judges: Judges, *, count: int = LABELS, seed: int = 0
) -> list[Weight]:
    """What each principle weighs in so many overall labels."""
    labels = overall_labels(output, judges, count, seed)
    return objective_weights(list(models), label_differences(models, labels))


@cache
def scores(output: str, folder: Path) -> np.ndarray:
    """What a preference model says of the unseen texts, [N]."""
    return PreferenceReward(folder).score(unseen(output)).double().numpy()


def weighted(output: str, models: Mapping[str, Path], found: Sequence[Weight]) -> np.ndarray:
    """The weighted sum of the scores of the unseen texts, [N]."""
    return sum((weight.raw * scores(output, models[weight.name]) for weight in found), np.zeros(len(unseen(output))))


@cache
def exact(output: str, name: str) -> np.ndarray:
    """How much of a quality the unseen texts truly have, 0 to 1, [N]."""
    return np.array([MEASURES[name](sample) for sample in unseen(output)])


@cache
def true_pairs(output: str) -> Pairs:
    """All pairs of unseen texts of which one is truly better as a whole."""
    return pairs_of(exact(output, OVERALL), CANDIDATES)


def reward(folder: Path, label: str, weight: float = 1.0) -> dict[str, Any]:
    """A preference model as a reward of a run."""
    return {"name": "preference", "label": label, "weight": weight, "options": {"path": str(folder)}}


def truth(principle: str) -> dict[str, Any]:
    """The exact judge's grade, 1 to 9, as a reward to watch."""
    options = {"principle": f"{PRINCIPLES}/{principle}", "judge": "oracle"}
    return {"name": "judge", "label": f"true-{principle}", "options": options}


def aligned(output: str, name: str, rewards: Sequence[Mapping[str, Any]], combine: str = "sum") -> Result:
    """Four rounds of RAFT on preference models, judged by the exact judge on prompts that no model was trained on."""
    judged = {
        "evaluation.prompts": "shapes-text:continuation/96/8",
        "evaluation.seeds_per_prompt": 4,
        "evaluation.rewards": [*map(truth, (OVERALL, *NAMES)), {"name": "sentiment"}],
        "combine": combine,
    }
    return continuation(output, name, rounds=4, rewards=list(rewards), **judged)
