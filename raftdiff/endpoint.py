"""Requests to an OpenAI-compatible server, many at once, until each has an answer or a reason for having none."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from .errors import ConfigError, EndpointError, MissingExtraError

if TYPE_CHECKING:
    import httpx2  # of the extra `judge`, which the rest does without

T = TypeVar("T")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LONGEST_WAIT_S = 60.0


class Fault(Exception):
    """Why one request has no answer. `again` says whether the same request may have one later, `after` when."""

    def __init__(self, reason: str, *, again: bool = False, after: float | None = None, unreachable: bool = False):
        super().__init__(reason)
        self.again, self.after, self.unreachable = again, after, unreachable


class Endpoint:
    """One path of an OpenAI-compatible server.

    The key is read from the environment alone, so that no configuration and no run folder can hold it.

    Args:
        address: up to and with `/v1`.
        path: such as `chat/completions`.
        what: what the server is, for error messages; `setting`, where its address stands.
        api_key_env: the environment variable that holds the key; it need not be set.
        concurrency: requests that are under way at once.
        timeout_s, deadline_s: seconds for one sending of a request, and for a request with all its retries.
        retries, backoff_s: how often a request is sent again after a rate limit, a server's fault or a broken
            connection, and the seconds before the first time, which double; a server's `Retry-After` counts more.

    Raises:
        ConfigError: a key that would travel unencrypted.
        MissingExtraError: httpx2 is not installed.
    """

    def __init__(
        self,
        address: str,
        path: str,
        *,
        what: str,
        setting: str,
        api_key_env: str,
        concurrency: int,
        timeout_s: float,
        deadline_s: float,
        retries: int,
        backoff_s: float,
    ) -> None:
        if find_spec("httpx2") is None:
            raise MissingExtraError(f"the {what} at {address} is asked with httpx2: pip install 'raftdiff[judge]'")
        self.url = f"{address.rstrip('/')}/{path}"
        self._headers = {}
        if key := os.environ.get(api_key_env):
            if urlsplit(address).scheme != "https" and urlsplit(address).hostname not in LOOPBACK:
                raise ConfigError(f"the key in {api_key_env} would go unencrypted to {address}: give an https address")
            self._headers["Authorization"] = f"Bearer {key}"
        self._what, self._setting, self._api_key_env = what, setting, api_key_env
        self._timeout_s, self._deadline_s = timeout_s, deadline_s
        self._concurrency, self._retries, self._backoff_s = max(1, concurrency), retries, backoff_s
        self._answered = False
        self.requests = self.prompt_tokens = self.completion_tokens = 0
        """Requests that were sent, those that were sent again among them, and the tokens that replies say they took."""

    def ask(
        self, requests: Sequence[Mapping[str, Any]], read: Callable[[int, Mapping[str, Any]], T]
    ) -> list[T | Fault]:
        """What `read` makes of the first choice of the reply to each request, which it is given with the number of the
        request; it raises a Fault where it can make nothing of it.

        Raises:
            ConfigError: the server refuses the key, or knows no such model or address.
            EndpointError: nothing answers at that address.
        """
        return _run(self._ask_all(requests, read))

    async def _ask_all(
        self, requests: Sequence[Mapping[str, Any]], read: Callable[[int, Mapping[str, Any]], T]
    ) -> list[T | Fault]:
        import httpx2

        gate = asyncio.Semaphore(self._concurrency)
        try:
            async with (
                httpx2.AsyncClient(headers=self._headers, timeout=self._timeout_s) as client,
                asyncio.TaskGroup() as group,
            ):
                tasks = [
                    group.create_task(self._ask(client, gate, request, partial(read, i)))
                    for i, request in enumerate(requests)
                ]
        except ExceptionGroup as several:
            raise several.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask(
        self,
        client: httpx2.AsyncClient,
        gate: asyncio.Semaphore,
        request: Mapping[str, Any],
        read: Callable[[Mapping[str, Any]], T],
    ) -> T | Fault:
        async with gate:
            try:
                async with asyncio.timeout(self._deadline_s):
                    return await self._answer(client, request, read)
            except TimeoutError:
                return Fault(f"none within {self._deadline_s:g} s")
            except Fault as fault:
                if fault.unreachable:
                    raise EndpointError(
                        f"nothing answers at {self.url} ({fault}): start the {self._what} there, or mend "
                        f"{self._setting}"
                    ) from None
                return fault

    async def _answer(
        self, client: httpx2.AsyncClient, request: Mapping[str, Any], read: Callable[[Mapping[str, Any]], T]
    ) -> T:
        """The answer, asked for again as long as that may help."""
        for attempt in range(self._retries + 1):
            try:
                return read(await self._send(client, request))
            except Fault as fault:
                hopeless = fault.unreachable and not self._answered  # a wrong address, more likely than an outage
                if not fault.again or hopeless or attempt == self._retries:
                    raise
                wait = self._backoff_s * 2**attempt * random.uniform(0.75, 1.25)  # not all at the same moment
                await asyncio.sleep(min(max(wait, fault.after or 0.0), LONGEST_WAIT_S))
        raise AssertionError("the last attempt returns or raises")

    async def _send(self, client: httpx2.AsyncClient, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """The first choice of the reply to one request."""
        import httpx2

        self.requests += 1
        try:
            response = await client.post(self.url, json=request)
        except httpx2.ConnectError as error:
            raise Fault(str(error) or "no connection", again=True, unreachable=True) from None
        except httpx2.TimeoutException:
            raise Fault(f"no reply within {self._timeout_s:g} s", again=True) from None
        except httpx2.HTTPError as error:
            raise Fault(f"the connection broke: {type(error).__name__}", again=True) from None
        self._answered = True
        self._check(response, request)
        try:
            reply = response.json()
            choice = reply["choices"][0]
            tokens = reply.get("usage") or {}
            used = [int(tokens.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise Fault("the reply is no completion", again=True) from None
        self.prompt_tokens += used[0]
        self.completion_tokens += used[1]
        return choice

    def _check(self, response: httpx2.Response, request: Mapping[str, Any]) -> None:
        status = response.status_code
        if status == 200:
            return
        said = " ".join(response.text.split())[:200]
        if status in (401, 403):
            raise ConfigError(
                f"the {self._what} at {self.url} refuses the key (HTTP {status}): set {self._api_key_env}"
            )
        if status == 404:
            raise ConfigError(
                f"the {self._what} at {self.url} knows no such address or model {request['model']!r} (HTTP 404: {said})"
            )
        after = response.headers.get("retry-after", "")
        again = status == 429 or status >= 500
        raise Fault(f"HTTP {status}: {said}", again=again, after=float(after) if after.isdecimal() else None)


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
