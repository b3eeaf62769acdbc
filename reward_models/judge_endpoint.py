"""A judge behind an OpenAI-compatible endpoint: a hosted model, or one's own under vLLM, SGLang or llama.cpp."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import os
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from raftdiff.endpoint import Endpoint, Fault
from raftdiff.errors import ConfigError, EndpointError, ScoringError, StorageError

from .judge import ABSENT, Answer, ModelJudge, Question

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a judge's answers took.

    Usage(asked=64, cached=12, missing=1, requests=55, prompt_tokens=30112, completion_tokens=52, cost=0.0079)
    """

    asked: int = 0
    cached: int = 0
    """Answers that were in the cache."""
    missing: int = 0
    """Questions without a valid answer."""
    requests: int = 0
    """Requests that were sent, those that were sent again among them."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    """By the prices that were given, in their currency."""


class EndpointJudge(ModelJudge):
    """A language or vision-language model behind an OpenAI-compatible endpoint, asked over HTTP."""

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout_s: float = 60.0,
        deadline_s: float = 300.0,
        retries: int = 6,
        backoff_s: float = 0.5,
        logprobs: bool = True,
        max_tokens: int | None = 1,
        extra: Mapping[str, Any] | None = None,
        price: tuple[float, float] = (0.0, 0.0),
        cache: str | Path | None = None,
    ) -> None:
        """The other options are those of `Endpoint`.

        Args:
            base_url: up to and with `/v1`; the environment's OPENAI_BASE_URL if absent.
            logprobs: whether to ask for log-probabilities; without them an answer is all or nothing.
            max_tokens: the limit that is sent; null sends none.
            extra: further fields of the request, such as `seed: 0`.
            price: of a million tokens of prompts and of answers, for the ledger.
            cache: a file that keeps answers by the hash of the request; in the user's cache folder if absent.

        Raises:
            ConfigError: no address, or a key that would travel unencrypted.
        """
        address = base_url or os.environ.get("OPENAI_BASE_URL")
        if not address:
            raise ConfigError(
                "the judge `endpoint` needs an address: set its option base_url, or OPENAI_BASE_URL in the environment,"
                " such as http://127.0.0.1:8000/v1"
            )
        self._endpoint = Endpoint(
            address,
            "chat/completions",
            what="judge",
            setting="its base_url",
            api_key_env=api_key_env,
            concurrency=concurrency,
            timeout_s=timeout_s,
            deadline_s=deadline_s,
            retries=retries,
            backoff_s=backoff_s,
        )
        self._price = price
        self._request: dict[str, Any] = {"model": model, "temperature": 0} | dict(extra or {})
        if max_tokens is not None:
            self._request["max_tokens"] = max_tokens
        if logprobs:
            self._request |= {"logprobs": True, "top_logprobs": 20}
        self._cache = AnswerCache(Path(cache).expanduser() if cache else _cache_folder() / "judge.sqlite")
        self.weights_from = f"{model} at {address}"
        self._asked = self._cached = self._missing = 0

    def ask(self, questions: Sequence[Question]) -> list[Answer | None]:
        """The answer to each question; None, counted and with the reason in a warning, where there is no valid one.

        Raises:
            ConfigError: the endpoint refuses the key, or knows no such model or address.
            ScoringError: nothing answers at that address.
        """
        requests = [self._request | {"messages": _messages(question)} for question in questions]
        keys = [self._key(request) for request in requests]
        answers = [self._cache.get(key) for key in keys]
        unknown = [i for i, answer in enumerate(answers) if answer is None]

        def read(place: int, choice: Mapping[str, Any]) -> Answer:
            i = unknown[place]
            answer = read_answer(choice, questions[i].answers)
            self._cache.put(keys[i], answer)
            return answer

        try:
            asked = self._endpoint.ask([requests[i] for i in unknown], read)
        except EndpointError as error:
            raise ScoringError(str(error)) from None
        reasons: Counter[str] = Counter()
        for i, found in zip(unknown, asked, strict=True):
            if isinstance(found, Fault):
                reasons[str(found)] += 1
            else:
                answers[i] = found
        for reason, count in reasons.most_common(3):
            logger.warning("judge: %d of %d answers are missing: %s", count, len(questions), reason)
        self._asked += len(questions)
        self._cached += len(questions) - len(unknown)
        self._missing += reasons.total()
        return answers

    def _key(self, request: Mapping[str, Any]) -> str:
        return hashlib.sha256(f"{self._endpoint.url}\n{json.dumps(request, sort_keys=True)}".encode()).hexdigest()

    @property
    def usage(self) -> Usage:
        """What all answers so far took."""
        endpoint, (of_prompts, of_answers) = self._endpoint, self._price
        return Usage(
            asked=self._asked,
            cached=self._cached,
            missing=self._missing,
            requests=endpoint.requests,
            prompt_tokens=endpoint.prompt_tokens,
            completion_tokens=endpoint.completion_tokens,
            cost=(endpoint.prompt_tokens * of_prompts + endpoint.completion_tokens * of_answers) / 1e6,
        )


def _messages(question: Question) -> list[dict[str, Any]]:
    parts = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": _data_url(part)}}
        for part in question.content
    ]
    texts = [part for part in question.content if isinstance(part, str)]
    content = "".join(texts) if len(texts) == len(parts) else parts  # not every server of texts takes parts
    return [{"role": "system", "content": question.rule}, {"role": "user", "content": content}]


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def read_answer(choice: Mapping[str, Any], answers: Sequence[str]) -> Answer:
    """The log-probability of each valid answer, of the first choice of a chat completion.

    Raises:
        Fault: what the model says is not one of the answers, and nothing else.
    """
    try:
        said = choice["message"]["content"]
        first = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
        tokens = [(str(entry["token"]).strip(), float(entry["logprob"])) for entry in first]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise Fault("the reply is no chat completion", again=True) from None
    if not isinstance(said, str) or said.strip() not in answers:
        raise Fault(f"it says {str(said)[:40]!r} where one of {', '.join(answers)} was asked for")
    if not tokens:
        return {answer: 0.0 if answer == said.strip() else -float("inf") for answer in answers}
    return {answer: max((p for token, p in tokens if token == answer), default=ABSENT) for answer in answers}


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raftdiff"


class AnswerCache:
    """Valid answers by the hash of their request, in an sqlite file that several processes may share."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._open()) as database:
                database.execute("pragma journal_mode=wal")
                database.execute("create table if not exists answers (key text primary key, answer text not null)")
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"cannot keep a judge's answers in {path}: {error}; set its option `cache`") from error

    def get(self, key: str) -> Answer | None:
        with closing(self._open()) as database:
            row = database.execute("select answer from answers where key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, answer: Answer) -> None:
        try:
            with closing(self._open()) as database, database:
                database.execute("insert or replace into answers values (?, ?)", (key, json.dumps(dict(answer))))
        except sqlite3.Error as error:  # the answer counts all the same
            logger.warning("judge: an answer cannot be kept in %s: %s", self._path, error)

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=30.0)
