"""A judge behind an OpenAI-compatible endpoint: a hosted model, or one's own under vLLM, SGLang or llama.cpp."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import logging
import os
import random
import sqlite3
import threading
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from PIL import Image

from raftdiff.errors import ConfigError, ScoringError, StorageError

from .judge import ABSENT, Answer, ModelJudge, Question

logger = logging.getLogger(__name__)

T = TypeVar("T")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LONGEST_WAIT_S = 60.0


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


class Fault(Exception):
    """Why one question has no answer. `again` says whether the same request may have one later, `after` when."""

    def __init__(self, reason: str, *, again: bool = False, after: float | None = None, unreachable: bool = False):
        super().__init__(reason)
        self.again, self.after, self.unreachable = again, after, unreachable


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
        """The key is read from the environment alone, so that no configuration and no run folder can hold it.

        Args:
            base_url: up to and with `/v1`; the environment's OPENAI_BASE_URL if absent.
            api_key_env: the environment variable that holds the key; it need not be set.
            concurrency: questions that are under way at once.
            timeout_s, deadline_s: seconds for one request, and for one question with all its retries.
            retries, backoff_s: how often a request is sent again after a rate limit, a server's fault or a broken
                connection, and the seconds before the first time, which double; a server's `Retry-After` counts more.
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
        self._url = f"{address.rstrip('/')}/chat/completions"
        self._headers = {}
        if key := os.environ.get(api_key_env):
            if urlsplit(address).scheme != "https" and urlsplit(address).hostname not in LOOPBACK:
                raise ConfigError(f"the key in {api_key_env} would go unencrypted to {address}: give an https address")
            self._headers["Authorization"] = f"Bearer {key}"
        self._api_key_env = api_key_env
        self._timeout_s, self._deadline_s = timeout_s, deadline_s
        self._concurrency, self._retries, self._backoff_s = max(1, concurrency), retries, backoff_s
        self._price = price
        self._request: dict[str, Any] = {"model": model, "temperature": 0} | dict(extra or {})
        if max_tokens is not None:
            self._request["max_tokens"] = max_tokens
        if logprobs:
            self._request |= {"logprobs": True, "top_logprobs": 20}
        self._cache = AnswerCache(Path(cache).expanduser() if cache else _cache_folder() / "judge.sqlite")
        self.weights_from = f"{model} at {address}"
        self._answered = False
        self.usage = Usage()

    def ask(self, questions: Sequence[Question]) -> list[Answer | None]:
        """The answer to each question; None, counted and with the reason in a warning, where there is no valid one.

        Raises:
            ConfigError: the endpoint refuses the key, or knows no such model or address.
            ScoringError: nothing answers at that address.
        """
        answers = _run(self._ask_all(questions))
        reasons = Counter(str(answer) for answer in answers if isinstance(answer, Fault))
        for reason, count in reasons.most_common(3):
            logger.warning("judge: %d of %d answers are missing: %s", count, len(questions), reason)
        self._count(asked=len(questions), missing=sum(reasons.values()))
        return [None if isinstance(answer, Fault) else answer for answer in answers]

    async def _ask_all(self, questions: Sequence[Question]) -> list[Answer | Fault]:
        gate = asyncio.Semaphore(self._concurrency)
        try:
            async with (
                httpx2.AsyncClient(headers=self._headers, timeout=self._timeout_s) as client,
                asyncio.TaskGroup() as group,
            ):
                tasks = [group.create_task(self._ask(client, gate, question)) for question in questions]
        except ExceptionGroup as several:
            raise several.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask(self, client: httpx2.AsyncClient, gate: asyncio.Semaphore, question: Question) -> Answer | Fault:
        request = self._request | {"messages": _messages(question)}
        key = hashlib.sha256(f"{self._url}\n{json.dumps(request, sort_keys=True)}".encode()).hexdigest()
        if (known := self._cache.get(key)) is not None:
            self._count(cached=1)
            return known
        async with gate:
            try:
                async with asyncio.timeout(self._deadline_s):
                    answer = await self._answer(client, request, question)
            except TimeoutError:
                return Fault(f"none within {self._deadline_s:g} s")
            except Fault as fault:
                if fault.unreachable:
                    raise ScoringError(
                        f"nothing answers at {self._url} ({fault}): start the judge there, or mend its base_url"
                    ) from None
                return fault
        self._cache.put(key, answer)
        return answer

    async def _answer(self, client: httpx2.AsyncClient, request: Mapping[str, Any], question: Question) -> Answer:
        """The answer, asked for again as long as that may help."""
        for attempt in range(self._retries + 1):
            try:
                return read_answer(await self._send(client, request), question.answers)
            except Fault as fault:
                hopeless = fault.unreachable and not self._answered  # a wrong address, more likely than an outage
                if not fault.again or hopeless or attempt == self._retries:
                    raise
                wait = self._backoff_s * 2**attempt * random.uniform(0.75, 1.25)  # not all at the same moment
                await asyncio.sleep(min(max(wait, fault.after or 0.0), LONGEST_WAIT_S))
        raise AssertionError("the last attempt returns or raises")

    async def _send(self, client: httpx2.AsyncClient, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """The first choice of the reply to one request."""
        self._count(requests=1)
        try:
            response = await client.post(self._url, json=request)
        except httpx2.ConnectError as error:
            raise Fault(str(error) or "no connection", again=True, unreachable=True) from None
        except httpx2.TimeoutException:
            raise Fault(f"no reply within {self._timeout_s:g} s", again=True) from None
        except httpx2.HTTPError as error:
            raise Fault(f"the connection broke: {type(error).__name__}", again=True) from None
        self._answered = True
        self._check(response)
        try:
            reply = response.json()
            choice = reply["choices"][0]
            tokens = reply.get("usage") or {}
            used = [int(tokens.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise Fault("the reply is no chat completion", again=True) from None
        cost = sum(count * price for count, price in zip(used, self._price, strict=True)) / 1e6
        self._count(prompt_tokens=used[0], completion_tokens=used[1], cost=cost)
        return choice

    def _check(self, response: httpx2.Response) -> None:
        status = response.status_code
        if status == 200:
            return
        said = " ".join(response.text.split())[:200]
        if status in (401, 403):
            raise ConfigError(f"the judge at {self._url} refuses the key (HTTP {status}): set {self._api_key_env}")
        if status == 404:
            raise ConfigError(
                f"the judge at {self._url} knows no such address or model {self._request['model']!r} (HTTP 404: {said})"
            )
        after = response.headers.get("retry-after", "")
        again = status == 429 or status >= 500
        raise Fault(f"HTTP {status}: {said}", again=again, after=float(after) if after.isdecimal() else None)

    def _count(self, **more: float) -> None:
        self.usage = replace(self.usage, **{name: getattr(self.usage, name) + value for name, value in more.items()})


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in a thread of its own, as a notebook has a loop running in this one. A daemon: an interrupt of
    this thread need not wait for it."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(asyncio.run(coroutine))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result()


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
