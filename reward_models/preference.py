"""Preference models: what one principle's labels teach, as a reward (MORLAIF, arXiv:2406.07295).

On pictures a small head on frozen CLIP embeddings of picture and prompt; on text a language model with one output.
`raftdiff preference train` makes them: a folder with the weights (safetensors) and a manifest that says what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from raftdiff.checkpoint import read_meta, verify
from raftdiff.config import Dtype
from raftdiff.errors import WeightsError
from raftdiff.protocols import Modality
from raftdiff.types import Sample

from . import images
from .encoders import ClipEncoder, clip_encoder
from .reward_model import RewardModel

HEAD = "head.safetensors"


class PreferenceHead(torch.nn.Module):
    """A score of a picture for its prompt, from their normalized embeddings v and t: an MLP of one hidden layer on v
    and v * t, each number standardized over the pictures that it was trained on."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, width: int, hidden: int) -> None:
        """`width` is that of an embedding."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(2 * width))
        self.register_buffer("deviation", torch.ones(2 * width))
        self.hidden = torch.nn.Linear(2 * width, hidden)
        self.output = torch.nn.Linear(hidden, 1, bias=False)  # a constant cancels out in every pair

    def forward(self, feature_BD: torch.Tensor) -> torch.Tensor:
        """float32 [B] from `features`."""
        standardized_BD = (feature_BD - self.mean) / self.deviation
        return self.output(torch.nn.functional.gelu(self.hidden(standardized_BD)))[:, 0]


def features(encoder: ClipEncoder, samples: Sequence[Sample], batch_size: int = 32) -> torch.Tensor:
    """v and v * t of each sample, float32 [B, 2 D]."""
    v_BD = encoder.image_features([images.pixels(sample) for sample in samples], batch_size=batch_size)
    t_BD = encoder.text_features([sample.prompt.text for sample in samples], batch_size=batch_size)
    return torch.cat([v_BD, v_BD * t_BD], dim=1)


class PreferenceReward:
    """How much a judge would prefer the sample under one principle: a preference model by `raftdiff preference train`.

    Scores are calibrated: their differences are log-odds, in nats, of being preferred to another sample of the same
    prompt, and their mean over the samples that the model was trained on is 0.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: Dtype = "fp32",
        batch_size: int = 32,
        name: str | None = None,
    ) -> None:
        """`path` is the folder, such as `runs/demo/preference/composition`.

        Raises:
            WeightsError: it holds no preference model, or one that is damaged.
        """
        folder = Path(path).expanduser()
        self.meta = preference_meta(folder)
        self.modality: Modality = self.meta["principle"]["modality"]
        self.name = name or self.meta["principle"]["name"]
        self.weights_from = str(folder)
        load = _head if self.modality == "image" else _language_model
        self._raw = load(folder, self.meta, device=device, dtype=dtype, batch_size=batch_size)

    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B], nats."""
        if not samples:
            return torch.empty(0)
        return self.meta["scale"] * (self._raw(samples) - self.meta["mean"])


def preference_meta(folder: Path) -> dict[str, Any]:
    """What a preference model's manifest says of it.

    Raises:
        WeightsError: the folder holds none, or it is damaged.
    """
    if reason := verify(folder):
        raise WeightsError(f"{folder} holds no preference model: {reason}; `raftdiff preference train` makes one")
    meta = read_meta(folder)
    if "principle" not in meta or "scale" not in meta:
        raise WeightsError(f"{folder} holds no preference model: its manifest names no principle")
    return meta


Score = Callable[[Sequence[Sample]], torch.Tensor]


def _head(folder: Path, meta: dict[str, Any], *, device: str, dtype: Dtype, batch_size: int) -> Score:
    encoder = clip_encoder(**meta["encoder"], device=device, dtype=dtype)
    try:
        state = load_file(folder / HEAD)
        hidden, doubled = state["hidden.weight"].shape
        head = PreferenceHead(doubled // 2, hidden)
        head.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{folder / HEAD} is no preference head: {error}") from error
    if doubled != 2 * encoder.width:
        raise WeightsError(
            f"{folder} reads embeddings of {doubled // 2} numbers, and {meta['encoder']['model']} gives"
            f" {encoder.width}; use the CLIP that it was trained on"
        )

    @torch.no_grad()
    def score(samples: Sequence[Sample]) -> torch.Tensor:
        return head(features(encoder, samples, batch_size))

    return score


def _language_model(folder: Path, meta: dict[str, Any], *, device: str, dtype: Dtype, batch_size: int) -> Score:
    return RewardModel(folder, device=device, dtype=dtype, batch_size=batch_size).score
