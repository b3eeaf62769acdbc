"""How positive a text is, by the rules and the lexicon of VADER (Hutto and Gilbert 2014), which its package brings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from raftdiff.protocols import Modality
from raftdiff.types import Sample

from .texts import completion


class SentimentReward:
    """How positive the words of an English text are, -1 to 1, by the lexicon of VADER; it needs no model."""

    modality: Modality = "text"

    def __init__(self, *, with_prompt: bool = False, name: str = "sentiment") -> None:
        """`with_prompt` judges prompt and completion as one text, where the one continues the other."""
        self.name = name
        self._with_prompt = with_prompt
        self._analyzer = SentimentIntensityAnalyzer()

    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B], VADER's compound score, -1 to 1; 0 for a text without words that it knows."""
        return torch.tensor([self._judge(sample) for sample in samples], dtype=torch.float32)

    def _judge(self, sample: Sample) -> float:
        text = completion(sample)
        return self._analyzer.polarity_scores(sample.prompt.text + text if self._with_prompt else text)["compound"]
