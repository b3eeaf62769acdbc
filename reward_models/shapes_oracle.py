"""The embedded world's exact judge as rewards; see `raftdiff.shapes.oracle`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from raftdiff.protocols import Modality
from raftdiff.shapes import oracle
from raftdiff.shapes.captions import parse
from raftdiff.types import Sample

from . import images


class ShapesOracleReward:
    """The share of what a caption of the embedded world asks for that is true of the picture, 0 to 1, exactly.

    With `strict` it is 1 where everything is true and else 0. A prompt outside the captions' grammar cannot be judged
    and has NaN.
    """

    modality: Modality = "image"

    def __init__(self, *, strict: bool = False, name: str | None = None) -> None:
        self.name = name or ("shapes-strict" if strict else "shapes-oracle")
        self._strict = strict

    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B], 0 to 1; NaN for a prompt that is no caption."""
        return torch.tensor([self._judge(sample) for sample in samples], dtype=torch.float32)

    def _judge(self, sample: Sample) -> float:
        try:
            caption = parse(sample.prompt.text)
        except ValueError:
            return math.nan
        judge = oracle.strict if self._strict else oracle.partial
        return float(judge(images.array(sample), caption))


class ShapesRatingReward:
    """The embedded world's true aesthetic rating of the picture, 1 to 10, read off its pixels."""

    modality: Modality = "image"

    def __init__(self, *, name: str = "shapes-rating") -> None:
        self.name = name

    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B], 1 to 10."""
        return torch.tensor([oracle.rating(images.array(sample)) for sample in samples], dtype=torch.float32)
