"""The app in a real browser, as a person uses it: no console error, no request to anywhere else."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from gradio_client import Client
from PIL import Image
from tiny_app import free_port, make_run, save_model, served

from raftdiff.app.runs import Runs
from raftdiff.app.votes import Votes
from raftdiff.checkpoint import RunLock
from raftdiff.data import load_preferences
from raftdiff.report import append_metrics, read_metrics

pytestmark = pytest.mark.app
sync_api = pytest.importorskip("playwright.sync_api", reason="`make test-app` installs playwright")
expect = sync_api.expect
expect.set_options(timeout=20_000)

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
HOSTILE = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>${window.hit=1}{{7*7}}'


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two finished runs on the tiny model."""
    folder = tmp_path_factory.mktemp("browser")
    save_model(folder / "model")
    for seed, name in enumerate(("first", "second")):
        make_run(folder / "runs", name, folder / "model", seed=seed)
    return folder / "runs"


@pytest.fixture(scope="module")
def app(runs) -> Iterator[str]:
    with served(runs, base=str(runs.parent / "model")) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        opened = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser) -> Iterator[Any]:
    """Opens pages; at the end none of them has logged an error, failed a request or asked another server."""
    wrong: list[str] = []
    contexts = []

    def open_page(url: str, viewport: dict[str, int] = WIDE, scheme: str = "light") -> Any:
        context = browser.new_context(viewport=viewport, color_scheme=scheme, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        own = urlsplit(url).netloc

        def requested(request: Any) -> None:
            if request.url.startswith("http") and urlsplit(request.url).netloc != own:
                wrong.append(f"asked {request.url}")

        page.on("console", lambda m: wrong.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
        page.on("request", requested)
        page.on("response", lambda r: wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.goto(url)
        page.wait_for_selector("#rd-draw")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def draw(page: Any, prompt: str = "a red circle", seeds: str = "0-1") -> None:
    page.fill("#rd-prompts textarea", prompt)
    page.fill("#rd-seeds textarea, #rd-seeds input", seeds)
    page.click("#rd-draw")
    page.wait_for_selector("#rd-compare-status .done")


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def columns(page: Any) -> list[str]:
    """The models of the first row of the board."""
    return page.locator("#rd-board section").first.locator("figcaption").all_inner_texts()


def set_number(page: Any, slider: str, value: str) -> None:
    number = page.locator(f"{slider} input[type=number]")
    number.fill(value)
    number.press("Enter")
    number.blur()


# ------------------------------------------------------------------------------------------------ Compare


def test_models_are_drawn_side_by_side_with_the_better_score_marked(app, visit):
    page = visit(app)
    draw(page)
    assert page.locator("#rd-board section h4").all_inner_texts() == ["a red circle seed 0", "a red circle seed 1"]
    assert sorted(columns(page)) == ["base", "first", "second"]
    for section in page.locator("#rd-board section").all():
        assert section.locator("img").count() == 3
        scores: dict[str, list[float]] = {}
        starred: dict[str, list[float]] = {}
        for row in section.locator(".scores div").all():
            name, value = row.locator("dt").inner_text(), row.locator("dd").inner_text()
            number = float(value.replace("★", "").replace("\N{MINUS SIGN}", "-"))
            scores.setdefault(name, []).append(number)
            if "★" in value:
                starred.setdefault(name, []).append(number)
        assert scores.keys() == {"jpeg", "shapes-rating"}
        assert all(values == [max(scores[name])] for name, values in starred.items())
    page.locator("#rd-slider").scroll_into_view_if_needed()
    expect(page.locator("#rd-slider img").first).to_be_visible()
    assert page.locator("#rd-slider img").first.evaluate("image => image.naturalWidth") == 512


def test_the_link_restores_the_settings_and_the_download_holds_them(app, visit):
    page = visit(app)
    page.locator("#rd-loras label", has_text="second").locator("input").uncheck()
    draw(page, "a blue & red <square>", "3, 5")
    expect(page.locator("#rd-link textarea, #rd-link input")).to_have_value(re.compile(r"^http://.*\?prompt="))
    link = page.locator("#rd-link textarea, #rd-link input").input_value()
    assert page.url == link
    with page.expect_download() as download:
        page.click("#rd-download")
    with zipfile.ZipFile(io.BytesIO(Path(download.value.path()).read_bytes())) as file:
        settings = json.loads(file.read("settings.json"))
        sizes = {Image.open(file.open(name)).size for name in file.namelist() if name.endswith(".png")}
    assert settings["prompts"] == ["a blue & red <square>"] and settings["seeds"] == [3, 5] and sizes == {(16, 16)}
    first = page.locator("#rd-board img").first.get_attribute("src")

    again = visit(link)
    expect(again.locator("#rd-prompts textarea")).to_have_value("a blue & red <square>")
    expect(again.locator("#rd-compare-status")).to_contain_text("press Draw")
    again.click("#rd-draw")
    again.wait_for_selector("#rd-compare-status .done")
    assert columns(again) == ["base", "first"]
    assert again.locator("#rd-board img").first.get_attribute("src") == first


def test_the_sliders_mix_the_loras_live(app, visit):
    page = visit(app)
    draw(page)
    page.click("#rd-mix button")
    set_number(page, "#rd-weight-0", "0.5")
    expect(page.locator("#rd-board section").first.locator("figcaption")).to_have_count(4)
    assert columns(page)[-1] == "mix"
    before = page.locator("#rd-board section").first.locator("img").last.get_attribute("src")
    set_number(page, "#rd-weight-1", "1.5")
    mixed = page.locator("#rd-board section").first.locator("img").last
    expect(mixed).not_to_have_attribute("src", before)


def test_progress_is_shown_by_the_step_and_a_drawing_can_be_cancelled(app, visit):
    page = visit(app)
    set_number(page, "#rd-steps", "150")
    page.fill("#rd-prompts textarea", "one\ntwo\nthree\nfour")
    page.fill("#rd-seeds textarea, #rd-seeds input", "0-3")
    page.click("#rd-draw")
    expect(page.locator("#rd-compare-status")).to_contain_text(re.compile(r"Drawing (base|first|second): step \d+ of"))
    expect(page.locator("#rd-device")).to_contain_text("drawing")
    page.click("#rd-cancel")
    expect(page.locator("#rd-compare-status")).to_contain_text("Cancelled")
    expect(page.locator("#rd-device")).to_contain_text("idle")
    set_number(page, "#rd-steps", "2")
    draw(page)


def test_a_second_person_waits_and_sees_that(app, visit):
    first, second = visit(app), visit(app)
    set_number(first, "#rd-steps", "150")
    first.fill("#rd-prompts textarea", "one\ntwo")
    first.fill("#rd-seeds textarea, #rd-seeds input", "0-7")
    first.click("#rd-draw")
    expect(first.locator("#rd-compare-status")).to_contain_text("Drawing")
    second.fill("#rd-prompts textarea", "another prompt")
    second.click("#rd-draw")
    expect(second.locator("#rd-compare-status")).to_contain_text("Waiting: 1 ahead of you")
    first.click("#rd-cancel")
    second.wait_for_selector("#rd-compare-status .done")


def test_a_drawing_ends_with_the_page_that_asked_for_it(app, visit):
    leaving, staying = visit(app), visit(app)
    set_number(leaving, "#rd-steps", "150")
    leaving.fill("#rd-prompts textarea", "one more\nand another")
    leaving.fill("#rd-seeds textarea, #rd-seeds input", "0-15")
    leaving.click("#rd-draw")
    expect(staying.locator("#rd-device")).to_contain_text("drawing")
    leaving.close()
    draw(staying, "after the other one left", "0")
    expect(staying.locator("#rd-device")).to_contain_text("idle")


def test_best_of_n_says_so(app, visit):
    page = visit(app)
    page.click("#rd-more button")
    set_number(page, "#rd-best-of", "3")
    draw(page, seeds="0")
    expect(page.locator("#rd-board .badge")).to_have_text(["best of 3"] * 3)


def test_errors_are_words(app, visit):
    page = visit(app)
    for prompt, seeds, words in (("", "0", "Write a prompt first"), ("a", "x", "'x' is no seed"), ("a", "0-50", "16")):
        page.fill("#rd-prompts textarea", prompt)
        page.fill("#rd-seeds textarea, #rd-seeds input", seeds)
        page.click("#rd-draw")
        expect(page.locator("#rd-compare-status .error")).to_contain_text(words)
    bad = visit(f"{app}?prompt=a&steps=0")
    expect(bad.locator("#rd-compare-status .error")).to_contain_text("This link cannot be restored: steps")


def test_hostile_text_is_text(app, visit):
    page = visit(app)
    draw(page, HOSTILE, "0")
    assert HOSTILE in page.locator("#rd-board h4").inner_text()
    assert page.evaluate("window.hit") is None
    assert page.locator("#rd-board script, #rd-board img[src=x]").count() == 0


# ------------------------------------------------------------------------------------------------ Arena


def test_votes_by_keyboard_and_mouse_are_blind_counted_and_exported(app, runs, visit, tmp_path):
    before = len(Votes(runs / "votes.sqlite").all())
    page = visit(app)
    tab(page, "Arena")
    cast = []
    for act, words in (
        (lambda: page.keyboard.press("ArrowLeft"), "the left one is better"),
        (lambda: page.keyboard.press("ArrowUp"), "a tie"),
        (lambda: page.click("#rd-bad"), "both are bad"),
        (lambda: page.click("#rd-right"), "the right one is better"),
    ):
        expect(page.locator("#rd-pair img")).to_have_count(2)
        shown = page.locator("#rd-pair").inner_html()
        assert "first" not in shown and "second" not in shown and "base" not in re.sub(r"base64,[^\"]*", "", shown)
        left = page.locator("#rd-pair img").first.get_attribute("src")
        act()
        expect(page.locator("#rd-reveal")).to_contain_text(words)
        assert re.search(r"Left was (base|first|second)", page.locator("#rd-reveal").inner_text())
        expect(page.locator("#rd-pair img").first).not_to_have_attribute("src", left)
        cast.append(words)
    votes = Votes(runs / "votes.sqlite").all()
    assert [vote.choice for vote in votes[before:]] == ["left", "tie", "bad", "right"]
    expect(page.locator("#rd-leaderboard")).to_contain_text("reference")
    page.click("#rd-export")
    expect(page.locator("#rd-arena-status")).to_contain_text("preferences are ready")
    with page.expect_download() as download:
        page.locator("#rd-file a[download]").first.click()
    path = tmp_path / "votes.parquet"
    shutil.copy(download.value.path(), path)
    decided = sum(vote.choice in ("left", "right") for vote in votes)
    assert len(list(load_preferences(path, height=16, width=16))) == decided


def test_the_arrow_keys_do_not_vote_while_one_writes(app, runs, visit):
    page = visit(app)
    tab(page, "Arena")
    expect(page.locator("#rd-pair img")).to_have_count(2)
    tab(page, "Compare")
    before = len(Votes(runs / "votes.sqlite").all())
    page.focus("#rd-prompts textarea")
    page.keyboard.press("ArrowLeft")
    page.click("#rd-header h1")
    page.keyboard.press("ArrowLeft")  # the arena is not shown
    draw(page)
    assert len(Votes(runs / "votes.sqlite").all()) == before


# ------------------------------------------------------------------------------------------------ Runs


def test_a_run_shows_its_verdict_curves_pictures_and_cost(app, runs, visit):
    page = visit(app)
    tab(page, "Runs")
    verdict = Runs(runs).open(Runs(runs).names()[0]).verdict
    expect(page.locator("#rd-view .verdict")).to_contain_text(verdict.message)
    titles = page.locator("#rd-view .chart-title").all_inner_texts()
    assert any("jpeg" in t and "trained" in t for t in titles)
    assert any("shapes-rating" in t and "not trained on" in t for t in titles)
    assert page.locator("#rd-view .rounds thead th").all_inner_texts() == ["Prompt", "base", "round 1", "round 2"]
    assert page.locator("#rd-view .rounds tbody tr").count() == 4
    assert page.locator("#rd-view .pairs figure").count() == 4
    assert "evaluate" in page.locator("#rd-view").inner_text()

    choose(page, "#rd-prompt", "a blue square")
    expect(page.locator("#rd-view .rounds tbody tr")).to_have_count(1)
    expect(page.locator("#rd-view .pairs figcaption")).to_have_text(["a blue square"])
    choose(page, "#rd-other", "first")
    expect(page.locator("#rd-view .verdict")).to_have_count(2)
    expect(page.locator("#rd-view .chart").first.locator(".legend span")).to_have_count(2)


def choose(page: Any, dropdown: str, option: str) -> None:
    page.click(f"{dropdown} input")
    page.get_by_role("option", name=option, exact=True).click()


def test_a_run_is_shown_live_while_it_trains(app, runs, visit):
    """The metrics of a run grow while the page is open, and its lock is held."""
    live = runs / "live"
    shutil.copytree(runs / "first", live)
    shutil.rmtree(live / "lora")
    reports = read_metrics(live / "metrics.jsonl")
    (live / "metrics.jsonl").unlink()
    for report in reports[:2]:
        append_metrics(live / "metrics.jsonl", report)
    try:
        with RunLock(live):
            page = visit(app)
            tab(page, "Runs")
            expect(page.locator("#rd-view .verdict h3")).to_contain_text("training, 1 of 2 rounds done")
            append_metrics(live / "metrics.jsonl", replace(reports[2], ledger=reports[2].ledger))
            expect(page.locator("#rd-view .verdict h3")).to_contain_text("training, 2 of 2 rounds done")
        expect(page.locator("#rd-view .verdict h3")).to_contain_text("not finished")
    finally:
        shutil.rmtree(live)


# ------------------------------------------------------------------------------------------------ the page as a whole


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["1280", "390"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_and_the_colors_follow_the_system(app, visit, viewport, scheme):
    page = visit(app, viewport, scheme)
    draw(page)
    for name, wait in (("Compare", "#rd-board img"), ("Arena", "#rd-pair img"), ("Runs", "#rd-view .verdict")):
        tab(page, name)
        expect(page.locator(wait).first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], name
    red = int(page.evaluate("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0])
    text = int(page.evaluate("getComputedStyle(document.querySelector('.rd h1')).color").split("(")[1].split(",")[0])
    assert (red < 64 and text > 192) if scheme == "dark" else (red > 192 and text < 64)


def test_empty_states_say_what_to_do(runs, visit, tmp_path):
    with served(tmp_path, base=str(runs.parent / "model")) as url:
        page = visit(url)
        expect(page.locator("#rd-header")).to_contain_text("No LoRA of this base yet: `raftdiff demo` makes one")
        expect(page.locator("#rd-board")).to_contain_text("Nothing drawn yet")
        tab(page, "Arena")
        expect(page.locator("#rd-arena-empty")).to_contain_text("`raftdiff demo` makes one")
        tab(page, "Runs")
        expect(page.locator("#rd-view")).to_contain_text("No runs yet")
        tab(page, "Compare")
        draw(page, seeds="0")
        assert columns(page) == ["base"]
        page.close()  # before its server, which it goes on asking


# ------------------------------------------------------------------------------------------------ killed under voters


def serve_process(runs: Path, base: Path, port: int) -> subprocess.Popen:
    options = ["--runs", str(runs), "--base", str(base), "--port", str(port)]
    command = [sys.executable, "-m", "raftdiff.cli", "app", *options]
    # A shell has its background jobs ignore Ctrl-C, and children inherit that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heed)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("open http"):
            return process
    raise AssertionError(f"the app ended with {process.wait()}")


def test_no_vote_is_lost_when_the_server_is_killed_under_eight_voters(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    path, port = tmp_path / "runs" / "votes.sqlite", free_port()
    path.unlink(missing_ok=True)
    acknowledged: list[str] = []
    ends: list[Exception] = []

    def vote() -> None:
        try:
            client = Client(f"http://127.0.0.1:{port}", verbose=False)
            while len(acknowledged) < wanted:
                token = client.predict(api_name="/pair")["token"]
                client.predict(token, "left", api_name="/vote")
                acknowledged.append(token)
        except Exception as error:  # of many kinds, when the server is gone
            ends.append(error)

    for wanted, last in ((8, False), (16, True)):
        process = serve_process(tmp_path / "runs", runs.parent / "model", port)
        voters = [threading.Thread(target=vote) for _ in range(8)]
        for voter in voters:
            voter.start()
        while len(acknowledged) < wanted and any(voter.is_alive() for voter in voters):
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT if last else signal.SIGKILL)
        process.wait(60)
        for voter in voters:
            voter.join(120)
        assert len(acknowledged) >= wanted, ends
        assert set(acknowledged) <= Votes(path).tokens()
    assert len(set(acknowledged)) == len(acknowledged)
