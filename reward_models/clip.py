"""Rewards that are a cosine of the embeddings of picture and prompt: CLIP score (Hessel et al. 2021,
arXiv:2104.08718), PickScore (Kirstain et al. 2023, arXiv:2305.01569) and HPS v2 (Wu et al. 2023, arXiv:2306.09341)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from raftdiff.config import Dtype
from raftdiff.protocols import Modality
from raftdiff.types import Sample

from . import images
from .encoders import clip_encoder
from .pretrained import commit_of, origin, published_file


class ClipReward:
    """How well the picture fits its prompt: 100 times the cosine of their embeddings under any CLIP."""

    modality: Modality = "image"

    def __init__(
        self,
        model: str | Path = "ViT-L-14-quickgelu",
        pretrained: str | Path | None = "openai",
        *,
        processor: str | Path | None = None,
        revision: str | None = None,
        device: str = "cpu",
        dtype: Dtype = "fp32",
        batch_size: int = 32,
        scale: float | None = 100.0,
        diversity: bool = False,
        name: str = "clip",
    ) -> None:
        """`model`, `pretrained`, `processor` and `revision` as for `clip_encoder`. `scale` multiplies the cosine; None
        takes the model's own factor. With `diversity` the reward also has `embed`, so that diversity is measured on
        the embeddings of pictures rather than on their pixels.

        Raises:
            ConfigError: an unknown model name or dtype.
            WeightsError: weights that are missing or do not fit the model. Never random weights instead.
        """
        self.name = name
        self.encoder = clip_encoder(
            model, pretrained, processor=processor, revision=revision, device=device, dtype=dtype
        )
        self.weights_from = self.encoder.origin
        self.embed = self._embed if diversity else None
        self._batch_size = batch_size
        self._scale = self.encoder.logit_scale if scale is None else scale

    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B], -`scale` to `scale`."""
        if not samples:
            return torch.empty(0)
        text_BD = self.encoder.text_features([s.prompt.text for s in samples], batch_size=self._batch_size)
        return self._scale * (self._embed(samples) * text_BD).sum(dim=-1)

    def _embed(self, samples: Sequence[Sample]) -> torch.Tensor:
        return self.encoder.image_features([images.pixels(s) for s in samples], batch_size=self._batch_size)


class PickScoreReward(ClipReward):
    """Which picture people would pick for the prompt: PickScore, a CLIP fine-tuned on choices in Pick-a-Pic."""

    def __init__(
        self,
        model: str | Path = "yuvalkirstain/PickScore_v1",
        *,
        processor: str | Path | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        revision: str | None = None,
        device: str = "cpu",
        dtype: Dtype = "fp32",
        batch_size: int = 32,
        name: str = "pickscore",
    ) -> None:
        """`model` is a hub id or a folder in the format of transformers; `processor` one that holds the tokenizer and
        the image processor, None if they lie beside the weights. The published repository has neither.

        Raises:
            WeightsError: weights that are missing or do not fit the model.
        """
        super().__init__(
            model,
            processor=processor,
            revision=revision,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            scale=None,
            name=name,
        )


class HpsV2Reward(ClipReward):
    """How much people would prefer the picture for the prompt: the cosine of HPS v2, a CLIP fine-tuned on rankings."""

    version = "2"

    def __init__(
        self,
        checkpoint: str | Path = "xswu/HPSv2",
        *,
        architecture: str = "ViT-H-14",
        revision: str | None = None,
        device: str = "cpu",
        dtype: Dtype = "fp32",
        batch_size: int = 32,
        name: str | None = None,
    ) -> None:
        """`checkpoint` is the published file, a folder that holds it, or a hub id; `architecture` the name of
        open_clip that it was trained as.

        Raises:
            ConfigError: an unknown architecture.
            WeightsError: the checkpoint is missing or does not fit the architecture.
        """
        path = published_file(checkpoint, f"HPS_v{self.version}_compressed.pt", revision)
        super().__init__(
            architecture,
            path,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            scale=1.0,
            name=name or f"hpsv{self.version}",
        )
        self.weights_from = origin(checkpoint, commit_of(path))


class HpsV21Reward(HpsV2Reward):
    """How much people would prefer the picture for the prompt: the cosine of HPS v2.1, its later checkpoint."""

    version = "2.1"
