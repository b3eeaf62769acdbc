"""Two processes take the same course as one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from safetensors.torch import load
from tiny_families_b import CALLS, qwen_image
from tiny_models import FAMILIES, stable_diffusion_3
from tiny_runs import PROMPTS, ThreeWeights, exported, pipeline_run, redness, three_weights_run, tiny_config
from torch.distributed.tensor import DTensor

from raftdiff.algorithms.raft import Raft
from raftdiff.build import build
from raftdiff.config import AdapterConfig, TrainingConfig
from raftdiff.errors import ConfigError
from raftdiff.pipelines.diffusion import DiffusionPolicy
from raftdiff.report import read_metrics
from raftdiff.reward_models.function import FunctionReward
from raftdiff.rounds import run_rounds
from raftdiff.sharding import shard
from raftdiff.store import SampleStore
from raftdiff.training import Trainer
from raftdiff.types import Example, Prompt


def in_two_processes(function: Callable[[], object]) -> None:
    """Forked, so that they have paid for their imports; gloo on the CPU."""

    def work() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # of the process that they are forked from
        assert Accelerator().num_processes == 2
        function()

    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(work, num_processes=2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Three rounds of one process."""
    config = tiny_config(tmp_path_factory.mktemp("alone"), rounds=3, prompts={"per_round": 2})
    run_rounds(three_weights_run(config))
    return config.folder


def sample_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("part-*.parquet"))}


def test_a_run_of_the_pipeline_takes_the_same_course(tmp_path):
    config = {name: tiny_config(tmp_path / name, rounds=2, training={"learning_rate": 1e-3}) for name in ("one", "two")}
    run_rounds(pipeline_run(config["one"]))
    in_two_processes(lambda: run_rounds(pipeline_run(config["two"])))
    one, two = config["one"].folder, config["two"].folder
    first = [name for name in sample_bytes(one) if "round-0001" in name or "round-0000" in name]
    first = [name for name in first if name.startswith("samples") or "round-0000" in name]
    assert len(first) == 3  # two batches of the round, one of the base's evaluation
    assert all(sample_bytes(two)[name] == sample_bytes(one)[name] for name in first)
    ones, twos = load(exported(one)), load(exported(two))
    assert ones.keys() == twos.keys()
    assert all(torch.allclose(ones[name], twos[name], atol=1e-5) for name in ones)
    for a, b in zip(read_metrics(one / "metrics.jsonl"), read_metrics(two / "metrics.jsonl"), strict=True):
        assert [cost.passes for cost in a.ledger] == [cost.passes for cost in b.ledger]
        assert (a.requested, a.scored, a.selected) == (b.requested, b.scored, b.selected)
        assert a.training == pytest.approx(b.training, rel=1e-4)


def gradient_of_one_step(samples: int, batch_size: int) -> dict[str, list[float]]:
    policy = ThreeWeights()
    prompts = [Prompt(text=f"prompt {i}") for i in range(samples)]
    drawn = policy.sample(prompts, range(samples))
    chosen = [Example(sample=sample, weight=1.0 + i) for i, sample in enumerate(drawn)]
    settings = TrainingConfig(batch_size=batch_size, steps=1, weight_decay=0, max_grad_norm=1e9, micro_batch_size=2)
    trainer = Trainer(policy, Raft(), settings, seed=1, rounds=1, accelerator=Accelerator())
    metrics = trainer.train(chosen, round=1)
    (moments,) = trainer.optimizer.state.values()
    return {"gradient": (moments["exp_avg"] / 0.1).tolist(), "loss": [metrics["loss"]]}


@pytest.mark.parametrize(("samples", "batch_size"), [(7, 7), (1, 1)])
def test_the_gradient_of_a_step_is_that_of_one_process(tmp_path, samples, batch_size):
    """Also where the rows do not divide by the processes, and where a process has none."""
    expected = gradient_of_one_step(samples, batch_size)

    def work() -> None:
        found = gradient_of_one_step(samples, batch_size)
        (tmp_path / str(Accelerator().process_index)).write_text(json.dumps(found))

    in_two_processes(work)
    for rank in "01":
        found = json.loads((tmp_path / rank).read_text())
        assert found == {name: pytest.approx(values, abs=1e-6) for name, values in expected.items()}


