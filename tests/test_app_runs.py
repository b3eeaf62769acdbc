"""Run folders as the app reads them, and what the app opens on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_app import make_run, run_config, save_model

from raftdiff.app import pages
from raftdiff.app.opening import open_on
from raftdiff.app.runs import RunFolder, Runs, charts, training_charts
from raftdiff.build import build
from raftdiff.checkpoint import RunLock
from raftdiff.config import RewardConfig, dump_config
from raftdiff.errors import ConfigError, WeightsError
from raftdiff.report import append_metrics, read_metrics
from raftdiff.rounds import run_rounds
from raftdiff.store import SampleStore


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A model, and a finished run on it called `first`."""
    folder = tmp_path_factory.mktemp("app")
    save_model(folder / "model")
    make_run(folder / "runs", "first", folder / "model")
    return folder / "runs"


@pytest.fixture
def copied(runs, tmp_path) -> Runs:
    shutil.copytree(runs, tmp_path / "runs")
    return Runs(tmp_path / "runs")


def test_a_run_has_the_verdict_and_the_curves_of_its_report(runs, monkeypatch):
    run = Runs(runs).open("first")
    result = run_rounds(build(run.config.model_copy(update={"output": str(runs)})), resume=True)
    assert run.verdict == result.verdict
    assert run.trained == ["jpeg"] and run.rounds == [1, 2]
    assert run.state == "finished, 2 of 2 rounds" and run.lora == runs / "first" / "lora"
    titles = {chart.title: chart.role for chart in charts([run])}
    assert titles["reward"] == "trained" and titles["jpeg"] == "trained"
    assert titles["shapes-rating"] == "not trained on"
    assert "loss" in {chart.title for chart in training_charts([run])}
    for chart in charts([run, run])[:2]:
        assert [drawing.label for drawing in chart.drawings] == ["first", "first"]


def test_the_grid_shows_one_seed_of_each_prompt_in_every_round(runs):
    rounds, rows = Runs(runs).open("first").grid()
    assert rounds == [0, 1, 2] and len(rows) == 4
    for _, samples in rows:
        assert len({sample.seed for sample in samples if sample}) == 1 and None not in samples
    assert [text for text, _ in Runs(runs).open("first").grid(["a blue square"])[1]] == ["a blue square"]


def test_the_best_and_the_worst_of_a_prompt_are_those_of_its_scores(runs):
    run = Runs(runs).open("first")
    scores = SampleStore(run.path).read_scores(2)["jpeg"]
    found = run.extremes(2)
    assert len(found) == 4
    for text, best, worst in found:
        values = [scores[s.id] for s in SampleStore(run.path).read_samples(2) if s.prompt.text == text]
        assert best.parts["jpeg"] == max(values)
        assert worst.parts["jpeg"] == min(values)
    assert [text for text, _, _ in run.extremes(1, ["a red circle"])] == ["a red circle"]


def test_a_run_that_is_going_on_is_seen_and_grows(copied):
    folder = copied.folder / "first"
    (folder / "metrics.jsonl").write_bytes(b"".join((folder / "metrics.jsonl").read_bytes().splitlines(True)[:2]))
    shutil.rmtree(folder / "lora")
    before = copied.open("first")
    assert before.state == "not finished, 1 of 2 rounds done"
    with RunLock(folder):
        assert copied.open("first").state == "training, 1 of 2 rounds done"
    append_metrics(folder / "metrics.jsonl", replace(read_metrics(folder / "metrics.jsonl")[1], round=2))
    assert copied.open("first").signature != before.signature


def test_names_come_from_the_folder_alone(copied, tmp_path):
    make = copied.folder / "compare" / "raft-0"
    make.mkdir(parents=True)
    shutil.copy(copied.folder / "first" / "config.yaml", make)
    (tmp_path / "outside").mkdir()
    shutil.copy(copied.folder / "first" / "config.yaml", tmp_path / "outside")
    (copied.folder / "link").symlink_to(tmp_path / "outside")
    assert copied.names() == ["first", "compare/raft-0"]
    for name in ("../outside", "link", "/etc", "first/../first", "", "frist"):
        with pytest.raises(ConfigError, match="there is no run"):
            copied.open(name)


def test_what_is_shown_is_escaped(copied):
    run = copied.open("first")
    run.name = "<script>alert(1)</script>"
    html = pages.run_view([run], None, None)
    assert "<script>" not in html and "&lt;script&gt;alert(1)" in html
    assert "<img src=x" not in pages.status("<img src=x onerror=alert(1)>", "error")


# ------------------------------------------------------------------------------------------------ what the app opens on


def test_the_app_opens_on_the_runs_of_a_base(runs):
    model = str(runs.parent / "model")
    opening = open_on(Runs(runs), base=model)
    assert [lora.name for lora in opening.loras] == ["first"] and opening.model.path == model
    assert [reward.name for reward in opening.rewards] == ["jpeg", "shapes-rating"]
    assert opening.suggested.loras == ("first",) and opening.suggested.steps == 2 and opening.suggested.guidance == 1
    assert opening.prompts[0] == "a red circle" and opening.notes == []


def test_without_runs_it_opens_on_the_embedded_model_and_says_how_to_make_a_lora(tmp_path):
    opening = open_on(Runs(tmp_path), rewards=[RewardConfig(name="jpeg")])
    assert opening.model.path == "shapes" and opening.loras == [] and opening.prompts
    assert "`raftdiff demo` makes one" in opening.notes[0]
    assert [reward.name for reward in opening.rewards] == ["jpeg"]


def test_loras_come_from_run_folders_lora_folders_and_files(runs, tmp_path):
    file = tmp_path / "mine.safetensors"
    shutil.copy(runs / "first" / "lora" / "pytorch_lora_weights.safetensors", file)
    opening = open_on(Runs(tmp_path), loras=[str(runs / "first"), str(runs / "first" / "lora"), str(file)])
    assert [lora.name for lora in opening.loras] == ["first", "first-2", "mine"]
    assert opening.model.path == str(runs.parent / "model")  # that of the first LoRA's run
    with pytest.raises(WeightsError, match="there is no LoRA; give a run folder"):
        open_on(Runs(tmp_path), loras=[str(tmp_path / "none")])


def test_what_a_run_had_and_is_not_here_is_a_note(copied):
    path = copied.folder / "first" / "config.yaml"
    config = run_config(copied.folder, "first", copied.folder.parent / "model")
    rewards = [RewardConfig(name="jpeg"), RewardConfig(name="of-another-package")]
    prompts = config.evaluation.model_copy(update={"prompts": "gone.txt"})
    path.write_text(dump_config(config.model_copy(update={"rewards": rewards, "evaluation": prompts})))
    opening = open_on(copied, base=str(copied.folder.parent / "model"))
    assert "The prompts of first cannot be read" in opening.notes[0]
    assert "No scores of of-another-package" in opening.notes[1]
    assert isinstance(copied.open("first"), RunFolder)
