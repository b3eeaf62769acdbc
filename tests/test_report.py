"""metrics.jsonl survives kills, and report.html shows everything, loads nothing and escapes what it is given."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from raftdiff.errors import DataError, StorageError
from raftdiff.evaluation import Verdict
from raftdiff.objectives import Together
from raftdiff.report import (
    ABSENT,
    Curve,
    append_metrics,
    comparison,
    draw_chart,
    duration,
    format_interval,
    image_grid,
    read_metrics,
    terminal_table,
    truncate_metrics,
    write_report,
)
from raftdiff.types import Evaluation, Interval, Moments, Prompt, RoundReport, Sample, Scored, StageCost

MINUS = "\N{MINUS SIGN}"


def evaluation(scale: float, reward: float, oracle: float, *, gain: float | None = None) -> Evaluation:
    def around(mean: float) -> Interval:
        return Interval(mean=mean, low=mean - 0.1, high=mean + 0.1, count=4)

    gains = {} if gain is None else {"reward": around(gain), "oracle": around(-gain / 100)}
    return Evaluation(
        guidance_scale=scale,
        metrics={
            "oracle": around(oracle),
            "reward": around(reward),
            "diversity": Interval(mean=0.2, low=0.2, high=0.2, count=4),
        },
        gains=gains,
        per_sample={"reward": (reward, 1 / 3), "oracle": (oracle, 0.1 + 0.2)},
        failed=0,
    )


def round_report(number: int, *, evaluated: bool = True) -> RoundReport:
    return RoundReport(
        round=number,
        requested=16,
        scored=13,
        failed=1,
        skipped=2,
        selected=4,
        rewards={"reward": 0.1 * number, "best_of_group": 0.1 * number + 0.7},
        training={"loss": 0.1 + 0.2, "gradient_norm": 1e-17, "steps": 3.0},
        evaluations=(
            evaluation(1.0, 0.5 * number, 0.6, gain=0.5 * number),
            evaluation(4.0, 1.0 + 0.1 * number, 0.7, gain=0.1 * number),
        )
        if evaluated
        else (),
        ledger=(
            StageCost(stage="sample", seconds=61.0, passes=1600),
            StageCost(stage="train", seconds=29.5, passes=60),
        ),
    )


BASE = (evaluation(1.0, 0.0, 0.6), evaluation(4.0, 1.0, 0.7))
ROUND_0 = RoundReport(
    round=0,
    requested=0,
    scored=0,
    failed=0,
    skipped=0,
    selected=0,
    rewards={},
    training={},
    evaluations=BASE,
    ledger=(StageCost(stage="evaluate", seconds=9.0, passes=80),),
)


# ------------------------------------------------------------------------------------------------ metrics.jsonl


def test_reports_come_back_exactly(tmp_path):
    path = tmp_path / "metrics.jsonl"
    reports = [round_report(1), round_report(2, evaluated=False), round_report(3)]
    for report in reports:
        append_metrics(path, report)
    assert read_metrics(path) == reports


def test_a_line_is_canonical_json_with_null_for_what_is_not_finite(tmp_path):
    path = tmp_path / "metrics.jsonl"
    report = dataclasses.replace(round_report(1, evaluated=False), training={"b": math.nan, "a": math.inf}, ledger=())
    append_metrics(path, report)
    assert path.read_text() == (
        '{"evaluations":[],"failed":1,"ledger":[],"moments":{},'
        '"phase":{"grown":0,"improve":0,"kl_coefficient":0.0,"learning_rate":1.0},"requested":16,'
        '"rewards":{"best_of_group":0.7999999999999999,'
        '"reward":0.1},"round":1,"scored":13,"selected":4,"skipped":2,"training":{"a":null,"b":null}}\n'
    )
    assert all(math.isnan(value) for value in read_metrics(path)[0].training.values())


def test_no_file_is_no_reports(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    truncate_metrics(tmp_path / "metrics.jsonl", 3)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_line_torn_at_any_byte_is_left_out_and_replaced_by_the_next(tmp_path):
    whole = tmp_path / "whole.jsonl"
    append_metrics(whole, round_report(1))
    first = whole.read_bytes()
    append_metrics(whole, round_report(2, evaluated=False))
    both = whole.read_bytes()
    path = tmp_path / "metrics.jsonl"
    for end in range(len(first), len(both)):
        path.write_bytes(both[:end])
        assert read_metrics(path) == [round_report(1)]
    append_metrics(path, round_report(2, evaluated=False))
    assert path.read_bytes() == both


def test_a_spoiled_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, round_report(1))
    for spoiled in (b"{not json\n", b'{"round": 2}\n', b"7\n", b"\xff\n"):
        path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n" + spoiled)
        with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: not a round report"):
            read_metrics(path)


def test_rounds_after_the_resumed_one_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for number in (1, 2, 3, 4):
        append_metrics(path, round_report(number, evaluated=False))
    kept = b"".join(path.read_bytes().splitlines(keepends=True)[:2])
    truncate_metrics(path, 2)
    assert path.read_bytes() == kept
    append_metrics(path, round_report(3, evaluated=False))
    assert [report.round for report in read_metrics(path)] == [1, 2, 3]


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """The system refuses to make any file larger than `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_that_does_not_fit_is_refused_with_path_and_bytes_and_leaves_no_trace(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, round_report(1))
    before = path.read_bytes()
    with room_for(len(before) + 40), pytest.raises(StorageError, match=rf"add {len(before)} bytes to {path}"):
        append_metrics(path, round_report(1))
    assert path.read_bytes() == before


# ------------------------------------------------------------------------------------------------ the table


def test_the_table_pairs_scales_marks_roles_and_matches_precision():
    rows = comparison(BASE, round_report(2).evaluations, trained=["clip"])
    assert [(row.guidance, row.metric, row.role) for row in rows[:3]] == [
        ("without guidance", "reward", "trained"),
        ("without guidance", "oracle", "not trained on"),
        ("without guidance", "diversity", ""),
    ]
    assert rows[3].guidance == "guidance scale 4"
    # a half-width of .1 is shown with two digits
    reward, oracle, diversity = rows[:3]
    assert (reward.base, reward.aligned, reward.gain, reward.interval) == ("0.00", "1.00", "+1.00", "0.90 to 1.10")
    assert reward.verdict == "better"
    assert (oracle.gain, oracle.interval, oracle.verdict) == (f"{MINUS}0.01", f"{MINUS}0.11 to 0.09", "unsure")
    assert (diversity.base, diversity.gain, diversity.verdict) == ("0.200", ABSENT, "unsure")


def test_what_rounds_to_nothing_has_no_minus_sign():
    assert format_interval(Interval(mean=-1e-9, low=-0.04, high=0.04, count=9))[0] == "+0.000"
    assert format_interval(Interval(mean=-0.02, low=-0.04, high=-1e-9, count=9))[1] == f"{MINUS}0.040 to 0.000"


def test_the_terminal_shows_the_same_numbers_and_no_markup():
    evaluations = [
        dataclasses.replace(e, metrics={"[red]odd": e.metrics["oracle"]} | dict(e.metrics))
        for e in round_report(2).evaluations
    ]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(terminal_table(BASE, evaluations, trained=[]))
    text = console.export_text()
    assert re.search(r"reward +trained +0\.00 +1\.00 +\+1\.00 +0\.90 to 1\.10", text)
    assert "[red]odd" in text
    assert "guidance scale 4" in text


# ------------------------------------------------------------------------------------------------ pictures and curves


def test_a_grid_enlarges_pixels_without_blurring_them():
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = [torch.tensor(color, dtype=torch.uint8)[:, None, None].expand(3, 2, 2) for color in colors]
    grid = image_grid(images, columns=2, scale=3, gap=1)
    assert grid.size == (15, 15)
    assert [grid.getpixel(at) for at in ((0, 0), (5, 5), (6, 0), (9, 5), (0, 9), (9, 9))] == [
        (255, 0, 0),
        (255, 0, 0),
        (255, 255, 255),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
    ]


def test_a_chart_scales_to_round_numbers_and_leaves_gaps_out():
    curve = Curve(label="x", at=[0, 1, 2], values=[0.0, math.nan, 3.0])
    chart = draw_chart("reward", "trained", [curve])
    assert [label for _, label in chart.y_ticks] == ["0", "1", "2", "3"]
    assert [label for _, label in chart.x_ticks] == ["base", "1", "2"]
    (drawing,) = chart.drawings
    assert drawing.points == [(54.0, 164.0), (342.0, 12.0)]
    assert drawing.path == "M54 164L342 12"
    assert drawing.band == ""


def test_durations_have_two_units():
    shown = [duration(seconds) for seconds in (0.31, 42.4, 200, 3599.7, 18600, 183600, math.nan)]
    assert shown == ["0.3 s", "42 s", "3 min 20 s", "1 h 0 min", "5 h 10 min", "2 d 3 h", "?"]


def test_a_chart_of_one_equal_or_missing_value_can_be_drawn():
    for values in ([2.0, 2.0], [math.nan, math.nan], [0.0, 0.0], [1e9, 1e9]):
        chart = draw_chart("reward", "", [Curve(label="x", at=[0, 1], values=values, lows=values, highs=values)])
        coordinates = [v for drawing in chart.drawings for point in drawing.points for v in point]
        assert all(0 <= v <= chart.WIDTH for v in coordinates)
    assert draw_chart("reward", "", [Curve(label="x", at=[3], values=[0.5])]).drawings[0].points == [(198.0, 88.0)]


# ------------------------------------------------------------------------------------------------ report.html


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, ids, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.text += " "

    def handle_data(self, data):
        self.text += data

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] for _, attributes in self.tags if attribute in attributes]


HOSTILE = "<script>alert('x')</script> & \"quoted\" <img src=x onerror=alert(1)> \u202eright-to-left"


def picture(text: str, level: int, *, seed: int = 1, size: tuple[int, int] = (8, 8)) -> Sample:
    image = torch.full((3, *size), level, dtype=torch.uint8)
    return Sample(id=f"{text}-{seed}", prompt=Prompt(text=text), seed=seed, image=image)


def answer(text: str) -> Sample:
    return Sample(id=text, prompt=Prompt(text="what is it?"), seed=1, text=text)


def written(folder: Path, **changes) -> str:
    settings = {
        "title": "raft on shapes",
        "reports": [ROUND_0, round_report(1), round_report(2)],
        "verdict": Verdict(kind="healthy", message="All is well.", best=2),
        "before": [
            picture("a red circle", 10),
            picture("a red circle", 11, seed=2),
            picture(HOSTILE, 12, size=(320, 640)),
            answer("a dull answer"),
        ],
        "after": [
            picture(HOSTILE, 22, size=(320, 640)),
            picture("a red circle", 21, seed=2),
            picture("a red circle", 20),
            answer("a better answer"),
        ],
        "best": [Scored(sample=picture("a fine cross", 30), parts={"clip": 27.1234}, reward=1.25)],
        "worst": [Scored(sample=picture(HOSTILE, 40), parts={}, reward=None)],
        "config_yaml": "algorithm: raft\nnote: '</pre><script>alert(2)</script>'\n",
        "load_line": 'pipeline.load_lora_weights("runs/demo/lora")',
        "trained": ["clip"],
    } | changes
    path = write_report(folder, **settings)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_every_section_is_there(tmp_path):
    page = Page(written(tmp_path))
    assert set(page.values("id")) == {
        "comparison", "pairs", "curves", "extremes", "ledger", "rounds", "load", "settings",
    }  # fmt: skip
    text = " ".join(page.text.split())
    for expected in (
        "raft on shapes",
        "All is well.",
        "Rounds 2 Samples drawn 32 8 trained on",
        "The aligned model is that of round 2.",
        "reward trained 0.00 1.00 +1.00",
        "oracle not trained on",
        "Guidance scale 4",
        "a red circle",
        "a better answer",
        "samples drawn for training",
        "a fine cross reward 1.250 clip 27.123",
        "evaluate 9.0 s 5% 80 sample 2 min 2 s 64% 3,200",
        "All rounds 3 min 10 s 3,400",
        "base 0 0 0 0 0 9.0 s 80 1 16 13 1 2 4 1 min 30 s 1,660",
        'pipeline.load_lora_weights("runs/demo/lora")',
        "algorithm: raft",
    ):
        assert expected in text
    # reward, oracle, diversity, the samples drawn for training, and training's loss and gradient norm
    assert sum(tag == "svg" and "aria-label" in attributes for tag, attributes in page.tags) == 6


def test_several_rewards_have_a_section_with_their_correlations_trends_and_floors(tmp_path):
    together = Together(
        names=("clip", "<b>size</b>"),
        correlation=((1.0, -0.25), (-0.25, 1.0)),
        disagreement=0.375,
        missed={"clip": 0.125, "oracle": 0.5},
    )
    page = Page(written(tmp_path, together=together, trends={"clip": "falls"}))
    text = " ".join(page.text.split())
    assert "objectives" in page.values("id")
    assert "For 38% of the prompts no sample is the best in every reward." in text
    assert f"clip falls 12% 1.00 {MINUS}0.25 <b>size</b> {ABSENT} {ABSENT} {MINUS}0.25 1.00" in text
    assert "Below the floor of rewards without weight: oracle 50%." in text


def test_the_statistics_of_the_pictures_are_charted_and_their_spread_is_not(tmp_path):
    of = {name: Moments(count=4, mean=0.5, variance=0.1) for name in ("saturation", "drift", "spread")}
    watched = dataclasses.replace(round_report(1).evaluations[0], statistics=of)
    reports = [ROUND_0, dataclasses.replace(round_report(1), evaluations=(watched,))]
    text = Page(written(tmp_path, reports=reports, verdict=Verdict(kind="healthy", message="Well.", best=1))).text
    assert "pictures: saturation" in text and "pictures: drift" in text and "pictures: spread" not in text


def test_untrusted_text_is_text(tmp_path):
    html = written(tmp_path, title=HOSTILE, load_line=HOSTILE)
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "link"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) == 5  # the tab, the heading, the pair, the worst sample, the load line
    assert f"before: {HOSTILE}" in page.values("alt")
    assert "</pre><script>alert(2)</script>" in page.text


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    html = written(tmp_path)
    page = Page(html)
    assert all(address.startswith("data:image/") for address in page.values("src"))
    assert page.values("href") == []
    assert not re.search(r"https?://|url\(|@import", html)
    assert "default-src 'none'" in page.values("content")[1]


def images(html: str) -> list[tuple[dict[str, str | None], Image.Image]]:
    found = [attributes for tag, attributes in Page(html).tags if tag == "img"]
    return [(f, Image.open(io.BytesIO(base64.b64decode((f["src"] or "").partition(",")[2])))) for f in found]


def test_small_pictures_are_kept_to_the_pixel_and_large_ones_are_scaled_down(tmp_path):
    found = images(written(tmp_path))
    (small, small_image), (large, large_image) = found[0], found[2]
    assert small["class"] == "small"
    assert (small_image.format, small_image.size) == ("PNG", (8, 8))
    assert "class" not in large
    assert (large_image.format, large_image.size) == ("WEBP", (512, 256))


def test_the_same_prompt_and_seed_stand_side_by_side_once_for_each_prompt(tmp_path):
    html = written(tmp_path)
    found = images(html)
    assert [f["alt"] for f, _ in found[:4]] == [
        "before: a red circle",
        "after: a red circle",
        f"before: {HOSTILE}",
        f"after: {HOSTILE}",
    ]
    assert [image.getpixel((3, 3)) for _, image in found[:2]] == [(10, 10, 10), (20, 20, 20)]
    assert html.index("a dull answer") < html.index("a better answer")


def test_a_long_list_of_prompts_is_cut(tmp_path):
    many = [picture(f"prompt {i}", i) for i in range(40)]
    assert len(images(written(tmp_path, before=many, after=many, best=[], worst=[]))) == 2 * 24


def test_the_table_shows_the_round_that_the_verdict_keeps(tmp_path):
    kept = Verdict(kind="over-optimized", message="Too far.", best=1)
    html = written(tmp_path, verdict=kept)
    text = " ".join(Page(html).text.split())
    assert 'class="verdict over-optimized">Too far.' in html
    assert "The aligned model is that of round 1." in text
    assert "reward trained 0.00 0.50 +0.50" in text


def test_the_last_round_is_shown_where_the_base_is_better(tmp_path):
    text = " ".join(Page(written(tmp_path, verdict=Verdict(kind="plateau", message="Flat.", best=0))).text.split())
    assert "The aligned model is that of round 2." in text


def test_rounds_without_an_evaluation_do_not_shift_the_table(tmp_path):
    reports = [ROUND_0, round_report(1, evaluated=False), round_report(2), round_report(3, evaluated=False)]
    html = written(tmp_path, reports=reports, verdict=Verdict(kind="healthy", message="Well.", best=1))
    assert "The aligned model is that of round 2." in " ".join(Page(html).text.split())


def test_a_run_that_has_only_its_base_has_a_report(tmp_path):
    only_base = Verdict(kind="healthy", message="Only the base.", best=0)
    html = written(tmp_path, reports=[ROUND_0], verdict=only_base, after=[], best=[], worst=[])
    assert "No round has been evaluated yet." in Page(html).text


def test_the_same_run_gives_the_same_bytes_and_leaves_nothing_beside_them(tmp_path):
    assert written(tmp_path) == written(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
