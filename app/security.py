"""Who may talk to the app, and what a page may load: an ASGI middleware in front of everything."""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import unquote, urlsplit

from raftdiff.errors import ConfigError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_BYTES = 256 << 10  # of a request
TOO_LARGE = f"a request has at most {MOST_BYTES} bytes"
LOGIN = "RAFTDIFF_APP_LOGIN"  # the environment variable with user:password

# What the page asks for, and the programmatic side. Gradio has more: uploads, proxies, streams, monitoring, editing.
ENDPOINTS = ("models", "compare", "pair", "vote", "leaderboard")
API = "/gradio_api/"
OPEN = {
    "GET": {"/", "/config", "/theme.css", "/manifest.json", "/favicon.ico", "/robots.txt", "/logout"}
    | {API + name for name in ("info", "queue/data", "startup-events", "app_id", "user", "login_check", "theme.css")},
    "POST": {"/login"}
    | {API + name for name in ("queue/join", "cancel", "reset")}
    | {f"{API}call/{name}" for name in ENDPOINTS},
}
OPEN_BELOW = ("/assets/", "/static/", "/svelte/", f"{API}heartbeat/", *(f"{API}call/{name}/" for name in ENDPOINTS))
HEADERS = {
    # The page's scripts are its own, some of them inline; nothing is fetched from anywhere else.
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "media-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


def login_for(host: str) -> tuple[str, str] | None:
    """The user and password that visitors must give, from the environment; None for none.

    Raises:
        ConfigError: they are missing for an address that others can reach, or not of the form user:password.
    """
    user, colon, password = os.environ.get(LOGIN, "").partition(":")
    if colon and user and len(password) >= 8:
        return user, password
    if user or colon:
        raise ConfigError(f"{LOGIN} is not of the form user:password with a password of 8 characters or more")
    if host not in LOOPBACK:
        raise ConfigError(
            f"--host {host} lets others reach the app, so it needs a login: set the environment variable "
            f"{LOGIN}=user:password, or leave --host out"
        )
    return None


def checks(login: tuple[str, str]) -> Callable[[str, str], bool]:
    """Whether a user and password are those of the login, in a time that does not depend on where they differ."""

    def check(user: str, password: str) -> bool:
        given, wanted = f"{user}:{password}".encode(), ":".join(login).encode()
        return hmac.compare_digest(given, wanted)

    return check


def allowed_hosts(host: str, port: int, others: Sequence[str] = ()) -> set[str]:
    """What the Host header may say.

    Args:
        others: names by which the app is also reached, such as `gpu.example.org` or `gpu.example.org:8443`.

    Raises:
        ConfigError: the app listens on every address, and no name is given.
    """
    if host in ("0.0.0.0", "::", "") and not others:
        raise ConfigError(f"--host {host} listens on every address: say by --allow-host by which name you will open it")
    names = {*LOOPBACK, *({host} - {"0.0.0.0", "::", ""}), *others}
    with_port = {f"[{name}]:{port}" if ":" in name else f"{name}:{port}" for name in names if not _has_port(name)}
    return with_port | {name.lower() for name in others}


def _has_port(name: str) -> bool:
    return name.count(":") == 1 and name.rpartition(":")[2].isdecimal()


class Guard:
    """Refuses requests that a stranger's page could make, that ask for what the app does not offer, or that are too
    large; and tells the browser to load nothing from elsewhere.

    - Host must be an allowed one: a name that was rebound to this address is refused;
    - Origin, where there is one, must be too, and no other site may embed or fetch anything;
    - only the paths that the page and the documented API need are open, and of files those that it made itself;
    - a body beyond `MOST_BYTES` is refused, whatever its length header says.
    """

    def __init__(self, app: Any, *, hosts: set[str], served: str):
        self.app, self.hosts, self.served = app, hosts, served

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None  # there are no web sockets here
        if refusal := self._refusal(scope):
            return await _answer(send, *refusal)
        body = _Body(receive)

        async def guarded(message: Message) -> None:
            if body.too_large:  # whatever the app makes of a body that was cut off
                return
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_encoded(HEADERS)]
            await send(message)

        with suppress(_TooLarge):
            await self.app(scope, body, guarded)
        if body.too_large:
            await _answer(send, 413, TOO_LARGE)

    def _refusal(self, scope: Message) -> tuple[int, str] | None:
        headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        hosts = [value.lower() for name, value in headers if name == "host"]
        if len(hosts) != 1 or hosts[0] not in self.hosts:
            return 421, "this host name is not one of the app's; start it with --allow-host NAME"
        origins = [value for name, value in headers if name == "origin"]
        if any(not self._is_own(origin) for origin in origins):
            return 403, "requests from other sites are refused"
        fetch = dict(headers)
        navigates = scope["method"] == "GET" and fetch.get("sec-fetch-mode") == "navigate"
        if fetch.get("sec-fetch-site") in ("cross-site", "same-site") and not (navigates and scope["path"] == "/"):
            return 403, "requests from other sites are refused"
        if not is_open(scope["method"], scope["path"], self.served):
            return 404, "there is nothing here"
        if fetch.get("content-length", "0").isdecimal() and int(fetch.get("content-length", "0")) > MOST_BYTES:
            return 413, TOO_LARGE
        return None

    def _is_own(self, origin: str) -> bool:
        parts = urlsplit(origin)
        return parts.scheme in ("http", "https") and parts.netloc.lower() in self.hosts


def is_open(method: str, path: str, served: str) -> bool:
    """Whether the app answers this method on this path; files come from the folder `served` alone."""
    method = "GET" if method == "HEAD" else method
    if ".." in unquote(path) or "\\" in path or "\0" in path or method not in OPEN:
        return False
    named = (path.rstrip("/") or "/") in OPEN[method]
    return named or (method == "GET" and path.startswith((*OPEN_BELOW, f"{API}file={served}/")))


class _TooLarge(Exception):
    pass


class _Body:
    """Receives a request's body, up to the cap."""

    def __init__(self, receive: Receive):
        self._receive, self._seen = receive, 0
        self.too_large = False

    async def __call__(self) -> Message:
        message = await self._receive()
        self._seen += len(message.get("body", b""))
        if self._seen > MOST_BYTES:
            self.too_large = True
            raise _TooLarge
        return message


def _encoded(headers: MutableMapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


async def _answer(send: Send, status: int, text: str) -> None:
    headers = _encoded({"content-type": "text/plain; charset=utf-8", **HEADERS})
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
