"""Pictures, labels, preference models and runs that the claims of MORLAIF (arXiv 2406.07295) share; each is made once.

Feedback is simulated: the judge is the embedded world's exact oracle behind the interface of a judge, wrong on purpose
in a stated share of the pairs. What is learned from it says how the method works, not how good a judge some model is.

Prompts are in three parts: those that the models of the principles are trained on, those whose overall labels weigh
the principles, and those that everything is measured on. One model of overall labels is trained on the first two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import configured, run
from raftdiff.build import build_policy
from raftdiff.errors import DataError
from raftdiff.evaluation import paired_interval
from raftdiff.feedback import Feedback, label_run
from raftdiff.pipelines.loading import load_pipeline
from raftdiff.preferences import Preference, Weight, objective_weights
from raftdiff.principles import Principle, load_principles
from raftdiff.prompts import load_prompts, sample_seed
from raftdiff.reward_models.judge import build_judge
from raftdiff.reward_models.judge_oracle import MEASURES
from raftdiff.reward_models.preference import PreferenceReward
from raftdiff.reward_models.preference_training import HEAD_FIT, differences, train_picture_model
from raftdiff.rounds import Result
from raftdiff.store import SampleStore
from raftdiff.types import Interval, Sample

OVERALL = "overall"
NAMES = ("aesthetic", "background", "color", "count", "placement", "shape")
LABELED, WEIGHED, UNSEEN = 1, 2, 3  # rounds of the pool
PROMPTS = {LABELED: "shapes:all/120/7", WEIGHED: "shapes:all/40/8", UNSEEN: "shapes:all/160/9"}
CANDIDATES = 8
LABELS = 320  # of each principle, where nothing else is said
PAIRS, OVERALL_PAIRS = 4, 14  # labeled of a prompt's 28; seven times LABELS are all the overall ones
SEEDS = (0, 1, 2)
FIT = replace(HEAD_FIT, held_out=0.0)  # of one prompt, the least


@dataclass(frozen=True)
class Judges:
    """How often the simulated judge is wrong: about one principle, and about the whole."""

    name: str
    noise: float
    overall_noise: float


EXACT = Judges("exact", 0.0, 0.0)
EQUAL = Judges("equal noise", 0.2, 0.2)
HARDER = Judges("overall is harder", 0.1, 0.3)


# ------------------------------------------------------------------------------------------------ pictures and labels


@cache
def pool(output: str) -> Path:
    """A run folder with pictures of the base, a round for each part of the prompts; no prompt is in two of them."""
    folder = Path(output) / "feedback-pool"

    def base() -> Any:
        config = configured("claims", output, folder.name, {})
        return build_policy(config, load_pipeline(config.model, "cpu"))

    fill(folder, PROMPTS, CANDIDATES, base)
    return folder


def fill(folder: Path, sources: Mapping[int, str], candidates: int, base: Callable[[], Any]) -> None:
    """Draw what a run folder lacks: for each round so many samples of the base for each prompt of its source that is
    in no earlier round."""
    store = SampleStore(folder)
    missing = [round for round in sources if round not in store.rounds()]
    policy = base() if missing else None
    seen: set[str] = set()
    for round, source in sources.items():
        prompts = [prompt for prompt in load_prompts(source) if prompt.text not in seen]
        seen |= {prompt.text for prompt in prompts}
        if policy is not None and round in missing:
            wanted = [(prompt, k) for prompt in prompts for k in range(candidates)]
            seeds = [sample_seed(0, round, prompt.id, k) for prompt, k in wanted]
            store.write_samples(round, 0, policy.sample([prompt for prompt, _ in wanted], seeds))


@cache
def unseen(output: str) -> list[Sample]:
    """What everything is measured on, by prompt, `CANDIDATES` of each."""
    return SampleStore(pool(output)).read_samples(UNSEEN)


@cache
def exact(output: str, name: str) -> np.ndarray:
    """How much of a quality the unseen pictures truly have, 0 to 1, [N]."""
    return np.array([MEASURES[name](sample) for sample in unseen(output)])


@cache
def principles() -> dict[str, Principle]:
    """Those of the embedded world, `overall` among them."""
    return {principle.name: principle for principle in load_principles(["shapes"])}


@cache
def preferences(
    output: str, principle: Principle, noise: float, round: int, judge_seed: int = 0
) -> list[Preference | None]:
    """What the judge says of some pairs of each prompt of a round; None for a tie."""
    per_prompt = OVERALL_PAIRS if principle.name == OVERALL else PAIRS
    return judged(pool(output), principle, {"noise": noise, "seed": judge_seed}, round=round, per_prompt=per_prompt)


def judged(
    folder: Path, principle: Principle, options: Mapping[str, Any], *, round: int, per_prompt: int
) -> list[Preference | None]:
    """What the judge `oracle` with these options says of so many pairs of each prompt of a round; None for a tie."""
    name = "-".join([principle.direction, principle.name, *(f"{value:g}" for value in options.values())])
    judge, made_of = build_judge("oracle", options), ("oracle", options)
    label_run(folder, judge, [principle], made_of=made_of, name=name, per_prompt=per_prompt, rounds=[round])
    feedback = Feedback(folder, name)
    found = {frozenset((p.chosen.id, p.rejected.id)): p for p in feedback.preferences(principle.name)}
    pairs = feedback.pairs(per_prompt=per_prompt, rounds=[round])
    return [found.get(frozenset((a.id, b.id))) for a, b in pairs]


def drawn(labels: Sequence[Preference | None], count: int, seed: int) -> list[Preference]:
    """So many of the labels, at random; the ties among them are paid for, and say nothing."""
    order = np.random.default_rng(seed).permutation(len(labels))[:count]
    return [label for label in (labels[i] for i in order) if label is not None]


# ------------------------------------------------------------------------------------------------ preference models


@cache
def model(
    output: str,
    principle: Principle,
    noise: float,
    count: int,
    seed: int,
    rounds: tuple[int, ...] = (LABELED,),
    judge_seed: int = 0,
) -> Path:
    """The folder of a preference model of so many labels."""
    name = f"{principle.direction}-{principle.name}-noise{noise:g}-{count}-{seed}"
    name += f"-judge{judge_seed}" if judge_seed else ""
    folder = pool(output) / "models" / name
    if not (folder / "manifest.json").exists():
        labels = [label for round in rounds for label in preferences(output, principle, noise, round, judge_seed)]
        fit = replace(FIT, seed=seed)
        train_picture_model(drawn(labels, count, seed), principle, folder, encoder={"model": "shapes"}, fit=fit)
    return folder


def several(output: str, judges: Judges, *, count: int = LABELS, seed: int = 0) -> dict[str, Path]:
    """A preference model of each principle but those whose pairs are nearly all ties."""
    found = {}
    for name in NAMES:
        with suppress(DataError):
            found[name] = model(output, principles()[name], judges.noise, count, seed)
    return found


def single(output: str, judges: Judges, *, count: int, seed: int = 0) -> Path:
    """One preference model of overall labels."""
    return model(output, principles()[OVERALL], judges.overall_noise, count, seed, (LABELED, WEIGHED))


@cache
def scores(output: str, folder: Path) -> np.ndarray:
    """What a preference model says of the unseen pictures, [N]."""
    return PreferenceReward(folder).score(unseen(output)).double().numpy()


@cache
def overall_labels(output: str, judges: Judges, count: int | None, seed: int) -> list[Preference]:
    """Overall labels on the prompts that weigh, all that there are if `count` is None."""
    labels = preferences(output, principles()[OVERALL], judges.overall_noise, WEIGHED)
    return drawn(labels, count or len(labels), seed)


def weights(
    output: str, models: Mapping[str, Path], judges: Judges, *, count: int | None = None, seed: int = 0
) -> list[Weight]:
    """What each principle weighs in so many overall labels. Raises DataError where they are too few."""
    labels = overall_labels(output, judges, count, seed)
    return objective_weights(list(models), label_differences(models, labels))


def label_differences(models: Mapping[str, Path], labels: Sequence[Preference]) -> np.ndarray:
    """The scores of the preferred one of each pair less those of the other, [N, R]."""
    return np.stack([differences(PreferenceReward(folder).score, labels) for folder in models.values()], axis=1)


# ------------------------------------------------------------------------------------------------ what is measured


@dataclass(frozen=True)
class Pairs:
    """Pairs of samples of one prompt: the one that is truly better, the other, and their prompt, [N] each."""

    better: np.ndarray
    worse: np.ndarray
    prompt: np.ndarray


@cache
def true_pairs(output: str, name: str = OVERALL) -> Pairs:
    """All pairs of unseen pictures of which one is truly better."""
    return pairs_of(exact(output, name), CANDIDATES)


def pairs_of(value_N: np.ndarray, candidates: int) -> Pairs:
    """All pairs of a prompt's samples, so many of each prompt, of which one has the higher value."""
    groups = range(0, len(value_N), candidates)
    i_N, j_N = np.array([pair for g in groups for pair in combinations(range(g, g + candidates), 2)]).T
    first_N = np.where(value_N[i_N] > value_N[j_N], i_N, j_N)
    second_N = i_N + j_N - first_N
    apart_N = np.abs(value_N[first_N] - value_N[second_N]) > 1e-9
    return Pairs(first_N[apart_N], second_N[apart_N], first_N[apart_N] // candidates)


def right(pairs: Pairs, score_N: np.ndarray) -> np.ndarray:
    """Whether the better one has the higher score: 1, or 0, or one half where they are equal."""
    return (np.sign(score_N[pairs.better] - score_N[pairs.worse]) + 1) / 2


def over_prompts(pairs: Pairs, value_N: np.ndarray) -> Interval:
    """The mean with its interval over prompts."""
    return paired_interval(value_N, [str(prompt) for prompt in pairs.prompt])


def weighted(output: str, models: Mapping[str, Path], found: Sequence[Weight]) -> np.ndarray:
    """The weighted sum of the scores of the unseen pictures, [N]."""
    return sum((weight.raw * scores(output, models[weight.name]) for weight in found), np.zeros(len(unseen(output))))


def standing(score_N: np.ndarray) -> np.ndarray:
    """Standardized over the unseen pictures."""
    return (score_N - score_N.mean()) / score_N.std()


def percent(interval: Interval, *, sign: bool = False) -> str:
    shown = "+.1f" if sign else ".1f"
    return f"{100 * interval.mean:{shown}} ({100 * interval.low:{shown}} to {100 * interval.high:{shown}})"


# ------------------------------------------------------------------------------------------------ runs


def reward(folder: Path, label: str, weight: float = 1.0) -> dict[str, Any]:
    """A preference model as a reward of a run."""
    return {"name": "preference", "label": label, "weight": weight, "options": {"path": str(folder)}}


def truth(name: str) -> dict[str, Any]:
    """The exact judge's grade by a principle, 1 to 9, as a reward to watch."""
    return {"name": "judge", "label": f"true-{name}", "options": {"principle": f"shapes/{name}", "judge": "oracle"}}


def trained(output: str, name: str, rewards: Sequence[Mapping[str, Any]], combine: str = "weighted-linear") -> Result:
    """A short run of RAFT on preference models: two rounds, judged by the exact judge on other prompts."""
    settings = {
        "seed": 1,
        "rewards": list(rewards),
        "combine": combine,
        "prompts.source": PROMPTS[LABELED],
        "prompts.per_round": 48,
        "training.steps": 32,
        "training.learning_rate": 6e-4,
        "evaluation.prompts": "shapes:all/48/10",
        "evaluation.seeds_per_prompt": 2,
        "evaluation.rewards": [truth(name) for name in (OVERALL, *NAMES)] + [{"name": "shapes-oracle"}],
    }
    return run(configured("claims", output, f"feedback-{name}", settings))
