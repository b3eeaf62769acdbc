"""The embedded world's exact judge of translations as a reward; see `raftdiff.shapes.texts`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from raftdiff.protocols import Modality
from raftdiff.shapes.texts import french_of, translation_score
from raftdiff.types import Sample

from .texts import completion


class ShapesTranslationReward:
    """The share of a French caption's attributes that its English translation has right, 0 to 1, exactly.

    With `strict` it is 1 where all are right and else 0. What is no English caption has 0. A prompt that is not of the
    form "French: un cercle rouge. English:" cannot be judged and has NaN.
    """

    modality: Modality = "text"

    def __init__(self, *, strict: bool = False, name: str | None = None) -> None:
        self.name = name or ("shapes-translation-strict" if strict else "shapes-translation")
        self._strict = strict

    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B], 0 to 1; NaN for a prompt that asks for no translation.

        Raises:
            DataError: a sample holds no text.
        """
        return torch.tensor([self._judge(sample) for sample in samples], dtype=torch.float32)

    def _judge(self, sample: Sample) -> float:
        english, french = completion(sample), french_of(sample.prompt.text)
        if french is None:
            return math.nan
        try:
            return translation_score(english, french, strict=self._strict)
        except ValueError:  # French, but of no caption
            return math.nan
