"""Supervised fine-tuning trains on the user's own pictures and on nothing else."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import Told, exported, pipeline_run, redness, three_weights_run, tiny_config

from raftdiff.algorithms.sft import Sft
from raftdiff.build import build_algorithm
from raftdiff.config import RunConfig
from raftdiff.errors import ConfigError
from raftdiff.interrupts import Interrupted
from raftdiff.rounds import Quiet, run_rounds
from raftdiff.store import SampleStore
from raftdiff.types import Batch, Draw, Example, Phase, Prompt, Sample

LATENTS = torch.tensor([2.0, -2.0, -2.0])[:, None, None].expand(3, 2, 2)
RED = [Example(sample=Sample(id=f"data-{i}", prompt=Prompt(text="red"), seed=0, latents=LATENTS)) for i in range(3)]


def sft_config(output, **settings) -> RunConfig:
    return tiny_config(output, algorithm={"name": "sft"}, data={"path": "unused"}, **settings)


def finish(config, *, resume: bool = False, **parts):
    return run_rounds(three_weights_run(config, data=RED, **parts), resume=resume)


def test_a_run_trains_on_all_of_the_users_pictures_samples_nothing_and_is_judged_by_the_reward(tmp_path):
    asked: list[str] = []

    def counted(images, prompts):
        asked.extend(prompts)
        return redness(images, prompts)

    config = sft_config(tmp_path, training={"steps": None, "epochs": 20})
    result = finish(config, reward=counted)
    assert [report.selected for report in result.reports] == [0, 3, 3]
    assert [report.requested for report in result.reports] == [0, 0, 0]
    assert not any(cost.stage == "sample" for report in result.reports for cost in report.ledger)
    assert SampleStore(config.folder).rounds() == []
    assert len(asked) == 3 * 4  # the held-out prompts of the base and of two rounds
    assert result.aligned[0].gains["redness"].mean > 50  # of 255
    assert result.report_path.is_file()


def test_stopped_in_training_a_run_goes_on_to_the_same_adapter(tmp_path):
    whole = exported(finish(sft_config(tmp_path / "whole")).folder)
    config = sft_config(tmp_path / "stopped")
    told = Told(lambda round, stage: os.kill(os.getpid(), signal.SIGTERM) if (round, stage) == (2, "train") else None)
    with pytest.raises(Interrupted):
        finish(config, display=told)
    assert exported(finish(config, resume=True).folder) == whole


class Counted(Quiet):
    """A display that keeps how far each stage came, and of how much."""

    def __init__(self) -> None:
        self.counts: dict[str, tuple[int, int]] = {}

    def stage(self, round, name, total):
        self.name = name
        self.counts[name] = (0, total)

    def advance(self, count=1, metrics=None):
        done, total = self.counts[self.name]
        self.counts[self.name] = (done + count, total)


def test_a_pipeline_learns_the_pictures_of_a_folder(tmp_path):
    for i in range(2):
        Image.fromarray(np.full((20, 24, 3), (255, 0, 0), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    lines = [f'{{"file_name": "{i}.png", "text": "a red circle"}}\n' for i in range(2)]
    (tmp_path / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    config = tiny_config(tmp_path, rounds=1, algorithm={"name": "sft"}, data={"path": str(tmp_path)})
    shown = Counted()
    report = run_rounds(pipeline_run(config, display=shown)).reports[-1]
    assert shown.counts["own data"] == (2, 2)
    assert report.selected == 2 and report.training["steps"] == 3
    assert report.training["error"] == pytest.approx(report.training["loss"])


def test_the_loss_is_the_error_of_each_picture():
    class Policy:
        def error(self, samples, draw):
            return torch.tensor([float(len(sample.id)) for sample in samples])

    draw = Draw(noise=torch.zeros(2, 1), quantile_B=torch.zeros(2), dropped_B=torch.zeros(2, dtype=torch.bool))
    batch = Batch(examples=RED[:2], weight_B=torch.ones(2), draw=draw)
    assert Sft().loss(Policy(), batch)[0].tolist() == [6.0, 6.0]  # type: ignore[arg-type]
    assert Sft().select([], round=1, seed=0, phase=Phase(grown=1)) == []


def test_it_needs_the_users_pictures_and_takes_no_settings_of_samples():
    with pytest.raises(ConfigError, match=r"set data\.path"):
        build_algorithm(RunConfig.model_validate({"algorithm": {"name": "sft"}}))
    for settings in ({"replay": 0.2}, {"teacher": "shapes"}):
        config = RunConfig.model_validate({"algorithm": {"name": "sft"} | settings, "data": {"path": "x"}})
        with pytest.raises(ConfigError, match=r"leave out algorithm\.replay and algorithm\.teacher"):
            build_algorithm(config)
