"""Compressibility, the rewards of the DDPO paper that need no model (Black et al. 2023, arXiv:2305.13301)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import torch

from raftdiff.errors import ConfigError
from raftdiff.protocols import Modality
from raftdiff.types import Sample

from . import images


class JpegReward:
    """The size of the picture as a JPEG in kB: negative by default (the simpler, the better), or positive.

    A kB is 1,000 bytes and the quality is 95, as in the paper's code.
    """

    modality: Modality = "image"

    def __init__(self, *, quality: int = 95, sign: Literal[-1, 1] = -1, name: str | None = None) -> None:
        """`sign` -1 rewards small files, +1 large ones; `quality` is Pillow's, 1 to 95.

        Raises:
            ConfigError: `sign` or `quality` is none of these.
        """
        if sign not in (-1, 1):
            raise ConfigError(f"sign of the JPEG reward is {sign}; use -1 for small files or 1 for large ones")
        if not 1 <= quality <= 95:
            raise ConfigError(f"quality of the JPEG reward is {quality}; use 1 to 95")
        self.name = name or ("jpeg-compressibility" if sign < 0 else "jpeg-incompressibility")
        self._quality = quality
        self._sign = sign

    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B], in kB times the sign."""
        return torch.tensor([self._sign * self._bytes(sample) / 1000 for sample in samples], dtype=torch.float32)

    def _bytes(self, sample: Sample) -> int:
        buffer = io.BytesIO()
        images.pil(sample).save(buffer, format="JPEG", quality=self._quality)
        return buffer.getbuffer().nbytes