def test_a_run_resumes_with_more_and_with_fewer_processes(tmp_path, alone):
    def config(rounds: int):
        return tiny_config(tmp_path, rounds=rounds, prompts={"per_round": 2})

    run_rounds(three_weights_run(config(1)))
    in_two_processes(lambda: run_rounds(three_weights_run(config(2)), resume=True))
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = run_rounds(three_weights_run(config(3)), resume=True).folder
    store = SampleStore(folder)
    seen = [[s.prompt.text for s in store.read_samples(round)] for round in (1, 2, 3)]
    assert Counter(seen[0] + seen[1]) == dict.fromkeys(PROMPTS, 2)
    assert [[s.id for s in store.read_samples(r)] for r in (1, 2, 3)] == [
        [s.id for s in SampleStore(alone).read_samples(r)] for r in (1, 2, 3)
    ]
    assert torch.allclose(load(exported(folder))["color"], load(exported(alone))["color"], atol=1e-5)


def test_failed_samples_are_counted_over_all_processes(tmp_path):
    """All that fail are in the share of one process: of the whole they are a quarter, which is allowed."""

    def fails_on_first(images, prompts):
        return [float("nan") if prompt == PROMPTS[0] else 1.0 for prompt in prompts]

    config = tiny_config(tmp_path, rounds=1, sampling={"samples_per_prompt": 2})
    in_two_processes(lambda: run_rounds(three_weights_run(config, reward=fails_on_first)))
    report = read_metrics(config.folder / "metrics.jsonl")[1]
    assert (report.requested, report.scored, report.failed, report.skipped) == (8, 6, 2, 0)


@pytest.fixture
def split_weights(monkeypatch):
    """What `accelerate launch --use_fsdp --fsdp_version 2` sets."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")


@pytest.mark.parametrize("family", FAMILIES)
def test_split_weights_give_the_gradients_of_whole_ones(tmp_path, split_weights, family):
    def gradients(split: bool) -> list[torch.Tensor]:
        policy = DiffusionPolicy(FAMILIES[family](), AdapterConfig(rank=2), num_inference_steps=1, guidance_scale=1.0)
        if split:
            shard(policy, Accelerator())
            frozen = [p for p in policy.denoiser.parameters() if not p.requires_grad]
            kept = sum(p.to_local().numel() for p in frozen if isinstance(p, DTensor))
            assert 0.4 < kept / sum(p.numel() for p in frozen) < 0.6
        samples = policy.sample([Prompt(text="a red circle")], [0])
        policy.error(samples, policy.draw(samples, torch.Generator().manual_seed(0))).sum().backward()
        return [p.grad for p in policy.parameters() if p.grad is not None]

    torch.save(gradients(split=False), tmp_path / "whole.pt")

    def work() -> None:
        whole, found = torch.load(tmp_path / "whole.pt"), gradients(split=True)
        assert len(found) == len(whole) and any(grad.any() for grad in found)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, whole, strict=True))

    in_two_processes(work)


def test_a_run_with_split_weights_takes_the_same_course(tmp_path, split_weights):
    """Both the single batch of an evaluation and the three rows of a step leave a process without work of its own."""
    training = {"learning_rate": 1e-3, "batch_size": 3, "micro_batch_size": 1, "steps": 2, "ema_decay": 0.5}
    stable_diffusion_3().save_pretrained(tmp_path / "model")
    settings = {"rounds": 2, "training": training, "model": {"path": str(tmp_path / "model")}}
    config = {name: tiny_config(tmp_path / name, **settings) for name in ("one", "two")}
    rewards = {"redness": FunctionReward(redness, "redness")}
    run_rounds(build(config["one"], rewards=rewards))
    in_two_processes(lambda: run_rounds(build(config["two"], rewards=rewards)))
    ones, twos = (load(exported(config[name].folder)) for name in ("one", "two"))
    assert ones.keys() == twos.keys()
    assert all(torch.allclose(ones[name], twos[name], atol=1e-5) for name in ones)
    one, two = (read_metrics(config[name].folder / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one[1:], two[1:], strict=True):
        assert a.training == pytest.approx(b.training, rel=1e-3)


def test_prompts_of_several_lengths_are_refused_with_split_weights(split_weights):
    def work() -> None:
        policy = DiffusionPolicy(qwen_image(), AdapterConfig(rank=2), num_inference_steps=1, call=CALLS["qwen-image"])
        shard(policy, Accelerator())
        prompts = [Prompt(text="a red circle"), Prompt(text="a small red circle above a large blue square")]
        assert len([policy.sample([prompt], [0]) for prompt in prompts]) == 2
        with pytest.raises(ConfigError, match=r"set sampling\.batch_size and training\.micro_batch_size to 1\Z"):
            policy.sample(prompts, [0, 0])

    in_two_processes(work)


def test_full_fine_tuning_cannot_be_split(tmp_path, split_weights):
    config = tiny_config(tmp_path, adapter={"method": "full"})

    def work() -> None:
        with pytest.raises(ConfigError, match="adapter.method: full"):
            pipeline_run(config)

    in_two_processes(work)
