"""How preference models are trained: pairs, the Bradley-Terry loss, a share of the prompts held out to measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from raftdiff.checkpoint import publish_folder
from raftdiff.errors import TrainingError
from raftdiff.losses import bradley_terry
from raftdiff.preferences import Preference, accuracy, calibration, split_by_prompt
from raftdiff.principles import Principle
from raftdiff.types import Interval, Sample

from .encoders import clip_encoder
from .preference import HEAD, PreferenceHead, Score, features
from .pretrained import load_tokenizer, read
from .reward_model import RewardModel


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a preference model is fitted.

    Fit(epochs=30, learning_rate=1e-3, batch_size=64)
    """

    epochs: int
    learning_rate: float
    batch_size: int
    weight_decay: float = 1e-2
    margins: bool = True
    """Whether the judge's margins count."""
    held_out: float = 0.25
    """Share of the prompts that is held out."""
    seed: int = 0


HEAD_FIT = Fit(epochs=30, learning_rate=1e-3, batch_size=64)
TEXT_FIT = Fit(epochs=1, learning_rate=1e-4, batch_size=16)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A preference model that was trained, and what it was measured to be.

    Fitted(principle=Principle(...), pairs=512, accuracy=Interval(...), train_accuracy=Interval(...), scale=1.3,
           mean=0.2)
    """

    principle: Principle
    pairs: int
    """That it was trained on."""
    accuracy: Interval
    """On the held-out pairs, with its Wilson interval."""
    train_accuracy: Interval
    scale: float
    """By which differences of its raw scores become log-odds, fitted to the held-out pairs."""
    mean: float
    """Of its raw scores over the samples that it was trained on."""


def train_picture_model(
    preferences: Sequence[Preference],
    principle: Principle,
    folder: Path,
    *,
    encoder: Mapping[str, Any],
    hidden: int = 64,
    fit: Fit = HEAD_FIT,
    device: str = "cpu",
    origin: Mapping[str, Any] | None = None,
) -> Fitted:
    """Train a `PreferenceHead` and publish it in `folder`, as `PreferenceReward` loads it.

    Args:
        encoder: the arguments of `clip_encoder` beside device and dtype.
        origin: what the labels are from, for the manifest.

    Raises:
        DataError: preferences of fewer than two prompts.
        WeightsError: the CLIP cannot be loaded.
        TrainingError: the loss was not finite.
    """
    train, held_out = split_by_prompt(preferences, fit.held_out, fit.seed)
    clip = clip_encoder(**encoder, device=device)
    samples = _samples(preferences)
    row_of = dict(zip((s.id for s in samples), features(clip, samples), strict=True))
    seen = torch.stack([row_of[sample.id] for sample in _samples(train)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed)
        head = PreferenceHead(clip.width, hidden)
    head.mean, head.deviation = seen.mean(dim=0), seen.std(dim=0).clamp(min=1e-6)

    def score(samples: Sequence[Sample]) -> torch.Tensor:
        return head(torch.stack([row_of[sample.id] for sample in samples]))

    optimize(score, list(head.parameters()), train, fit)
    fitted = measure(score, principle, train, held_out)
    meta = _meta(fitted, fit, origin) | {"encoder": dict(encoder), "hidden": hidden}
    with publish_folder(folder, meta=meta) as staging:
        save_file(head.state_dict(), staging / HEAD)
    return fitted


def train_text_model(
    preferences: Sequence[Preference],
    principle: Principle,
    folder: Path,
    *,
    model: str,
    lora_rank: int = 0,
    fit: Fit = TEXT_FIT,
    device: str = "cpu",
    origin: Mapping[str, Any] | None = None,
) -> Fitted:
    """Train a language model with one output and publish it in `folder`, in the format of transformers: both rewards
    `preference` and `reward-model` load it.

    Args:
        model: the language model to begin at, a hub id or a folder.
        lora_rank: of a LoRA on every linear layer, which is merged at the end; 0 trains all weights.
        origin: what the labels are from, for the manifest.

    Raises:
        DataError: preferences of fewer than two prompts.
        WeightsError: the language model cannot be loaded.
        TrainingError: the loss was not finite.
    """
    train, held_out = split_by_prompt(preferences, fit.held_out, fit.seed)
    with TemporaryDirectory() as scratch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed)  # of the new head and of the LoRA
        base = read(AutoModelForSequenceClassification, model, num_labels=1, dtype=torch.float32)
        base.save_pretrained(scratch)
        tokenizer = load_tokenizer(model, embeddings=base.config.get_text_config().vocab_size)
        tokenizer.save_pretrained(scratch)
        del base
        scorer = RewardModel(scratch, device=device, batch_size=fit.batch_size)
        scorer.model.requires_grad_(True)
        if lora_rank:
            lora = LoraConfig(task_type="SEQ_CLS", r=lora_rank, lora_alpha=lora_rank, target_modules="all-linear")
            scorer.model = get_peft_model(scorer.model, lora)
        optimize(scorer.values, [p for p in scorer.model.parameters() if p.requires_grad], train, fit)
        if lora_rank:
            scorer.model = scorer.model.merge_and_unload()
        fitted = measure(scorer.score, principle, train, held_out)
        meta = _meta(fitted, fit, origin) | {"model": model, "lora_rank": lora_rank}
        with publish_folder(folder, meta=meta) as staging:
            scorer.model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
    return fitted


def optimize(score: Score, parameters: list[torch.nn.Parameter], preferences: Sequence[Preference], fit: Fit) -> None:
    """Minimize the Bradley-Terry loss of `score`, which has gradients to `parameters`, by AdamW with a cosine schedule.

    Raises:
        TrainingError: the loss was not finite.
    """
    optimizer = torch.optim.AdamW(parameters, lr=fit.learning_rate, weight_decay=fit.weight_decay)
    generator = torch.Generator().manual_seed(fit.seed)
    batches = [
        [preferences[i] for i in part.tolist()]
        for _ in range(fit.epochs)
        for part in torch.randperm(len(preferences), generator=generator).split(fit.batch_size)
    ]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, len(batches)))
    for batch in batches:
        value_B = score([p.chosen for p in batch] + [p.rejected for p in batch])
        margin_B = torch.tensor([p.margin if fit.margins else 0.0 for p in batch], device=value_B.device)
        chosen_B, rejected_B = value_B.chunk(2)
        loss_B, _ = bradley_terry(chosen_B, rejected_B, margin_B)
        loss = loss_B.mean()
        if not loss.isfinite():
            raise TrainingError("the loss of a preference model is not finite; lower --learning-rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def measure(score: Score, principle: Principle, train: Sequence[Preference], held_out: Sequence[Preference]) -> Fitted:
    """What raw scores are worth on pairs that they were trained on and on others."""
    held_out_N = differences(score, held_out)
    with torch.no_grad():
        mean = score(_samples(train)).mean().item()
    return Fitted(
        principle=principle,
        pairs=len(train),
        accuracy=accuracy(held_out_N),
        train_accuracy=accuracy(differences(score, train)),
        scale=calibration(held_out_N),
        mean=mean,
    )


def differences(score: Score, preferences: Sequence[Preference]) -> np.ndarray:
    """The score of the chosen sample of each pair less that of the other, [N]."""
    with torch.no_grad():
        value_B = score([p.chosen for p in preferences] + [p.rejected for p in preferences])
    chosen_N, rejected_N = value_B.double().cpu().chunk(2)
    return (chosen_N - rejected_N).numpy()


def _samples(preferences: Sequence[Preference]) -> list[Sample]:
    """The samples of the pairs, each once."""
    return list({s.id: s for p in preferences for s in (p.chosen, p.rejected)}.values())


def _meta(fitted: Fitted, fit: Fit, origin: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the manifest says of every preference model."""
    return {
        "principle": fitted.principle.model_dump(),
        "scale": fitted.scale,
        "mean": fitted.mean,
        "pairs": fitted.pairs,
        "held_out": asdict(fitted.accuracy),
        "fit": asdict(fit),
        "labels": dict(origin or {}),
    }
