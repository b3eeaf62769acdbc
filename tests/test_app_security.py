"""What the app's server refuses: strangers' pages, other paths, large bodies, replayed and made-up tokens."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from tiny_app import make_run, save_model, served

from raftdiff.app.security import MOST_BYTES, allowed_hosts, checks, is_open, login_for
from raftdiff.app.server import AppConfig, serve
from raftdiff.app.votes import Votes
from raftdiff.errors import ConfigError, StorageError

OTHER = "http://evil.example"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("security")
    save_model(folder / "model")
    make_run(folder / "runs", "first", folder / "model")
    return folder / "runs"


@pytest.fixture(scope="module")
def app(runs) -> Any:
    with served(runs, base=str(runs.parent / "model")) as url:
        yield url


@pytest.fixture(scope="module")
def client(app) -> Client:
    return Client(app, verbose=False)


def request(url: str, method: str, path: str, headers: dict[str, str | None] | None = None, body: bytes | None = None):
    """Status, headers and body; a header that is None is left out, Host too."""
    own: dict[str, str | None] = {"Host": urlsplit(url).netloc, **(headers or {})}
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(url).port or 0, timeout=30)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in own.items():
            if value is not None:
                connection.putheader(name, value)
        if body is not None and "Transfer-Encoding" not in own and "Content-Length" not in own:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
        if body is not None:
            connection.send(body)
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


# ------------------------------------------------------------------------------------------------ host and origin


def hosts(app: str) -> dict[str, tuple[str | None, bool]]:
    own = urlsplit(app)
    return {
        "own": (own.netloc, True),
        "localhost": (f"localhost:{own.port}", True),
        "upper case": (f"LOCALHOST:{own.port}", True),
        "rebound name": (f"evil.example:{own.port}", False),
        "name with ours in it": (f"127.0.0.1.evil.example:{own.port}", False),
        "other port": ("127.0.0.1:1", False),
        "no port": ("127.0.0.1", False),
        "none": (None, False),
    }


def origins(app: str) -> dict[str, tuple[str | None, bool]]:
    return {
        "none": (None, True),
        "own": (app.rstrip("/"), True),
        "other": (OTHER, False),
        "null": ("null", False),
        "other port": ("http://127.0.0.1:1", False),
        "with ours as a user": (f"http://{urlsplit(app).netloc}@evil.example", False),
        "file": ("file://", False),
    }


@pytest.mark.parametrize("host", hosts("http://127.0.0.1:1"))
@pytest.mark.parametrize("origin", origins("http://127.0.0.1:1"))
def test_host_and_origin_must_both_be_the_apps_own(app, host, origin):
    (host_value, host_passes), (origin_value, origin_passes) = hosts(app)[host], origins(app)[origin]
    for method, path, body in (
        ("GET", "/", None),
        ("GET", "/config", None),
        ("POST", "/gradio_api/call/pair", b'{"data": []}'),
    ):
        headers = {"Host": host_value, "Origin": origin_value, "Content-Type": "application/json"}
        # uvicorn itself answers a request without a Host, and may close the connection on a body that it did not read
        status, _, answer = request(app, method, path, headers, body if host_value else None)
        expected = 200 if host_passes and origin_passes else 421 if not host_passes else 403
        assert status == expected or (host_value is None and status in (400, 421)), (method, path, status, answer[:80])
    assert len(origins(app)) * len(hosts(app)) == 56


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_may_link_to_the_page_and_nothing_else(app, site):
    def status(path: str, mode: str) -> int:
        return request(app, "GET", path, {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode})[0]

    assert status("/?prompt=a", "navigate") == 200
    assert status("/", "no-cors") == 403 and status("/config", "navigate") == 403
    assert status("/gradio_api/info", "cors") == 403


def test_the_page_may_load_nothing_from_elsewhere_and_be_framed_nowhere(app):
    _, headers, _ = request(app, "GET", "/")
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "http" not in policy
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert headers.get("access-control-allow-origin") in (None, app.rstrip("/"))


def test_addresses_beyond_this_machine_need_a_login(monkeypatch):
    monkeypatch.delenv("RAFTDIFF_APP_LOGIN", raising=False)
    assert login_for("127.0.0.1") is None
    for host in ("0.0.0.0", "192.168.1.5", "::", "gpu.example.org"):
        with pytest.raises(ConfigError, match="needs a login"):
            login_for(host)
    for login in ("user", "user:", ":password", "user:short"):
        monkeypatch.setenv("RAFTDIFF_APP_LOGIN", login)
        with pytest.raises(ConfigError, match="not of the form user:password"):
            login_for("127.0.0.1")
    monkeypatch.setenv("RAFTDIFF_APP_LOGIN", "user:pass:word")
    login = login_for("0.0.0.0")
    assert login == ("user", "pass:word")
    check = checks(login)
    assert check("user", "pass:word") and not check("user", "pass") and not check("", "")


def test_listening_everywhere_needs_the_names_it_is_opened_by():
    with pytest.raises(ConfigError, match="say by --allow-host"):
        allowed_hosts("0.0.0.0", 7860)
    found = allowed_hosts("0.0.0.0", 7860, ["gpu.example.org", "proxy.example.org:443"])
    assert {"gpu.example.org:7860", "gpu.example.org", "proxy.example.org:443", "localhost:7860"} <= found
    assert "0.0.0.0:7860" not in found and "[::1]:7860" in found


def test_an_open_address_without_a_login_is_refused_before_anything_loads(tmp_path, monkeypatch):
    monkeypatch.delenv("RAFTDIFF_APP_LOGIN", raising=False)
    said: list[str] = []
    with pytest.raises(ConfigError, match="--host 0.0.0.0 lets others reach the app, so it needs a login"):
        serve(AppConfig(runs=tmp_path, host="0.0.0.0"), say=said.append)
    assert said == [] and list(tmp_path.iterdir()) == []


def test_with_a_login_nothing_is_seen_before_it(runs, monkeypatch):
    monkeypatch.setenv("RAFTDIFF_APP_LOGIN", "someone:long-enough")
    with served(runs, base=str(runs.parent / "model")) as url:
        for method, path in (("GET", "/config"), ("GET", "/gradio_api/info"), ("POST", "/gradio_api/queue/join")):
            assert request(url, method, path, {"Content-Type": "application/json"}, b"{}")[0] == 401
        assert b"raftdiff demo" not in request(url, "GET", "/")[2] and b"first" not in request(url, "GET", "/")[2]
        with pytest.raises(Exception, match="(?i)auth|credential|401|login"):
            Client(url, auth=("someone", "wrong"), verbose=False)
        assert Client(url, auth=("someone", "long-enough"), verbose=False).predict(api_name="/models")["loras"] == [
            "first"
        ]


# ------------------------------------------------------------------------------------------------ paths and files


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../etc/passwd",
        "/gradio_api/file=..%2f..%2fetc%2fpasswd",
        "/gradio_api/file=%2e%2e/%2e%2e/etc/passwd",
        "/gradio_api/file=votes.sqlite",
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/file=http://evil.example/",
        "/gradio_api/file={runs}/votes.sqlite",
        "/gradio_api/file={runs}/first/config.yaml",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/static/../../../../etc/passwd",
        "/static/..%2f..%2f..%2fetc/passwd",
        "/assets/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/assets/..\\..\\etc\\passwd",
        "/gradio_api/proxy=http://169.254.169.254/latest/meta-data/",
        "/gradio_api/stream/a/b/c/playlist.m3u8",
        "/gradio_api/vibe-code",
        "/gradio_api/run-history/buckets",
        "/gradio_api/upload_progress",
        "/monitoring",
        "/docs",
        "/openapi.json",
        "/gradio_api/call/_draw/x",
    ],
)
def test_no_path_leads_to_a_file_or_to_what_the_app_does_not_offer(app, runs, path):
    status, _, answer = request(app, "GET", path.format(runs=runs))
    assert status in (403, 404) and b"root:" not in answer and b"SQLite" not in answer


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/upload",
        "/gradio_api/call/_draw",
        "/gradio_api/call/_vote",
        "/gradio_api/call/_export",
        "/gradio_api/run/predict",
        "/gradio_api/run/vote",
        "/gradio_api/api/vote",
        "/gradio_api/vibe-edit",
        "/gradio_api/component_server",
        "/gradio_api/process_recording",
    ],
)
def test_what_is_not_public_cannot_be_called(app, path):
    assert request(app, "POST", path, {"Content-Type": "application/json"}, b'{"data": []}')[0] == 404


def test_other_methods_are_refused(app):
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert request(app, method, "/")[0] in (404, 405)
    assert is_open("GET", "/gradio_api/file=/srv/own/x.png", "/srv/own")
    assert not is_open("GET", "/gradio_api/file=/srv/own-not/x.png", "/srv/own")


def test_clients_see_five_endpoints(client):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {
        "/models",
        "/compare",
        "/pair",
        "/vote",
        "/leaderboard",
    }


# ------------------------------------------------------------------------------------------------ sizes


def test_a_large_body_is_refused_whatever_it_says_of_its_length(app):
    large = b'{"data": ["' + b"a" * MOST_BYTES + b'"]}'
    kind = {"Content-Type": "application/json"}
    assert request(app, "POST", "/gradio_api/call/compare", kind, large)[0] == 413
    chunked = f"{len(large):x}\r\n".encode() + large + b"\r\n0\r\n\r\n"
    assert request(app, "POST", "/gradio_api/call/compare", {**kind, "Transfer-Encoding": "chunked"}, chunked)[0] == 413


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": ["a" * 1001]}, "at most 1000 characters"),
        ({"prompts": [str(i) for i in range(17)]}, "at most 16 items"),
        ({"prompts": []}, "at least 1 item"),
        ({"prompts": ["a"], "steps": 10**9}, "less than or equal to 150"),
        ({"prompts": ["a"], "height": 10**6}, "less than or equal to 2048"),
        ({"prompts": ["a"], "seeds": list(range(17))}, "at most 16 items"),
        ({"prompts": ["a"], "seeds": [-1]}, "greater than or equal to 0"),
        ({"prompts": ["a"], "mix": {"first": 1e9}}, "less than or equal to 2"),
        ({"prompts": ["a"], "mix": {"first": "nan"}}, "mix first"),
        ({"prompts": ["a"], "loras": ["../../first"]}, "there is no LoRA called"),
        ({"prompts": ["a"], "loras": ["/etc/passwd"]}, "there is no LoRA called"),
        ({"prompts": ["a"], "path": "/etc/passwd"}, "path: Extra inputs are not permitted"),
        ({"prompts": [{"path": "/etc/passwd"}]}, "Input should be a valid string"),
    ],
)
def test_requests_beyond_the_bounds_are_refused_in_words(client, settings, message):
    with pytest.raises(AppError, match=message):
        client.predict(settings, api_name="/compare")


@pytest.mark.parametrize("path", ["/etc/passwd", "/no/such/file", "{runs}/votes.sqlite", "http://169.254.169.254/"])
def test_a_file_that_a_client_names_is_never_looked_at(app, runs, path):
    """Gradio takes a dictionary with such a `meta` for an uploaded file, wherever it stands."""
    file = {"path": path.format(runs=runs), "url": path, "meta": {"_type": "gradio.FileData"}}
    answers = set()
    for settings in ({"prompts": file}, {"prompts": [file]}, file):
        body = json.dumps({"data": [settings]}).encode()
        status, _, answer = request(app, "POST", "/gradio_api/call/compare", {"Content-Type": "application/json"}, body)
        assert status == 200
        _, _, told = request(app, "GET", f"/gradio_api/call/compare/{json.loads(answer)['event_id']}")
        assert told.startswith(b"event: error") and b"root:" not in told and b"SQLite" not in told
        answers.add(told)
    assert not [a for a in answers if b"exist" in a or b"not found" in a.lower()], answers


# ------------------------------------------------------------------------------------------------ the programmatic side


def test_a_comparison_returns_pictures_and_not_paths(client):
    asked = {"prompts": ["a red circle"], "seeds": [1], "loras": ["first"], "steps": 2, "guidance": 1}
    found = client.predict(asked, api_name="/compare")
    assert [(one["model"], one["seed"]) for one in found] == [("base", 1), ("first", 1)]
    for one in found:
        kind, _, data = one["image"].partition(",")
        assert kind == "data:image/png;base64" and Image.open(io.BytesIO(base64.b64decode(data))).size == (16, 16)
        assert one["scores"].keys() == {"jpeg", "shapes-rating"}
    assert "/tmp" not in json.dumps(found)


def test_a_vote_needs_a_token_that_the_server_issued_and_counts_once(client, runs):
    before = len(Votes(runs / "votes.sqlite").all())
    pair = client.predict(api_name="/pair")
    assert pair.keys() == {"token", "prompt", "left", "right"}, "a pair must not say where its pictures come from"
    with pytest.raises(AppError, match="not issued here"):
        client.predict("made-up-token", "left", api_name="/vote")
    with pytest.raises(AppError, match="a vote is one of"):
        client.predict(pair["token"], "both", api_name="/vote")
    told = client.predict(pair["token"], "left", api_name="/vote")
    assert {told["left"]["model"].partition("@")[0], told["right"]["model"].partition("@")[0]} == {"base", "first"}
    assert client.predict(pair["token"], "left", api_name="/vote") == told
    with pytest.raises(AppError, match="has a vote already"):
        client.predict(pair["token"], "right", api_name="/vote")
    assert len(Votes(runs / "votes.sqlite").all()) == before + 1
    standings = client.predict(api_name="/leaderboard")["standings"]
    assert {row["model"].partition("@")[0] for row in standings} == {"base", "first"}


@pytest.mark.app
def test_eight_voters_at_once_lose_no_vote_and_never_see_the_same_pair(app, runs):
    before = Votes(runs / "votes.sqlite").tokens()
    acknowledged: list[str] = []

    def vote() -> None:
        own = Client(app, verbose=False)
        for _ in range(2):
            pair = own.predict(api_name="/pair")
            own.predict(pair["token"], "right", api_name="/vote")
            acknowledged.append(pair["token"])

    threads = [threading.Thread(target=vote) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(set(acknowledged)) == 16
    assert Votes(runs / "votes.sqlite").tokens() - before == set(acknowledged)


def test_a_port_that_is_taken_is_said(runs, app):
    with pytest.raises(StorageError, match="give another --port"):
        serve(AppConfig(runs=runs, base=str(runs.parent / "model"), port=urlsplit(app).port), say=lambda text: None)
