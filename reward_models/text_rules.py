"""Rewards of a text that need no model: length, repetition, patterns, and answers that are known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import torch

from raftdiff.errors import ConfigError, DataError
from raftdiff.protocols import Modality
from raftdiff.registry import check_choice
from raftdiff.types import Sample

from .texts import completion

Unit = Literal["words", "characters"]


class LengthReward:
    """How close the text is to a length in words or characters, or how short it is: 0 at best, else negative."""

    modality: Modality = "text"

    def __init__(self, *, target: int | None = None, unit: Unit = "words", name: str = "length") -> None:
        """Minus the distance to `target`; without one, minus the length. Words are what white space separates.

        Raises:
            ConfigError: an unknown unit, or a negative target.
        """
        check_choice("unit of the length reward", unit, Unit)
        if target is not None and target < 0:
            raise ConfigError(f"target of the length reward is {target}; use 0 or more, or none to penalize length")
        self.name = name
        self._target = target or 0
        self._unit = unit

    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B], in units, 0 or less."""
        lengths = [self._length(completion(sample)) for sample in samples]
        return torch.tensor([-abs(length - self._target) for length in lengths], dtype=torch.float32)

    def _length(self, text: str) -> int:
        return len(text.split()) if self._unit == "words" else len(text)


class RepetitionReward:
    """How little the text repeats itself: minus the share of its n-grams of words that came before in it.

    This is minus seq-rep-n of Welleck et al. 2019, arXiv:1908.04319.
    """

    modality: Modality = "text"

    def __init__(self, *, n: int = 4, name: str = "repetition") -> None:
        """Raises ConfigError where `n` is not 1 or more."""
        if n < 1:
            raise ConfigError(f"n of the repetition reward is {n}; use 1 or more words")
        self.name = name
        self._n = n

    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B], -1 to 0; 0 for a text of fewer than n words. Case counts, white space does not."""
        return torch.tensor([-self._repeated(completion(sample).split()) for sample in samples], dtype=torch.float32)

    def _repeated(self, words: Sequence[str]) -> float:
        grams = [tuple(words[i : i + self._n]) for i in range(len(words) - self._n + 1)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0


class RegexReward:
    """Whether a regular expression is found in the text, 0 or 1, or how often it is."""

    modality: Modality = "text"

    def __init__(self, pattern: str, *, count: bool = False, name: str = "regex") -> None:
        """`pattern` is searched anywhere, as Python's `re` does: `(?i)` at its beginning ignores case, and `\\A` and
        `\\Z` tie it to the ends of the text. With `count` the matches that do not overlap are counted.

        Raises:
            ConfigError: the pattern does not compile.
        """
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"pattern of the regex reward, {pattern!r}, is no regular expression: {error}") from error
        self.name = name
        self._count = count

    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B], 0 or 1, or the count."""
        return torch.tensor([self._judge(completion(sample)) for sample in samples], dtype=torch.float32)

    def _judge(self, text: str) -> int:
        return sum(1 for _ in self._pattern.finditer(text)) if self._count else bool(self._pattern.search(text))


class ExactMatchReward:
    """Whether the text is the answer that came with the prompt, 0 or 1."""

    modality: Modality = "text"

    def __init__(self, key: str = "answer", *, ignore_case: bool = False, name: str = "exact-match") -> None:
        """`key` is the column of the prompt file that holds the answer, or a list of right answers. White space at the
        ends does not count, and other white space is as good as one space."""
        self.name = name
        self._key = key
        self._ignore_case = ignore_case

    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B], 0 or 1.

        Raises:
            DataError: a prompt came without an answer.
        """
        return torch.tensor([self._judge(sample) for sample in samples], dtype=torch.float32)

    def _judge(self, sample: Sample) -> bool:
        answers = sample.prompt.metadata.get(self._key)
        if answers is None:
            has = ", ".join(sorted(sample.prompt.metadata)) or "nothing"
            raise DataError(
                f"no {self._key!r} came with the prompt {sample.prompt.text[:40]!r} (it has {has}); set `key` to the"
                " column of the prompt file that holds the answer"
            )
        right = answers if isinstance(answers, list | tuple) else [answers]
        return self._plain(completion(sample)) in {self._plain(str(answer)) for answer in right}

    def _plain(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if self._ignore_case else text
