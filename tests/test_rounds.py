"""Whole runs: what they leave, and that nothing that happens to them changes it."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    ADAPTER_FILE,
    PROMPTS,
    ThreeWeights,
    Told,
    exported,
    in_child,
    pipeline_run,
    redness,
    three_weights_run,
    tiny_config,
    tiny_pipeline,
)

from raftdiff import align, checkpoint, interrupts
from raftdiff.algorithms.raft import Raft
from raftdiff.errors import ResumeError, RunLockedError, ScoringError, StorageError, WeightsError
from raftdiff.interrupts import Interrupted
from raftdiff.pipelines.diffusion import DiffusionPolicy
from raftdiff.report import read_metrics
from raftdiff.reward_models.jpeg import JpegReward
from raftdiff.rounds import Run, evaluate_run, run_rounds
from raftdiff.store import SampleStore
from raftdiff.types import Example, Prompt, Sample


def finish(config, *, resume: bool = False, **parts):
    return run_rounds(three_weights_run(config, **parts), resume=resume)


def finish_pipeline(config, *, resume: bool = False, **parts):
    return run_rounds(pipeline_run(config, **parts), resume=resume)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    """No test here cuts the power, so nothing has to wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The adapter of two rounds that nothing happened to."""
    return exported(finish(tiny_config(tmp_path_factory.mktemp("whole"))).folder)


@pytest.fixture(scope="module")
def whole_pipeline(tmp_path_factory):
    return finish_pipeline(tiny_config(tmp_path_factory.mktemp("whole-pipeline"), training={"save_every_steps": 2}))


# ------------------------------------------------------------------------------------------------ what a run leaves


def test_a_run_raises_its_reward_and_leaves_an_adapter_a_report_and_metrics(tmp_path):
    result = finish(tiny_config(tmp_path, rounds=6, sampling={"samples_per_prompt": 8}, training={"steps": 20}))
    gain = result.aligned[0].gains["redness"]
    assert gain.low > 10  # of 255
    assert result.report_path.read_text(encoding="utf-8").startswith("<!")
    assert [report.round for report in read_metrics(result.folder / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 6]
    assert (result.lora_path / ADAPTER_FILE).is_file() and (result.folder / "config.yaml").is_file()
    assert not list(result.folder.rglob("*.tmp"))


def test_align_takes_a_pipeline_prompts_and_a_function_and_gives_a_lora_that_loads(tmp_path):
    pipe = tiny_pipeline()
    before = [p.detach().clone() for p in pipe.vae.parameters()]
    result = align(
        pipe,
        PROMPTS[:2],
        reward=redness,
        rounds=1,
        output=str(tmp_path),
        tracker="none",
        sampling={"samples_per_prompt": 2, "num_inference_steps": 2, "guidance_scale": 1.0},
        training={"steps": 2, "learning_rate": 1e-2},
        evaluation={"seeds_per_prompt": 1},
    )
    assert result.report_path.name == "report.html" and result.report_path.is_file()
    fresh = tiny_pipeline()
    fresh.load_lora_weights(result.lora_path)
    trained = dict(pipe.unet.named_parameters())
    loaded = {name: p for name, p in fresh.unet.named_parameters() if "lora_" in name}
    assert loaded and any(p.abs().max() > 0 for name, p in loaded.items() if "lora_B" in name)
    for name, parameter in loaded.items():
        assert torch.equal(parameter, trained[name.replace("default_0", "raftdiff")]), name
    assert all(torch.equal(a, b) for a, b in zip(before, pipe.vae.parameters(), strict=True))


def test_the_ledger_counts_every_row_that_goes_through_the_denoiser(tmp_path):
    guided = {"sampling": {"guidance_scale": 2.0}, "training": {"guidance_scale": 2.0}}
    config = tiny_config(tmp_path, rounds=1, **guided, evaluation={"guidance_scales": [1.0]})
    base, first = finish_pipeline(config).reports
    cost = {stage.stage: stage.passes for stage in first.ledger}
    assert {stage.stage: stage.passes for stage in base.ledger} == {"evaluate": 4 * 2}  # prompts x steps
    assert cost["sample"] == 4 * 2 * 2 * 2  # prompts x samples x steps x (with and without the prompt)
    assert cost["train"] == 3 * 2 * (3 + 1)  # steps x batch x (there and back with the prompt, there without)
    assert cost["evaluate"] == 4 * 2
    assert cost["score"] == cost["select"] == 0


def test_held_out_seeds_are_never_trained_on(tmp_path):
    folder = finish(tiny_config(tmp_path)).folder
    trained = {s.seed for round in (1, 2) for s in SampleStore(folder).read_samples(round)}
    judged = {s.seed for s in SampleStore(folder / "evaluation" / "guidance-1").read_samples(2)}
    assert len(trained) == 16 and len(judged) == 4 and not trained & judged


def test_rounds_walk_through_the_prompts_before_any_comes_again(tmp_path):
    folder = finish(tiny_config(tmp_path, prompts={"per_round": 2})).folder
    seen = [s.prompt.text for round in (1, 2) for s in SampleStore(folder).read_samples(round)]
    assert Counter(seen) == dict.fromkeys(PROMPTS, 2)


def test_guidance_of_the_evaluation_is_the_policys_own_where_none_is_set(tmp_path):
    config = tiny_config(tmp_path, rounds=1, sampling={"guidance_scale": None})
    policy = ThreeWeights()
    policy.guidance_scale = 7.5
    assert finish(config, policy=policy).base[0].guidance_scale == 7.5


# ------------------------------------------------------------------------------------------------ going on


def test_one_round_and_then_a_second_is_the_same_as_two(tmp_path, whole_pipeline):
    settings = {"training": {"save_every_steps": 2}}
    finish_pipeline(tiny_config(tmp_path, rounds=1, **settings))
    resumed = finish_pipeline(tiny_config(tmp_path, rounds=2, **settings), resume=True)
    assert exported(resumed.folder) == exported(whole_pipeline.folder)
    assert [r.training for r in resumed.reports] == [r.training for r in whole_pipeline.reports]


def test_killed_at_any_write_a_run_ends_with_the_same_adapter(tmp_path, whole):
    """SIGKILL before the n-th write, n spread over the run; half of them are killed again while they resume."""

    def killer(at: int) -> Callable[[], None]:
        writes = count(1)
        return lambda: os.kill(os.getpid(), signal.SIGKILL) if next(writes) == at else None

    writes = tmp_path / "writes"
    config = tiny_config(tmp_path / "counted", training={"save_every_steps": 2})
    tick = writes.open("ab", buffering=0)
    assert in_child(lambda: finish(config), on_write=lambda: tick.write(b"."), of=config.folder) == 0
    tick.close()
    assert exported(config.folder) == whole
    total = writes.stat().st_size
    assert total > 60
    for i in range(12):
        config = tiny_config(tmp_path / f"killed-{i}", training={"save_every_steps": 2})
        at = 3 + i * (total - 4) // 11  # from the first write into the folder to the last one
        assert in_child(lambda c=config: finish(c), on_write=killer(at), of=config.folder) == -signal.SIGKILL
        begun = (config.folder / "config.yaml").exists()
        if begun and i % 2:
            killed_again = in_child(lambda c=config: finish(c, resume=True), on_write=killer(9), of=config.folder)
            assert killed_again in (-signal.SIGKILL, 0)
        finish(config, resume=begun)
        assert exported(config.folder) == whole, f"killed before write {at} of {total}"
        assert not list(config.folder.rglob("*.tmp"))
        shutil.rmtree(config.folder)


def test_a_killed_pipeline_goes_on_in_the_middle_of_a_round(tmp_path, whole_pipeline):
    config = tiny_config(tmp_path, training={"save_every_steps": 2})

    def kill_when_there() -> None:
        if (config.folder / "checkpoints" / "round-0001-step-00002").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(lambda: finish_pipeline(config), on_write=kill_when_there, of=config.folder) == -signal.SIGKILL
    told = Told()
    resumed = finish_pipeline(config, resume=True, display=told)
    assert "resumed after round 1 and 2 steps" in told.text
    assert exported(resumed.folder) == exported(whole_pipeline.folder)
    assert resumed.reports[2].training == whole_pipeline.reports[2].training  # the steps before the kill count


@pytest.mark.parametrize("stage", ["sample", "score", "train", "evaluate"])
@pytest.mark.parametrize("round", [1, 2])
def test_sigterm_in_any_stage_stops_with_143_and_the_run_goes_on_to_the_same_adapter(tmp_path, whole, stage, round):
    config = tiny_config(tmp_path)
    told = Told(lambda at, name: terminate() if (at, name) == (round, stage) else None)
    with pytest.raises(Interrupted) as stopped:
        finish(config, display=told)
    assert stopped.value.exit_code == 143
    if stage == "train":
        assert f"round-{round - 1:04d}-step-00001" in checkpoints(config.folder)
    if stage == "sample":
        assert not SampleStore(config.folder).read_samples(round)  # nothing more was begun
    assert exported(finish(config, resume=True).folder) == whole
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sigterm_in_the_last_step_keeps_all_steps_of_the_round(tmp_path, whole):
    class Last(Told):
        def advance(self, count=1, metrics=None):
            self.steps = getattr(self, "steps", 0) + (metrics is not None)
            if metrics is not None and self.steps == 3:
                terminate()

    config = tiny_config(tmp_path)
    with pytest.raises(Interrupted):
        finish(config, display=Last())
    assert checkpoints(config.folder) == ["round-0000-step-00003"]
    result = finish(config, resume=True)
    assert exported(result.folder) == whole and result.reports[1].training["steps"] == 3


def test_a_scorer_that_hangs_is_left_after_the_grace_period(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(interrupts, "GRACE_S", 0.05)

    def hang(images, prompts):
        terminate()
        while True:
            pass

    config = tiny_config(tmp_path)
    with pytest.raises(Interrupted):
        finish(config, reward=hang)
    monkeypatch.undo()
    assert exported(finish(config, resume=True).folder) == whole


def test_ctrl_c_exits_with_130(tmp_path):
    told = Told(lambda round, stage: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted) as stopped:
        finish(tiny_config(tmp_path), display=told)
    assert stopped.value.exit_code == 130


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, whole, damage):
    config = tiny_config(tmp_path)
    finish(config)
    newest = config.folder / "checkpoints" / "round-0002-step-00000"
    file = newest / "adapter.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    {
        "flip": lambda: file.write_bytes(data),
        "truncate": lambda: file.write_bytes(data[:-1]),
        "empty": lambda: file.write_bytes(b""),
        "remove": file.unlink,
    }[damage]()
    told = Told()
    assert exported(finish(config, resume=True, display=told).folder) == whole
    assert f"{newest} is skipped: adapter.safetensors" in told.text
    assert "resumed after round 1 from" in told.text


def test_with_no_checkpoint_left_a_run_is_not_silently_begun_again(tmp_path):
    config = tiny_config(tmp_path)
    finish(config)
    for manifest in config.folder.glob("checkpoints/*/manifest.json"):
        manifest.write_bytes(b"{}")
    with pytest.raises(ResumeError, match="no checkpoint can be read"):
        finish(config, resume=True)
    shutil.rmtree(config.folder / "checkpoints")
    with pytest.raises(ResumeError, match="no checkpoint can be read"):
        finish(config, resume=True)
    assert len(read_metrics(config.folder / "metrics.jsonl")) == 3  # and nothing is touched


def test_falling_back_forgets_what_later_models_made(tmp_path):
    config = tiny_config(tmp_path, rounds=3)
    finish(config)
    for later in ("round-0003-step-00000", "round-0002-step-00000"):
        (config.folder / "checkpoints" / later / "manifest.json").unlink()
    changed = tiny_config(tmp_path, rounds=3, training={"learning_rate": 0.5})
    resumed = finish(changed, resume=True)
    apart = tmp_path / "apart"
    finish(tiny_config(apart, rounds=1))
    straight = finish(tiny_config(apart, rounds=3, training={"learning_rate": 0.5}), resume=True)
    assert exported(resumed.folder) == exported(straight.folder)
    assert resumed.reports[3].evaluations == straight.reports[3].evaluations


def test_what_identifies_a_run_cannot_be_changed_and_the_rest_is_shown(tmp_path, whole):
    finish(tiny_config(tmp_path, rounds=1))
    with pytest.raises(ResumeError, match=re.escape("seed: 0 -> 7")):
        finish(tiny_config(tmp_path, seed=7), resume=True)
    with pytest.raises(ResumeError, match=re.escape("evaluation.seeds_per_prompt: 1 -> 2")):
        finish(tiny_config(tmp_path, evaluation={"seeds_per_prompt": 2}), resume=True)
    told = Told()
    changed = tiny_config(tmp_path, rounds=2, max_failed=0.5, model={"device": "cpu"})
    assert exported(finish(changed, resume=True, display=told).folder) == whole
    assert {"resuming with rounds: 1 -> 2", "resuming with max_failed: 0.25 -> 0.5"} <= set(told.messages)


def test_a_folder_with_a_run_needs_resume_and_one_without_cannot_be_resumed(tmp_path):
    config = tiny_config(tmp_path, rounds=1)
    with pytest.raises(ResumeError, match="no run to resume"):
        finish(config, resume=True)
    finish(config)
    with pytest.raises(ResumeError, match=f"raftdiff resume {config.folder}"):
        finish(config)


def test_a_second_run_in_the_same_folder_is_refused_with_the_owner(tmp_path):
    config = tiny_config(tmp_path, rounds=1)

    def second(round: int, stage: str) -> None:
        if (round, stage) == (1, "sample"):
            refused.append(in_child(refused_run))

    def refused_run() -> None:
        with pytest.raises(RunLockedError, match=f"in use by process {os.getppid()} on "):
            finish(config, resume=True)

    refused: list[int] = []
    finish(config, display=Told(second))
    assert refused == [0]


def test_another_base_model_is_refused(tmp_path):
    finish(tiny_config(tmp_path, rounds=1))
    with pytest.raises(ResumeError, match=re.escape("another base model (three-0.0, here three-0.5)")):
        finish(tiny_config(tmp_path), resume=True, policy=ThreeWeights(base=0.5))


def test_a_lora_of_another_base_does_not_load(whole_pipeline):
    other = DiffusionPolicy(tiny_pipeline(), guidance_scale=1.0)  # of rank 16
    saved = checkpoint.Checkpoints(whole_pipeline.folder / "checkpoints").load(2)
    with pytest.raises(WeightsError, match="does not fit this model"):
        other.load_adapter(saved.tensors("adapter"))


@pytest.mark.parametrize("write", [1, 8, 14, 21, 27])
def test_a_full_disk_is_one_error_that_leaves_a_run_to_resume(tmp_path, whole, monkeypatch, write):
    config = tiny_config(tmp_path, training={"save_every_steps": 2})
    writes = count(1)
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if next(writes) >= write * 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=f"{tmp_path}.*No space left on device"):
        finish(config)
    monkeypatch.undo()
    assert not list(config.folder.rglob("*.tmp"))
    assert exported(finish(config, resume=(config.folder / "config.yaml").exists()).folder) == whole


# ------------------------------------------------------------------------------------------------ failures counted


def test_requested_is_scored_and_failed_and_skipped_exactly(tmp_path):
    """One black picture of each 4 prompts, and a scorer that raises on one prompt and gives NaN for another."""

    def unsure(images, prompts):
        if any("yellow" in prompt for prompt in prompts):
            raise ValueError("no yellow")
        return [math.nan if "green" in p else value for p, value in zip(prompts, redness(images, prompts), strict=True)]

    config = tiny_config(tmp_path, max_failed=0.7)
    result = finish(config, reward=unsure, policy=ThreeWeights(flawed=["a blue square"]))
    for report in result.reports[1:]:
        assert (report.requested, report.scored, report.failed, report.skipped, report.selected) == (8, 2, 4, 2, 1)
    assert result.base[0].failed == 3


def test_failures_that_were_allowed_are_not_asked_about_again(tmp_path):
    asked: list[str] = []

    def unsure(images, prompts):
        asked.extend(prompts)
        return [math.nan if "green" in p else 1.0 for p in prompts]

    config = tiny_config(tmp_path, rounds=1)
    told = Told(lambda round, stage: terminate() if (round, stage) == (1, "train") else None)
    with pytest.raises(Interrupted):
        finish(config, reward=unsure, display=told)
    asked.clear()
    report = finish(config, reward=unsure, resume=True).reports[1]
    assert len(asked) == 4  # only the evaluation is new
    assert (report.scored, report.failed) == (6, 2)


def test_too_many_failures_stop_the_run_and_it_resumes_with_a_higher_share_or_a_mended_reward(tmp_path, whole):
    calls = count()

    def breaks_after_the_base(images, prompts):
        return redness(images, prompts) if next(calls) < 1 else [math.nan] * len(images)

    for name in ("higher", "mended"):
        calls = count()
        config = tiny_config(tmp_path / name)
        with pytest.raises(ScoringError, match="'redness' failed on 8 of 8 samples.*0.25.*max_failed"):
            finish(config, reward=breaks_after_the_base)
        if name == "mended":
            assert exported(finish(config, resume=True).folder) == whole
        else:
            higher = tiny_config(tmp_path / name, max_failed=1.0)
            reports = finish(higher, reward=breaks_after_the_base, resume=True).reports
            assert [report.failed for report in reports[1:]] == [8, 8]


def test_two_empty_rounds_stop_the_run_and_resuming_does_not_add_a_third(tmp_path):
    config = tiny_config(tmp_path, rounds=5, algorithm={"options": {"min_reward": 1e9}})
    told = Told()
    result = finish(config, display=told)
    assert [report.selected for report in result.reports] == [0, 0, 0]
    assert told.messages == ["stopped after round 2: 2 rounds in a row selected nothing to train on"]
    assert len(finish(config, resume=True).reports) == 3


# ------------------------------------------------------------------------------------------------ selection and data


def of_own_data(texts: int) -> list[Example]:
    samples = [
        Sample(id=f"data-{i}", prompt=Prompt(text=f"own {i}"), seed=0, latents=torch.full((3, 2, 2), 5.0))
        for i in range(texts)
    ]
    return [Example(sample=sample) for sample in samples]


class Seen(Raft):
    """RAFT that keeps which samples it trained on."""

    def loss(self, policy, batch):
        seen.update(s.id.split("-")[0] for s in batch.samples)
        return super().loss(policy, batch)


seen: Counter[str] = Counter()


def test_replay_and_own_data_take_the_stated_shares_of_the_training_set(tmp_path):
    seen.clear()
    config = tiny_config(
        tmp_path,
        training={"steps": None, "epochs": 1},
        algorithm={"replay": 0.25},
        data={"path": "unused", "share": 0.5},
    )
    result = finish(config, algorithm=Seen(), data=of_own_data(3))
    assert [report.selected for report in result.reports] == [0, 8, 16]
    # Round 1: 4 of its own and as many pictures; round 2: 4 of its own, 4 of round 1, 8 pictures.
    assert seen == {"0001": 4 + 4, "0002": 4, "data": 4 + 8}


def test_a_teacher_samples_and_the_student_trains(tmp_path):
    teacher, student = ThreeWeights(base=0.0), ThreeWeights(base=0.0)
    with torch.no_grad():
        teacher.color.copy_(torch.tensor([3.0, 0.0, -3.0]))
    result = finish(tiny_config(tmp_path, rounds=1, training={"steps": 40}), teacher=teacher, policy=student)
    assert teacher.color.tolist() == [3.0, 0.0, -3.0]
    red, _, blue = student.color.tolist()
    assert red > 1 and blue < -1  # what it saw was the teacher's
    assert {cost.stage: cost.passes for cost in result.reports[1].ledger}["sample"] == 8


def test_kl_regularised_ranking_measures_how_far_the_samples_are_from_the_base(tmp_path):
    config = tiny_config(tmp_path, algorithm={"options": {"kl_beta": 0.1}})
    _, first, second = finish(config).reports
    assert first.rewards["log_ratio"] == 0.0  # the model is its own reference yet
    assert second.rewards["log_ratio"] != 0.0
    costs = {cost.stage: cost.passes for cost in second.ledger}
    assert costs["log-ratio"] == 2 * 8


class BestThenWorst(Raft):
    """Selects the best in the first two rounds and the worst from then on."""

    def select(self, groups, *, round, seed, phase):
        if round <= 2:
            return super().select(groups, round=round, seed=seed, phase=phase)
        return [Example(sample=min(g.ranked, key=lambda s: s.reward).sample) for g in groups]


def test_the_best_round_is_exported_however_long_ago_it_was(tmp_path):
    config = tiny_config(
        tmp_path, rounds=7, training={"steps": 12, "save_every_steps": 5}, sampling={"samples_per_prompt": 4}
    )
    policy = ThreeWeights()
    result = finish(config, algorithm=BestThenWorst(), policy=policy)
    rewards = [report.evaluations[0].metrics["reward"].mean for report in result.reports]
    assert result.verdict.best == 2 == max(range(8), key=rewards.__getitem__) and rewards[7] < rewards[2]
    best = checkpoint.Checkpoints(config.folder / "checkpoints").load(2).tensors("adapter")
    assert torch.equal(policy.color, best["color"])  # it is on the policy as well
    assert checkpoint.read_meta(result.lora_path)["round"] == 2
    assert result.aligned == result.reports[2].evaluations
    again = finish(config, algorithm=BestThenWorst(), resume=True)
    assert exported(again.folder) == exported(result.folder)


def test_the_moving_average_is_what_is_exported(tmp_path):
    result = finish(tiny_config(tmp_path, rounds=1, training={"ema_decay": 0.9}))
    saved = checkpoint.Checkpoints(result.folder / "checkpoints").load(1)
    policy = ThreeWeights()
    policy.load_adapter(saved.tensors("average"))
    policy.export(tmp_path)
    assert exported(result.folder) == (tmp_path / ADAPTER_FILE).read_bytes()
    assert not torch.equal(saved.tensors("average")["color"], saved.tensors("adapter")["color"])


def test_a_run_stops_when_its_reward_is_flat(tmp_path):
    config = tiny_config(
        tmp_path, rounds=9, training={"learning_rate": 1e-9}, evaluation={"plateau_rounds": 3, "seeds_per_prompt": 2}
    )
    told = Told()
    result = finish(config, display=told)
    assert len(result.reports) == 4 and result.verdict.kind == "plateau"
    assert told.messages == [f"stopped after round 3: {result.verdict.message}"]
    assert len(finish(config, resume=True).reports) == 4


def test_evaluation_every_other_round_still_measures_the_base_and_the_last(tmp_path):
    result = finish(tiny_config(tmp_path, rounds=3, evaluation={"every": 2}), watched=[JpegReward()])
    assert [bool(report.evaluations) for report in result.reports] == [True, False, True, True]
    assert set(result.aligned[0].gains) >= {"reward", "redness", "jpeg-compressibility"}


def test_a_finished_run_is_evaluated_on_other_seeds_without_being_touched(tmp_path):
    config = tiny_config(tmp_path)
    finish(config)
    before = {path: path.read_bytes() for path in config.folder.rglob("*") if path.is_file()}
    more = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"seeds_per_prompt": 3})})
    (base,), (aligned,) = evaluate_run(three_weights_run(more))
    assert len(base.per_sample["redness"]) == len(aligned.per_sample["redness"]) == 12
    assert aligned.metrics["redness"].mean != base.metrics["redness"].mean
    assert {path: path.read_bytes() for path in config.folder.rglob("*") if path.is_file()} == before


def test_a_run_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Run.__setattr__(object.__new__(Run), "config", None)
