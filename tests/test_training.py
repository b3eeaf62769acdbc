"""The optimizer loop, by hand: on a policy with two weights whose error is a square."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from raftdiff.algorithms.raft import Raft
from raftdiff.config import TrainingConfig
from raftdiff.errors import ConfigError, TrainingError, WeightsError
from raftdiff.protocols import Policy
from raftdiff.training import Trainer, steps_and_rows
from raftdiff.types import Draw, Example, Prompt, Sample


class Linear:
    """error = (w . x - noise)^2, with one number of noise a row; `memory` rows at once are all that fit."""

    modality = "image"

    def __init__(self, weight: Sequence[float] = (1.0, -1.0), *, memory: int = 1000, noisy: bool = False) -> None:
        self.weight = torch.nn.Parameter(torch.tensor(weight))
        self.passes = 0
        self.memory = memory
        self.noisy = noisy
        self.batches: list[list[str]] = []

    def sample(self, prompts, seeds, *, guidance_scale=None, noise_level=None):
        raise NotImplementedError

    def draw(self, samples: Sequence[Sample], generator: torch.Generator) -> Draw:
        noise = torch.randn(len(samples), generator=generator) if self.noisy else torch.zeros(len(samples))
        return Draw(noise=noise, quantile_B=torch.zeros(len(samples)), dropped_B=torch.zeros(len(samples)).bool())

    def error(self, samples: Sequence[Sample], draw: Draw) -> torch.Tensor:
        if len(samples) > self.memory:
            raise torch.OutOfMemoryError("no room")
        self.batches.append([s.id for s in samples])
        x_B2 = torch.stack([s.latents for s in samples if s.latents is not None])
        return (x_B2 @ self.weight - draw.noise).square()

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.weight]

    def reference(self):
        return nullcontext()

    def adapter_state(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight.detach().clone()}

    def load_adapter(self, state) -> None:
        with torch.no_grad():
            self.weight.copy_(state["weight"])

    def export(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        raise NotImplementedError

    def fingerprint(self) -> str:
        return "linear"


def examples(*rows: tuple[float, float], weights: Sequence[float] | None = None) -> list[Example]:
    samples = [
        Sample(id=str(i), prompt=Prompt(text=""), seed=i, latents=torch.tensor(row).float())
        for i, row in enumerate(rows)
    ]
    return [Example(sample=s, weight=w) for s, w in zip(samples, weights or [1.0] * len(samples), strict=True)]


def trainer(policy: Linear, *, rounds: int = 1, **settings) -> Trainer:
    return Trainer(
        policy,
        Raft(),
        TrainingConfig(**{"learning_rate": 0.1, "weight_decay": 0.0, "max_grad_norm": 1e9} | settings),
        seed=3,
        rounds=rounds,
        accelerator=Accelerator(),
    )


SEVEN = examples((1, 0), (0, 1), (1, 1), (2, 0), (0, -2), (1, -1), (-1, 2), weights=[1, 2, 0.5, 1, 1, 3, 1])


def test_the_policy_of_these_tests_is_one():
    assert isinstance(Linear(), Policy)


def test_loss_and_gradient_are_the_weighted_mean_over_the_batch():
    # w = (1, -1): errors 1, 1, 4 for x = (1, 0), (0, 1), (2, 0); d error / d w = 2 (w.x) x
    policy = Linear()
    metrics = trainer(policy, batch_size=3, steps=1).train(
        examples((1, 0), (0, 1), (2, 0), weights=[1.0, 3.0, 0.5]), round=1
    )
    assert metrics["loss"] == pytest.approx((1 * 1 + 3 * 1 + 0.5 * 4) / 3)
    gradient = (1 * 2 * 1 + 0.5 * 2 * 2 * 2) / 3, 3 * 2 * -1 / 3
    assert metrics["gradient_norm"] == pytest.approx(math.hypot(*gradient))
    # The first step of Adam moves each weight by the learning rate against its gradient's sign.
    assert policy.weight.tolist() == pytest.approx([0.9, -0.9], abs=1e-5)


def test_a_large_gradient_is_scaled_down_to_the_configured_norm():
    policy = Linear((1000.0, 0.0))
    trainer(policy, batch_size=1, steps=1, max_grad_norm=0.5).train(examples((1, 0)), round=1)
    free = Linear((1000.0, 0.0))
    loop = trainer(free, batch_size=1, steps=1, max_grad_norm=0.5)
    loop.train(examples((1, 0)), round=1)
    (moments,) = loop.optimizer.state.values()
    assert moments["exp_avg"].tolist() == pytest.approx([0.1 * 0.5, 0.0])  # (1 - beta_1) * gradient


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 4])
def test_micro_batches_add_up_to_the_batch(micro_batch_size):
    whole, parts = Linear(noisy=True), Linear(noisy=True)
    expected = trainer(whole, batch_size=4, epochs=2).train(SEVEN, round=1)
    found = trainer(parts, batch_size=4, epochs=2, micro_batch_size=micro_batch_size).train(SEVEN, round=1)
    assert found == pytest.approx(expected, abs=1e-6)
    assert torch.allclose(parts.weight, whole.weight, atol=1e-6)
    assert max(map(len, parts.batches)) == micro_batch_size


def test_every_epoch_visits_each_sample_once_in_an_order_of_its_own():
    policy = Linear()
    loop = trainer(policy, batch_size=3, epochs=4)
    assert loop.steps_in(SEVEN) == 10  # 28 visits, 3 at a time
    metrics = loop.train(SEVEN, round=1)
    visits = [i for batch in policy.batches for i in batch]
    epochs = [visits[start : start + 7] for start in range(0, 28, 7)]
    assert len(visits) == 28 and all(sorted(epoch) == list("0123456") for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [len(batch) for batch in policy.batches] == [3] * 9 + [1]
    assert metrics["steps"] == 10


def test_the_last_short_batch_is_a_mean_over_what_it_holds():
    policy = Linear()
    losses: list[float] = []
    trainer(policy, batch_size=2, epochs=1, learning_rate=1e-12).train(
        examples((1, 0), (1, 0), (1, 0)), round=1, after_step=lambda step, m: losses.append(m["loss"])
    )
    assert [len(batch) for batch in policy.batches] == [2, 1] and losses == pytest.approx([1.0, 1.0])


def test_steps_go_on_over_epochs_and_an_empty_set_has_none():
    policy = Linear()
    loop = trainer(policy, batch_size=3, steps=5)
    loop.train(SEVEN, round=1)
    assert [len(batch) for batch in policy.batches] == [3] * 5
    assert sorted([i for batch in policy.batches for i in batch][:7]) == list("0123456")
    assert loop.steps_in([]) == 0
    assert loop.train([], round=2) == {"steps": 0.0, "skipped_steps": 0.0}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, [1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "linear"}, [1.0, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine"}, [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ({"schedule": "constant", "warmup_steps": 3}, [0.25, 0.5, 0.75, 1.0]),
        ({"schedule": "linear", "warmup_steps": 1}, [0.5, 0.75, 0.5, 0.25]),
    ],
)
def test_the_learning_rate_follows_the_schedule_over_all_rounds(settings, expected):
    loop = trainer(Linear(), rounds=2, batch_size=7, steps=2, **settings)
    rates: list[float] = []
    for round in (1, 2):
        loop.train(SEVEN, round=round, after_step=lambda step, m: rates.append(m["learning_rate"]))
    assert rates == pytest.approx([0.1 * factor for factor in expected])


def test_the_moving_average_by_hand():
    # The decay of step n is min(0.25, (1 + n) / (10 + n)): 2/11, 3/12, then 0.25.
    policy = Linear((1.0, 0.0))
    loop = trainer(policy, batch_size=1, steps=3, ema_decay=0.25)
    seen = [1.0]
    loop.train(examples((1, 0)), round=1, after_step=lambda step, m: seen.append(policy.weight[0].item()))
    mean = seen[0]
    for decay, weight in zip([2 / 11, 3 / 12, 0.25], seen[1:], strict=True):
        mean = decay * mean + (1 - decay) * weight
    trained = policy.weight.detach().clone()
    with loop.averaged():
        assert policy.weight[0].item() == pytest.approx(mean, abs=1e-6)
        assert loop.policy.adapter_state()["weight"][0].item() == pytest.approx(mean, abs=1e-6)
    assert torch.equal(policy.weight, trained)
    assert loop.state()["average"]["weight"][0].item() == pytest.approx(mean, abs=1e-6)


def poisoned(*bad: int) -> list[Example]:
    return examples(*[(math.nan, 0) if i in bad else (1, i) for i in range(6)])


def test_a_step_whose_gradient_is_not_finite_is_skipped_and_counted():
    policy = Linear((1.0, 0.5))
    loop = trainer(policy, batch_size=1, epochs=1)
    weights = [policy.weight.tolist()]
    metrics = loop.train(poisoned(2), round=1, after_step=lambda step, m: weights.append(policy.weight.tolist()))
    unmoved = [i for i in range(6) if weights[i] == weights[i + 1]]
    assert [policy.batches[i] for i in unmoved] == [["2"]]
    assert (metrics["steps"], metrics["skipped_steps"], loop.steps_done) == (5, 1, 5)
    assert math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"])


def test_three_skipped_steps_in_a_row_stop_with_the_weights_as_they_were():
    policy = Linear((1.0, 0.5))
    loop = trainer(policy, batch_size=1, epochs=1)
    with pytest.raises(TrainingError, match=r"round 1, step 2: the gradient was not finite 3 times in a row; lower"):
        loop.train(poisoned(*range(6)), round=1)
    assert policy.weight.tolist() == [1.0, 0.5] and not loop.optimizer.state


def test_steps_and_rows_follow_steps_or_epochs():
    assert steps_and_rows(TrainingConfig(epochs=3, batch_size=8), 10) == (4, 30)
    assert steps_and_rows(TrainingConfig(steps=5, batch_size=8), 10) == (5, 40)
    assert steps_and_rows(TrainingConfig(steps=5), 0) == (0, 0)


def test_running_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(caplog):
    roomy, tight = Linear(noisy=True), Linear(noisy=True, memory=2)
    expected = trainer(roomy, batch_size=7, epochs=3).train(SEVEN, round=1)
    loop = trainer(tight, batch_size=7, epochs=3)
    assert loop.train(SEVEN, round=1) == pytest.approx(expected, abs=1e-6)
    assert torch.allclose(roomy.weight, tight.weight, atol=1e-6)
    assert loop.micro_batch_size == 1
    assert caplog.messages == [
        "out of memory with 7 samples at once (training.micro_batch_size); going on with 3",
        "out of memory with 3 samples at once (training.micro_batch_size); going on with 1",
    ]


def test_a_short_step_halves_what_was_tried():
    loop = trainer(Linear(memory=2), batch_size=32)
    loop.train(SEVEN, round=1)
    assert loop.micro_batch_size == 1  # 7, 3, 1


def test_out_of_memory_half_way_through_a_batch_does_not_count_its_rows_twice():
    class Filling(Linear):
        def error(self, samples, draw):
            if len(self.batches) == 1 and len(samples) == 4:
                raise torch.OutOfMemoryError("no room for a second one")
            return super().error(samples, draw)

    roomy, filling = Linear(noisy=True), Filling(noisy=True)
    expected = trainer(roomy, batch_size=8, steps=1).train(SEVEN, round=1)
    found = trainer(filling, batch_size=8, micro_batch_size=4, steps=1).train(SEVEN, round=1)
    assert found == pytest.approx(expected, abs=1e-6) and torch.allclose(roomy.weight, filling.weight, atol=1e-6)


def test_no_memory_for_a_single_sample_is_an_error_that_says_what_to_lower():
    with pytest.raises(
        ConfigError, match=r"\Aout of memory with 1 of the samples at once \(training\.micro.*; set .*\Z"
    ):
        trainer(Linear(memory=0), batch_size=4, steps=1).train(SEVEN, round=1)


@pytest.mark.parametrize("first_step", [1, 4, 6])
def test_a_loaded_state_goes_on_bit_for_bit_in_the_middle_of_a_round(first_step):
    settings = {"batch_size": 3, "steps": 6, "ema_decay": 0.9, "schedule": "cosine", "warmup_steps": 4}
    whole = Linear(noisy=True)
    straight = trainer(whole, rounds=2, **settings)
    states = {}
    expected = straight.train(SEVEN, round=1, after_step=lambda step, m: states.setdefault(step, straight.state()))
    again = Linear((9.0, 9.0), noisy=True)
    resumed = trainer(again, rounds=2, **settings)
    resumed.load_state(states[first_step])
    assert resumed.train(SEVEN, round=1, first_step=first_step) == expected
    assert resumed.train(SEVEN, round=2) == straight.train(SEVEN, round=2)
    for part, tensors in straight.state().items():
        for name, tensor in tensors.items():
            assert torch.equal(resumed.state()[part][name], tensor), (part, name)


def test_a_state_without_an_average_does_not_load_into_a_run_that_has_one():
    state = trainer(Linear()).state()
    with pytest.raises(WeightsError, match=r"no moving average; set training\.ema_decay to 0"):
        trainer(Linear(), ema_decay=0.9).load_state(state)


def test_a_step_depends_on_the_seed_the_round_and_the_step_alone():
    first, second = Linear(noisy=True), Linear(noisy=True)
    trainer(first, batch_size=3, steps=2).train(SEVEN, round=5)
    other = trainer(second, batch_size=3, steps=2)
    torch.randn(100)  # whatever else draws numbers
    other.train(SEVEN, round=5)
    assert torch.equal(first.weight, second.weight)
    third = Linear(noisy=True)
    trainer(third, batch_size=3, steps=2).train(SEVEN, round=6)
    assert not torch.equal(first.weight, third.weight)
