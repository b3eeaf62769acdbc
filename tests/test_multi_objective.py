"""Runs with several rewards: running statistics, floors and fronts survive a kill; stored samples are ranked again."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from tiny_runs import Told, exported, redness, three_weights_run, tiny_config

from raftdiff import objectives, rescore
from raftdiff.cli import main
from raftdiff.errors import ConfigError, DataError
from raftdiff.interrupts import Interrupted
from raftdiff.report import read_metrics
from raftdiff.reward_models.function import FunctionReward
from raftdiff.rounds import Result, run_rounds
from raftdiff.scoring import WeightedReward, by_prompt, combination, stored
from raftdiff.store import SampleStore

TWO = [{"name": "redness"}, {"name": "greenness", "weight": 0.5}]


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    """No test here cuts the power, so nothing has to wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def greenness(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """The green less the blue of each picture, 0 to 255."""
    means = [image.resize((1, 1), 4).getpixel((0, 0)) for image in images]
    return [float(green - blue) for _, green, blue in means]


def moderate(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """How close the redness is to 60: what a run towards red first gains, then loses."""
    return [-abs(60 - value) for value in redness(images, prompts)]


def finish(config, *, resume: bool = False, **parts) -> Result:
    run = three_weights_run(config, **parts)
    functions = {"redness": redness, "greenness": greenness}
    rewards = [
        WeightedReward(reward=FunctionReward(functions[r.name], r.name), weight=r.weight) for r in config.rewards
    ]
    return run_rounds(replace(run, rewards=rewards), resume=resume)


def terminated_at(round: int, stage: str) -> Told:
    return Told(lambda at, name: os.kill(os.getpid(), signal.SIGTERM) if (at, name) == (round, stage) else None)


# ------------------------------------------------------------------------------------------------ combining


def test_running_statistics_are_of_all_samples_so_far(tmp_path):
    result = finish(tiny_config(tmp_path, rewards=TWO, combine="worst-case"))
    store = SampleStore(result.folder)
    assert result.reports[0].moments == {}
    for report in result.reports[1:]:
        scores = [v for r in range(1, report.round + 1) for v in store.read_scores(r)["greenness"].values()]
        assert report.moments["greenness"].count == len(scores) == 8 * report.round
        everything = objectives.moments(torch.tensor(scores))
        assert report.moments["greenness"].mean == pytest.approx(everything.mean)
        assert report.moments["greenness"].variance == pytest.approx(everything.variance)


@pytest.mark.parametrize("stage", ["score", "train", "evaluate"])
def test_a_run_by_running_statistics_goes_on_to_the_same_adapter(tmp_path, stage):
    floored = [{"name": "redness"}, {"name": "greenness", "weight": 0.5, "floor": "base"}]
    settings = {"rewards": floored, "combine": "soft-max-min", "rounds": 3}
    whole = finish(tiny_config(tmp_path / "whole", **settings))
    config = tiny_config(tmp_path / "killed", **settings)
    with pytest.raises(Interrupted):
        finish(config, display=terminated_at(2, stage))
    resumed = finish(config, resume=True)
    assert exported(resumed.folder) == exported(whole.folder)
    assert [r.moments for r in resumed.reports] == [r.moments for r in whole.reports]


def test_samples_that_are_improved_on_again_are_counted_once(tmp_path):
    rest = {"name": "rest", "options": {"thresholds": [0.0, 0.5], "gate": False}}
    result = finish(tiny_config(tmp_path, rewards=TWO, combine="max-median", rounds=3, algorithm=rest))
    assert [r.phase.grown for r in result.reports[1:]] == [1, 1, 3]
    assert [r.moments["redness"].count for r in result.reports[1:]] == [8, 8, 16]


def test_a_floor_at_the_bases_level_keeps_samples_below_it_out(tmp_path):
    rewards = [{"name": "redness"}, {"name": "greenness", "weight": 0, "floor": "base"}]
    result = finish(tiny_config(tmp_path, rewards=rewards, rounds=1, sampling={"samples_per_prompt": 8}))
    level = result.base[0].metrics["greenness"].mean
    how = combination(tiny_config(tmp_path, rewards=rewards), result.reports, grown=1)
    assert how.floors == {"greenness": level}
    store = SampleStore(result.folder)
    selected = {example.sample.id for example in store.read_selection(1)}
    for group in by_prompt(stored(store, 1, how)):
        above = [s for s in group.samples if s.parts["greenness"] >= level]
        best = max(above, key=lambda s: s.parts["redness"])
        assert best.sample.id in selected


def test_pareto_selection_trains_on_each_prompts_front(tmp_path):
    pareto = {"options": {"selection": "pareto"}}
    config = tiny_config(tmp_path, rewards=TWO, rounds=1, sampling={"samples_per_prompt": 6}, algorithm=pareto)
    result = finish(config)
    selected = {example.sample.id for example in SampleStore(result.folder).read_selection(1)}
    for group in by_prompt(stored(SampleStore(result.folder), 1, combination(config, result.reports, grown=1))):
        points = {s.sample.id: (s.parts["redness"], s.parts["greenness"]) for s in group.samples}
        for sample_id, (red, green) in points.items():
            dominated = any((r >= red and g >= green) and (r, g) != (red, green) for r, g in points.values())
            assert (sample_id in selected) == (not dominated)


def test_the_report_shows_the_rewards_together(tmp_path):
    html = finish(tiny_config(tmp_path, rewards=TWO)).report_path.read_text(encoding="utf-8")
    assert "The rewards together" in html and "Correlation with greenness" in html
    alone = finish(tiny_config(tmp_path / "alone")).report_path.read_text(encoding="utf-8")
    assert "The rewards together" not in alone


# ------------------------------------------------------------------------------------------------ sentinel


def hacked_config(output: Path, sentinel: str):
    return tiny_config(
        output,
        rounds=8,
        sampling={"samples_per_prompt": 8},
        training={"steps": 5, "learning_rate": 0.1},
        evaluation={"sentinel": sentinel, "rewards": [{"name": "moderate"}]},
    )


def hack(output: Path, sentinel: str, *, resume: bool = False, told: Told | None = None) -> Result:
    watched = [FunctionReward(moderate, "moderate")]
    return finish(hacked_config(output, sentinel), resume=resume, watched=watched, display=told or Told())


@pytest.fixture(scope="module")
def warned(tmp_path_factory):
    told = Told()
    return hack(tmp_path_factory.mktemp("warn"), "warn", told=told), told


def test_a_sentinel_warns_at_each_evaluation_that_finds_the_reward_hacked(warned):
    result, told = warned
    levels = [report.evaluations[0].metrics["moderate"].mean for report in result.reports]
    assert 0 < levels.index(max(levels)) < 8 and levels[-1] < levels[0]
    assert len(result.reports) == 9 and result.verdict.kind == "over-optimized"
    assert f"round 8: {result.verdict.message}" in told.messages
    assert not [message for message in told.messages if message.startswith("round 1:")]


def test_a_sentinel_stops_the_run_at_the_first_alarm_and_resuming_adds_no_round(tmp_path, warned):
    first = min(int(m.split()[1].rstrip(":")) for m in warned[1].messages if m.startswith("round "))
    told = Told()
    result = hack(tmp_path, "stop", told=told)
    assert result.reports[-1].round == first < 8
    assert told.messages[-1] == f"stopped after round {first}: {result.verdict.message}"
    assert result.reports[-1].evaluations == warned[0].reports[first].evaluations
    again = hack(tmp_path, "stop", resume=True)
    assert len(again.reports) == len(result.reports) and exported(again.folder) == exported(result.folder)


@pytest.mark.parametrize("stage", ["sample", "train", "evaluate"])
def test_a_rollback_exports_the_best_held_out_round_whatever_interrupts_it(tmp_path, warned, stage):
    levels = [report.evaluations[0].metrics["moderate"].mean for report in warned[0].reports]
    whole = hack(tmp_path / "whole", "rollback")
    last = whole.reports[-1].round
    best = max(range(1, last + 1), key=levels.__getitem__)
    assert best < last
    assert (
        exported(whole.folder)
        == (whole.folder / "checkpoints" / f"round-{best:04d}-step-00000" / "adapter.safetensors").read_bytes()
    )
    with pytest.raises(Interrupted):
        hack(tmp_path / "killed", "rollback", told=terminated_at(last, stage))
    assert exported(hack(tmp_path / "killed", "rollback", resume=True).folder) == exported(whole.folder)


def test_without_a_sentinel_nothing_is_measured_of_the_pictures_and_nothing_said(tmp_path):
    told = Told()
    result = hack(tmp_path, "off", told=told)
    assert result.reports[-1].evaluations[0].statistics == {} and told.messages == []


def test_a_rollback_without_held_out_rewards_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rollback goes by held-out rewards"):
        tiny_config(tmp_path, evaluation={"sentinel": "rollback"})


# ------------------------------------------------------------------------------------------------ rescore


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("two"), rewards=TWO, sampling={"samples_per_prompt": 6})
    finish(config)
    return config


def test_the_same_settings_select_the_same_samples(two):
    for rescored in rescore.rescore(two, rescore.changed(two)):
        assert not rescored.new and not rescored.gone
        assert [e.sample.id for e in rescored.after] == [e.sample.id for e in rescored.before]


def test_other_weights_select_what_a_run_with_them_selects_in_its_first_round(two, tmp_path):
    new = rescore.changed(two, weights={"redness": 0.0, "greenness": 2.0}, combine="worst-case")
    found = rescore.rescore(two, new)
    other = finish(new.model_copy(update={"output": str(tmp_path), "rounds": 1}))
    trained = SampleStore(other.folder).read_selection(1)
    assert [e.sample.id for e in found[0].after] == [e.sample.id for e in trained]
    assert found[0].new and len(found[0].new) == len(found[0].gone)
    greens = {s: scored.parts["greenness"] for s, scored in found[0].scored.items()}
    for after in found[0].after:
        of_prompt = [greens[i] for i, s in found[0].scored.items() if s.sample.prompt.id == after.sample.prompt.id]
        assert greens[after.sample.id] == max(of_prompt)


def test_a_floor_can_be_tried_and_taken_away(two):
    floored = rescore.changed(two, floors={"greenness": 1e9})
    assert floored.rewards[1].floor == 1e9
    assert not any(r.new for r in rescore.rescore(two, floored))  # all miss it alike
    assert rescore.changed(floored, floors={"greenness": None}) == two


def test_weights_come_from_the_command_line_from_a_mapping_and_from_rewards(tmp_path):
    plain, rewards = tmp_path / "plain.yaml", tmp_path / "weights.yaml"
    plain.write_text("redness: 2\ngreenness: -0.5\n")
    listed = [{"name": "preference", "label": "color", "weight": 1.5, "options": {}}]
    rewards.write_text(yaml.safe_dump({"overall": "overall", "rewards": listed}))
    assert rescore.read_weights([str(plain), "redness=3"]) == {"redness": 3.0, "greenness": -0.5}
    assert rescore.read_weights([str(rewards)]) == {"color": 1.5}
    for bad in ("redness=much", str(tmp_path / "missing.yaml"), "redness=nan"):
        with pytest.raises(ConfigError):
            rescore.read_weights([bad])
    assert rescore.read_floors(["a=base", "b=none", "c=0.5"]) == {"a": "base", "b": None, "c": 0.5}


def test_what_cannot_be_rescored_is_said(two, tmp_path):
    with pytest.raises(ConfigError, match="no reward 'rednes'; did you mean 'redness'"):
        rescore.changed(two, weights={"rednes": 1.0})
    with pytest.raises(ConfigError, match="a weight other than 0"):
        rescore.changed(two, weights={"redness": 0.0, "greenness": 0.0})
    with pytest.raises(DataError, match="no round whose samples"):
        rescore.rescore(tiny_config(tmp_path), tiny_config(tmp_path))
    ranked = tiny_config(tmp_path, algorithm={"options": {"kl_beta": 1.0}})
    with pytest.raises(ConfigError, match="log-ratio"):
        rescore.rescore(ranked, ranked)


def test_the_command_prints_the_means_and_writes_every_sample(two, tmp_path, monkeypatch):
    recorded = Console(record=True, width=200)
    monkeypatch.setattr("raftdiff.cli.console", recorded)
    out = tmp_path / "samples.csv"
    arguments = ["--weights", "redness=0", "greenness=1", "--combine", "weighted-linear", "--out", str(out)]
    assert main(["rescore", str(two.folder), *arguments]) == 0
    text = recorded.export_text()
    found = rescore.rescore(
        two, rescore.changed(two, weights={"redness": 0, "greenness": 1}, combine="weighted-linear")
    )
    new = sum(len(r.new) for r in found)
    assert f"{new} of 8 selected samples would be others ({new / 8:.0%}), over 2 rounds" in text
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 48 and sum(int(row["would_be"]) for row in rows) == 8
    means = {side: [float(r["greenness"]) for r in rows if int(r[side])] for side in ("selected", "would_be")}
    assert sum(means["would_be"]) > sum(means["selected"])
    assert f"{sum(means['would_be']) / 8:.4g}" in text
    assert len(read_metrics(two.folder / "metrics.jsonl")) == 3  # nothing is touched
