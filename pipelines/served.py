"""A language model behind an OpenAI-compatible server, which samples for one that is trained here."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from raftdiff.config import RunConfig
from raftdiff.endpoint import Endpoint, Fault
from raftdiff.errors import ConfigError, DataError, EndpointError
from raftdiff.types import Completion, Prompt, Sample

from .llm import LanguagePolicy

logger = logging.getLogger(__name__)

SEEDS = 1 << 31  # servers take seeds of 32 bits
ENDED = ("stop", "eos_token", "stop_sequence")  # why a text ended by itself, in the words of several servers


class ServedModel:
    """A teacher that is asked over HTTP: what a server at `config.algorithm.teacher` writes, in the tokens of the model
    that is trained. Log-probabilities of those are not known, and are NaN."""

    modality: Literal["text"] = "text"

    def __init__(self, config: RunConfig, student: LanguagePolicy) -> None:
        """Raises ConfigError for a key that would travel unencrypted."""
        server, sampling = config.algorithm.server, config.sampling
        assert server is not None and config.algorithm.teacher is not None
        self.passes = 0
        """Tokens of prompts and completions, as the model that is trained counts them."""
        self.tokenizer = student.tokenizer
        self._student, self._max_failed = student, config.max_failed
        self._endpoint = Endpoint(
            config.algorithm.teacher,
            "completions",
            what="teacher",
            setting="algorithm.teacher",
            **server.model_dump(exclude={"model", "extra"}),
        )
        self._request: dict[str, Any] = {
            "model": server.model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **({"stop": sampling.stop} if sampling.stop else {}),
            **server.extra,
        }

    def sample(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        guidance_scale: float | None = None,
        noise_level: float | None = None,
    ) -> list[Sample]:
        """A completion for each prompt and seed; one without a text has a flaw. A server need not write the same text
        for a seed again. `guidance_scale` and `noise_level` are without effect.

        Raises:
            ConfigError: the server refuses the key, or knows no such model or address.
            EndpointError: nothing answers, or more than the share `max_failed` of the samples have no answer.
        """
        requests = [
            self._request | {"prompt": self._text(prompt), "seed": seed % SEEDS}
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        answers = self._endpoint.ask(requests, lambda _, choice: _read(choice))
        self._check(answers)
        return [self._sample(*row) for row in zip(prompts, seeds, answers, strict=True)]

    def _text(self, prompt: Prompt) -> str:
        """The prompt as the student has it, but for the token at its beginning, which servers put there themselves."""
        return self._student.prompt_tokens.templated(prompt.text).removeprefix(self.tokenizer.bos_token or "")

    def _check(self, answers: Sequence[Any]) -> None:
        """Raise EndpointError where too many requests have no answer: an outage shall not pass for a round."""
        reasons = Counter(str(answer) for answer in answers if isinstance(answer, Fault))
        for reason, count in reasons.most_common(3):
            logger.warning("teacher: %d of %d texts are missing: %s", count, len(answers), reason)
        if reasons.total() > self._max_failed * len(answers):
            raise EndpointError(
                f"{reasons.total()} of {len(answers)} requests to {self._endpoint.url} have no answer "
                f"({reasons.most_common(1)[0][0]}); at most the share {self._max_failed:g} may fail (max_failed): mend "
                "the server, and resume"
            )

    def _sample(self, prompt: Prompt, seed: int, answer: tuple[str, str | None] | Fault) -> Sample:
        nothing = Completion(tokens_T=torch.zeros(0, dtype=torch.int64), log_prob_T=torch.zeros(0), finished=False)
        sample = Sample(id=f"{prompt.id}-{seed:016x}", prompt=prompt, seed=seed, text="", completion=nothing)
        if isinstance(answer, Fault):
            return replace(sample, flaw=f"no completion: {answer}")
        text, reason = answer
        sample = replace(sample, text=text)
        if not text.strip():
            return replace(sample, flaw="empty completion")
        if reason not in (*ENDED, "length"):
            return replace(sample, flaw=f"the server ended the completion: {reason}")
        try:
            completion = self._student.encode_completion(prompt, text, finished=reason in ENDED)
        except (ConfigError, DataError) as error:  # more tokens than the student can take, or none
            return replace(sample, flaw=str(error))
        self.passes += len(self._student.prompt_tokens(prompt)) + len(completion.tokens_T)
        return replace(sample, completion=completion)


def _read(choice: Mapping[str, Any]) -> tuple[str, str | None]:
    """The text and why it ended. Raises Fault where there is none."""
    try:
        text, reason = choice["text"], choice["finish_reason"]
        text.encode()  # JSON can hold half of a surrogate pair, which is no text
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError):
        raise Fault("the reply is no completion", again=True) from None
    return text, reason
