"""LoRAs of single rewards, mixed by diffusers: the grid, the front, and what is refused."""

from __future__ import annotations

import csv
import os

import pytest
from tiny_runs import redness, tiny_config, tiny_pipeline

from raftdiff.build import build
from raftdiff.errors import ConfigError, DataError
from raftdiff.reward_models.function import FunctionReward
from raftdiff.rounds import run_rounds
from raftdiff.soup import Mixture, Soup, charts, mix, shares, write_soup
from raftdiff.types import Evaluation, Interval


def blueness(images, prompts):
    return [-value for value in redness(images, prompts)]


LIVE = {"redness": FunctionReward(redness, "redness"), "blueness": FunctionReward(blueness, "blueness")}
DOSE = {"training": {"steps": 6}, "evaluation": {"seeds_per_prompt": 2}}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Finished runs towards red and towards blue."""
    output = tmp_path_factory.mktemp("runs")
    configs = [tiny_config(output, name=name, rounds=1, rewards=[{"name": name}], **DOSE) for name in LIVE]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        for config in configs:
            run_rounds(build(config, pipeline=tiny_pipeline(), rewards=LIVE))
    return configs


def test_shares_are_every_way_to_share_one():
    assert shares(2, 4) == [(1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0)]
    assert shares(3, 2) == [(1, 0, 0), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 1, 0), (0, 0.5, 0.5), (0, 0, 1)]
    assert shares(1, 3) == [(1.0,)]


def test_a_mixture_with_all_weight_on_one_lora_is_that_runs_own_model(two, tmp_path):
    soup = mix(two, beside=two[:1], parts=2, pipeline=tiny_pipeline(), rewards=LIVE)
    assert [m.name for m in soup.mixtures] == ["1 redness", "0.5 redness + 0.5 blueness", "1 blueness", "redness"]
    for mixture, config in ((soup.mixtures[0], two[0]), (soup.mixtures[2], two[1])):
        result = run_rounds(build(config, pipeline=tiny_pipeline(), rewards=LIVE), resume=True)
        own, found = result.aligned[0], mixture.evaluation
        assert soup.base.per_sample[config.name] == result.base[0].per_sample[config.name]
        assert found.per_sample[config.name] == pytest.approx(
            own.per_sample[config.name], abs=0.5
        )  # whole levels of 255
        assert found.per_sample[config.name] != soup.base.per_sample[config.name]
    assert soup.mixtures[3].evaluation == soup.mixtures[0].evaluation
    page = write_soup(tmp_path / "soup", soup).read_text(encoding="utf-8")
    assert "0.5 redness + 0.5 blueness" in page and "blueness against redness" in page
    rows = list(csv.DictReader((tmp_path / "soup" / "soup.csv").open()))
    assert [row["mixture"] for row in rows] == ["base", *(m.name for m in soup.mixtures)]
    assert float(rows[3]["blueness"]) == soup.mixtures[2].evaluation.metrics["blueness"].mean


def at(name: str, a: float, b: float, weights: tuple[float, ...] = (0.5, 0.5)) -> Mixture:
    metrics = {n: Interval(mean=v, low=v, high=v, count=1) for n, v in (("a", a), ("b", b))}
    return Mixture(
        name=name,
        weights=weights,
        evaluation=Evaluation(guidance_scale=1.0, metrics=metrics, gains=metrics, per_sample={}, failed=0),
    )


def test_the_front_is_what_no_other_mixture_dominates_and_is_drawn_with_the_runs_beside_it():
    mixtures = [at("x", 3.0, 0.0), at("y", 2.0, 2.0), at("z", 1.0, 2.0), at("beside", 0.0, 3.0, ())]
    soup = Soup(base=at("", 0.0, 0.0).evaluation, mixtures=mixtures, axes=("a", "b"))
    assert [soup.on_front(m) for m in mixtures] == [True, True, False, True]
    (chart,) = charts(soup)
    assert [drawing.label for drawing in chart.drawings] == ["mixtures", "base", "beside"]
    assert [len(drawing.points) for drawing in chart.drawings] == [3, 1, 1]
    assert [label for _, label in chart.x_ticks] == ["0", "1", "2", "3"]


def test_runs_that_cannot_be_mixed_are_refused_before_anything_loads(two, tmp_path):
    with pytest.raises(ConfigError, match="at least two runs"):
        mix(two[:1])
    with pytest.raises(DataError, match="is not finished"):
        mix([two[0], tiny_config(tmp_path)])
    other = two[1].model_copy(update={"model": two[1].model.model_copy(update={"path": "other"})})
    with pytest.raises(ConfigError, match="of different models"):
        mix([two[0], other])
    with pytest.raises(ConfigError, match="the grid has 0 steps"):
        mix(two, parts=0)
