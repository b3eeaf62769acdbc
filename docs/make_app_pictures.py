"""Take the pictures of docs/app.md: `python docs/make_app_pictures.py`, after `make test-app` and `make demo`.

It needs chromium and playwright, which `make test-app` installs, and at least one finished run of the embedded model.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from raftdiff.app.server import AppConfig, start
from raftdiff.cli import quiet_libraries

IMAGES = Path(__file__).parent / "images"
SIZES = {
    "wide": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "narrow": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"},
}
VOTES = ("ArrowLeft", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowLeft", "ArrowDown", "ArrowRight", "ArrowRight")
TALLEST = 1400  # pixels of a page that a picture shows


def compare(page: Any) -> None:
    page.fill("#rd-seeds textarea, #rd-seeds input", "0, 1")
    page.click("#rd-draw")
    page.wait_for_selector("#rd-compare-status .done")
    page.locator("#rd-slider").scroll_into_view_if_needed()
    page.wait_for_selector("#rd-slider img")


def arena(page: Any) -> None:
    for key in VOTES:
        page.wait_for_selector("#rd-pair img")
        before = page.locator("#rd-pair img").first.get_attribute("src")
        page.keyboard.press(key)
        page.wait_for_function(
            "before => { const image = document.querySelector('#rd-pair img'); return image && image.src !== before; }",
            arg=before,
        )


def runs(page: Any) -> None:
    page.wait_for_selector("#rd-view .verdict")
    page.evaluate("document.querySelectorAll('img[loading=lazy]').forEach(image => image.loading = 'eager')")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of runs (default: runs)")
    folder = parser.parse_args().runs
    quiet_libraries()
    with ExitStack() as stack:
        votes = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "runs"
        shutil.copytree(folder, votes, ignore=shutil.ignore_patterns("votes.sqlite*", "checkpoints"))
        _, url = start(AppConfig(runs=votes), stack)
        playwright = stack.enter_context(sync_playwright())
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        for size, settings in SIZES.items():
            page = browser.new_context(**settings).new_page()
            page.set_default_timeout(120_000)
            page.goto(url)
            page.wait_for_selector("#rd-draw")
            for name, act in (("Compare", compare), ("Arena", arena), ("Runs", runs)):
                page.get_by_role("tab", name=name).click()
                act(page)
                page.wait_for_timeout(1500)
                page.evaluate("scrollTo(0, 0)")
                height = min(TALLEST, page.evaluate("document.documentElement.scrollHeight"))
                path = IMAGES / f"app-{name.lower()}-{size}.png"
                clip = {"x": 0, "y": 0, "width": settings["viewport"]["width"], "height": height}
                page.screenshot(path=path, full_page=True, clip=clip)
                print(path)
        browser.close()


if __name__ == "__main__":
    main()
