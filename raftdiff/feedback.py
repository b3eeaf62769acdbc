"""AI feedback on the samples of a run (MORLAIF, arXiv:2406.07295): labels by principle, a preference model from the
labels of each, and what each of these weighs in overall preferences.

    RUN/feedback/NAME/about.json            the judge and its options, the principles
    RUN/feedback/NAME/<principle>-00000.parquet, and ledger.jsonl where the judge counts what it takes
    RUN/preference/<principle>/             a preference model, for the reward `preference`
    RUN/preference/weights.yaml
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from rich.table import Table

from .checkpoint import RunLock, write_file
from .errors import ConfigError, DataError, ScoringError
from .preferences import Preference, Weight, accuracy, cross_validated, objective_weights, split_by_prompt
from .principles import Principle
from .prompts import sample_seed
from .registry import nearest
from .reward_models.judge import Judge
from .reward_models.preference import PreferenceReward
from .reward_models.preference_training import (
    HEAD_FIT,
    TEXT_FIT,
    Fitted,
    differences,
    train_picture_model,
    train_text_model,
)
from .store import SampleStore, read_parts, write_table
from .types import Interval, Sample

logger = logging.getLogger(__name__)

LABELS = pa.schema(
    {
        "sample_a": pa.string(),
        "sample_b": pa.string(),
        "preference": pa.float64(),  # 1: a is better, 0: b is, 0.5: a tie, null: no valid answer
        "margin": pa.float64(),  # nats; 0 where the judge gives no probabilities
        "forward": pa.float64(),  # log-odds that a is better with a shown first, and below with b first
        "backward": pa.float64(),
    }
)
MAX_MISSING = 0.25
OPENAI_CLIP = {"model": "ViT-L-14-quickgelu", "pretrained": "openai"}
PAIRS_AT_ONCE = 32

NEVER: dict[str, Any] = {"preference": None}

Pair = tuple[Sample, Sample]
Progress = Callable[[str, int, int], None]
"""Called after each part with the principle, the pairs done and the pairs in all."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What became of the pairs under one principle.

    Tally(principle="color", pairs=128, decided=80, ties=46, missing=2)
    """

    principle: str
    pairs: int
    decided: int
    ties: int
    missing: int


class Feedback:
    """The labels of one judge on pairs of a run's samples, in RUN/feedback/NAME."""

    def __init__(self, run_folder: Path, name: str = "labels") -> None:
        self.folder = run_folder / "feedback" / name
        self.store = SampleStore(run_folder)

    @property
    def about(self) -> dict[str, Any]:
        """The judge, its options and the principles. Raises DataError where there are no labels."""
        try:
            return json.loads((self.folder / "about.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            run, name = self.folder.parents[1], self.folder.name
            raise DataError(
                f"{self.folder} holds no labels; `raftdiff feedback {run} --name {name} ...` makes them"
            ) from None

    @property
    def principles(self) -> list[Principle]:
        return [Principle(name=name, **rest) for name, rest in self.about["principles"].items()]

    def begin(self, judge: str, options: Mapping[str, Any], principles: Sequence[Principle]) -> None:
        """Note who judges by what.

        Raises:
            ConfigError: the labels that are there are of another judge, or a principle had another wording.
        """
        about = self.about if (self.folder / "about.json").exists() else {}
        now: dict[str, Any] = json.loads(json.dumps({"judge": judge, "options": dict(options)}))
        for key, value in now.items():
            if about.get(key, value) != value:
                raise ConfigError(
                    f"the labels in {self.folder} are of another judge ({key}: {about[key]}, now {value}); give these"
                    " another --name"
                )
        known = about.get("principles", {})
        for principle in principles:
            wording = principle.model_dump(exclude={"name"})
            if known.setdefault(principle.name, wording) != wording:
                raise ConfigError(
                    f"the labels in {self.folder} are of another {principle.name!r} ({known[principle.name]}); give"
                    " these another --name"
                )
        write_file(self.folder / "about.json", json.dumps(now | {"principles": known}, indent=2).encode())

    def pairs(self, *, per_prompt: int, rounds: Sequence[int] | None = None, seed: int = 0) -> list[Pair]:
        """Up to `per_prompt` pairs of the samples of each prompt in each round (in all, if None); the same for the
        same seed, and with more of them the first are the same.

        Raises:
            DataError: there are none.
        """
        found: list[Pair] = []
        for round in self.store.rounds() if rounds is None else rounds:
            of_prompt: dict[str, list[Sample]] = {}
            for sample in self._samples(round):
                of_prompt.setdefault(sample.prompt.id, []).append(sample)
            for prompt, samples in of_prompt.items():
                pairs = list(combinations(samples, 2))
                order = np.random.default_rng(sample_seed(seed, round, prompt, 0)).permutation(len(pairs))
                found += [pairs[i] for i in order[:per_prompt]]
        if not found:
            raise DataError(
                f"{self.store.samples_folder} holds no two samples of one prompt; `raftdiff train` draws them"
            )
        return found

    def label(
        self, judge: Judge, principle: Principle, pairs: Sequence[Pair], *, progress: Progress | None = None
    ) -> Tally:
        """Ask the judge about the pairs that have no valid label yet, part by part, and keep what it says.

        Raises:
            ConfigError, ScoringError: the judge cannot be asked at all, or more than the share MAX_MISSING of its
                answers are not valid; what was labeled stays.
        """
        known = self.labels(principle.name)
        asked = [pair for pair in pairs if known.get(_key(pair), NEVER)["preference"] is None]
        first_part, missing = self._next_part(principle.name), 0
        for i, start in enumerate(range(0, len(asked), PAIRS_AT_ONCE)):
            batch = asked[start : start + PAIRS_AT_ONCE]
            rows = [
                {
                    "sample_a": a.id,
                    "sample_b": b.id,
                    "preference": found.preference,
                    "margin": found.margin if found.preference is not None else None,
                    "forward": found.forward,
                    "backward": found.backward,
                }
                for (a, b), found in zip(batch, judge.compare(batch, principle), strict=True)
            ]
            write_table(self.folder / f"{principle.name}-{first_part + i:05d}.parquet", rows, LABELS)
            missing += sum(row["preference"] is None for row in rows)
            done = start + len(batch)
            if missing > MAX_MISSING * done:
                raise ScoringError(
                    f"the judge gave no valid answer for {missing} of {done} pairs (principle {principle.name}); at"
                    f" most the share {MAX_MISSING} may be missing: try another model or other options"
                )
            if progress is not None:
                progress(principle.name, done, len(asked))
        return self._tally(principle.name, pairs)

    def note(self, judge: Judge) -> None:
        """Add a line to ledger.jsonl: what the judge took, where it keeps count."""
        usage = getattr(judge, "usage", None)
        if usage is not None:
            path = self.folder / "ledger.jsonl"
            before = path.read_bytes() if path.exists() else b""
            line = {"at": datetime.now().astimezone().isoformat(timespec="seconds")} | asdict(usage)
            write_file(path, before + json.dumps(line).encode() + b"\n")

    def preferences(self, principle: str) -> list[Preference]:
        """The labeled pairs of which one is preferred; ties are left out."""
        rows = [row for row in self.labels(principle).values() if row["preference"] in (0.0, 1.0)]
        samples = {sample.id: sample for round in self.store.rounds() for sample in self._samples(round)}
        found = []
        for row in rows:
            a, b = samples.get(row["sample_a"]), samples.get(row["sample_b"])
            if a is not None and b is not None:
                chosen, rejected = (a, b) if row["preference"] else (b, a)
                found.append(Preference(chosen=chosen, rejected=rejected, margin=row["margin"]))
        return found

    def labels(self, principle: str) -> dict[tuple[str, str], dict[str, Any]]:
        """Ids of the pair to the row of its last valid label, or of a missing one where there is no other."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for name, _, table in read_parts(self.folder, f"{principle}-*.parquet"):
            for row in table.to_pylist() if name == principle else ():
                key = row["sample_a"], row["sample_b"]
                if row["preference"] is not None or key not in found:
                    found[key] = row
        return found

    def _samples(self, round: int) -> list[Sample]:
        """What can be judged of a round, without what only training reads."""
        samples = self.store.read_samples(round)
        return [replace(s, latents=None, trajectory=None, completion=None) for s in samples if s.flaw is None]

    def _next_part(self, principle: str) -> int:
        """The number from which on no part of the principle's labels has been written, not even a damaged one."""
        stems = [path.stem.rpartition("-") for path in self.folder.glob(f"{principle}-*.parquet")]
        taken = [int(number) for name, _, number in stems if name == principle and number.isdecimal()]
        return 1 + max(taken, default=-1)

    def _tally(self, principle: str, pairs: Sequence[Pair]) -> Tally:
        known = self.labels(principle)
        found = [known.get(_key(pair), NEVER)["preference"] for pair in pairs]
        ties, missing = found.count(0.5), found.count(None)
        return Tally(
            principle=principle, pairs=len(pairs), decided=len(pairs) - ties - missing, ties=ties, missing=missing
        )


def _key(pair: Pair) -> tuple[str, str]:
    return pair[0].id, pair[1].id


def label_run(
    run_folder: Path,
    judge: Judge,
    principles: Sequence[Principle],
    *,
    made_of: tuple[str, Mapping[str, Any]],
    name: str = "labels",
    per_prompt: int = 4,
    rounds: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Tally]:
    """Label pairs of a run's samples under each principle. What is labeled already is not asked about again.

    Args:
        made_of: the registered name and the options of the judge, which are kept beside the labels.

    Raises:
        ConfigError, DataError, ScoringError: as `Feedback.begin`, `pairs` and `label`.
        RunLockedError: another process is labeling here.
    """
    feedback = Feedback(run_folder, name)
    pairs = feedback.pairs(per_prompt=per_prompt, rounds=rounds, seed=seed)
    _check_modality(pairs[0][0], principles)
    with RunLock(feedback.folder):
        feedback.begin(*made_of, principles)
        try:
            return [feedback.label(judge, principle, pairs, progress=progress) for principle in principles]
        finally:
            feedback.note(judge)


def _check_modality(sample: Sample, principles: Sequence[Principle]) -> None:
    has = "text" if sample.image is None else "image"
    if wrong := [principle.name for principle in principles if principle.modality != has]:
        raise ConfigError(f"the run's samples are of the modality {has}, and {', '.join(wrong)} are not: --principles")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What preference models are made of.

    Choice(model="ViT-L-14-quickgelu", pretrained="openai")
    Choice(model="Qwen/Qwen2.5-0.5B-Instruct", lora_rank=16, fit={"epochs": 2})
    """

    model: str | None = None
    """For pictures a CLIP as for `clip_encoder`, OpenAI's ViT-L/14 if absent; for text a language model."""
    pretrained: str | None = None
    """The weights of a CLIP that open_clip knows by name."""
    hidden: int = 64
    """Width of the hidden layer on CLIP embeddings."""
    lora_rank: int = 0
    """Of a LoRA on the language model; 0 trains all its weights."""
    fit: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Fit`, where they shall not be as HEAD_FIT or TEXT_FIT has them."""
    device: str = "cpu"


def train_models(
    run_folder: Path, choice: Choice, *, name: str = "labels", principles: Sequence[str] = ()
) -> list[Fitted]:
    """A preference model of each principle, in RUN/preference; of all that have labels, if none are named. One whose
    pairs are all ties has no model, which is logged.

    Raises:
        ConfigError: a principle without labels.
        DataError: there are no labels, or not of two prompts.
        WeightsError: the model to begin at cannot be loaded.
    """
    feedback = Feedback(run_folder, name)
    about = feedback.about
    known = {principle.name: principle for principle in feedback.principles}
    for wanted in principles:
        if wanted not in known:
            raise ConfigError(f"{feedback.folder} has no labels by {wanted!r}{nearest(wanted, known)}")
    origin = {"feedback": name, "judge": about["judge"], "options": about["options"]}
    fitted = []
    for principle in principles or known:
        if preferences := feedback.preferences(principle):
            folder = model_folder(run_folder, principle)
            fitted.append(_train(preferences, known[principle], folder, choice, origin))
        else:
            logger.warning("no pair is preferred under %s: it gets no model", principle)
    if not fitted:
        raise DataError(f"in {feedback.folder} no pair is preferred under any principle; label more pairs")
    return fitted


def _train(
    preferences: Sequence[Preference], principle: Principle, folder: Path, choice: Choice, origin: Mapping[str, Any]
) -> Fitted:
    if principle.modality == "text":
        if choice.model is None:
            raise ConfigError("a preference model of texts begins at a language model: name it with --model")
        return train_text_model(
            preferences,
            principle,
            folder,
            model=choice.model,
            lora_rank=choice.lora_rank,
            fit=replace(TEXT_FIT, **choice.fit),
            device=choice.device,
            origin=origin,
        )
    return train_picture_model(
        preferences,
        principle,
        folder,
        encoder={"model": choice.model, "pretrained": choice.pretrained} if choice.model else OPENAI_CLIP,
        hidden=choice.hidden,
        fit=replace(HEAD_FIT, **choice.fit),
        device=choice.device,
        origin=origin,
    )


def model_folder(run_folder: Path, principle: str) -> Path:
    """Where the preference model of a principle lies."""
    return run_folder / "preference" / principle


@dataclass(frozen=True, kw_only=True)
class Weighing:
    """What the principles weigh in overall preferences, and how well their scores predict these.

    Weighing(overall="overall", weights=[Weight(...)], pairs=400, combined=Interval(...), alone={"color": ...})
    """

    overall: str
    weights: list[Weight]
    pairs: int
    """That the weights were fitted to."""
    combined: Interval
    """How often the weighted sum prefers the right one, by cross-validation over the prompts."""
    alone: Mapping[str, Interval]
    """The same of each model alone, that of the overall labels among them where there is one."""


def weigh(run_folder: Path, *, name: str = "labels", overall: str = "overall", device: str = "cpu") -> Weighing:
    """The weight of each preference model of a run in overall preferences; also kept in RUN/preference/weights.yaml.

    They are fitted on the prompts that the models held out, where their scores are as good as they will be in use, and
    measured by cross-validation over these.

    Raises:
        DataError: no overall labels, no preference models, or too few pairs for finite weights.
        WeightsError: a preference model that is damaged.
    """
    preferences = Feedback(run_folder, name).preferences(overall)
    if not preferences:
        raise DataError(f"no pair of {run_folder} has an overall preference: label the principle {overall!r} too")
    folders = sorted(path.parent for path in (run_folder / "preference").glob("*/manifest.json"))
    models = {folder.name: PreferenceReward(folder, device=device) for folder in folders}
    names = [name for name in models if name != overall]
    if not names:
        raise DataError(f"{run_folder} has no preference models; `raftdiff preference train {run_folder}` makes them")
    (share, seed), *others = {(model.meta["fit"]["held_out"], model.meta["fit"]["seed"]) for model in models.values()}
    if others:
        raise DataError(f"the preference models of {run_folder} held out different prompts; train them again together")
    _, held_out = split_by_prompt(preferences, share, seed)
    of_model = {name: differences(model.score, held_out) for name, model in models.items()}
    difference_NR = np.stack([of_model[name] for name in names], axis=1)
    prompts = [p.chosen.prompt.id for p in held_out]
    found = Weighing(
        overall=overall,
        weights=objective_weights(names, difference_NR),
        pairs=len(held_out),
        combined=accuracy(cross_validated(names, difference_NR, prompts)),
        alone={name: accuracy(difference_N) for name, difference_N in of_model.items()},
    )
    text = yaml.safe_dump(_as_yaml(found, run_folder), sort_keys=False)
    write_file(run_folder / "preference" / "weights.yaml", text.encode())
    return found


def _as_yaml(found: Weighing, run_folder: Path) -> dict[str, Any]:
    """The weights, and below them the `rewards` of a run that is trained on them."""
    return {
        "overall": found.overall,
        "pairs": found.pairs,
        "accuracy": asdict(found.combined),
        "weights": {weight.name: asdict(weight) | {"raw": weight.raw} for weight in found.weights},
        "rewards": [
            {
                "name": "preference",
                "label": weight.name,
                "weight": round(weight.weight, 4),
                "options": {"path": str(model_folder(run_folder, weight.name))},
            }
            for weight in found.weights
        ],
    }


def tally_table(tallies: Sequence[Tally]) -> Table:
    table = Table("principle", "pairs", "decided", "ties", "no answer", box=None, pad_edge=False)
    for tally in tallies:
        table.add_row(tally.principle, *map(str, (tally.pairs, tally.decided, tally.ties, tally.missing)))
    return table


def accuracy_table(fitted: Sequence[Fitted]) -> Table:
    table = Table("principle", "trained on", "held-out accuracy", "on", box=None, pad_edge=False)
    for one in fitted:
        table.add_row(one.principle.name, f"{one.pairs} pairs", *_cells(one.accuracy))
    return table


def weight_table(found: Weighing) -> Table:
    table = Table("model", "weight", "accuracy", "on", box=None, pad_edge=False)
    for weight in found.weights:
        shown = f"{weight.weight:+.2f} ({weight.low:+.2f} to {weight.high:+.2f})"
        table.add_row(weight.name, shown, *_cells(found.alone[weight.name]))
    table.add_row("all, by weight", "", *_cells(found.combined))
    if found.overall in found.alone:
        table.add_row(f"{found.overall}, alone", "", *_cells(found.alone[found.overall]))
    return table


def _cells(interval: Interval) -> tuple[str, str]:
    """A share with its interval in percent, and what it is of."""
    mean, low, high = (100 * value for value in (interval.mean, interval.low, interval.high))
    return f"{mean:.1f}% ({low:.1f} to {high:.1f})", f"{interval.count} pairs"
