"""Where the device runs out of memory, batches shrink and nothing else changes."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from test_diffusion import PROMPTS, SEEDS, policy_of
from test_scoring import make_samples

from raftdiff.batches import Batches
from raftdiff.errors import ConfigError
from raftdiff.interrupts import StopRequest
from raftdiff.scoring import score_parts, with_log_ratio
from raftdiff.types import Scored


def batches(size: int) -> Batches:
    return Batches(size, "rows at once (setting)", "lower the setting")


def limited(memory: int, calls: list[int]):
    """Work that fits for `memory` rows."""

    def call(rows: slice) -> list[int]:
        calls.append(rows.stop - rows.start)
        if rows.stop - rows.start > memory:
            raise torch.OutOfMemoryError("no room")
        return list(range(rows.start, rows.stop))

    return call


def test_a_batch_that_does_not_fit_is_halved_and_the_size_is_remembered(caplog):
    shrinking, calls = batches(8), []
    with caplog.at_level(logging.WARNING, "raftdiff"):
        assert shrinking.run(11, limited(3, calls)) == list(range(11))
    assert calls == [8, 4, 2, 2, 2, 2, 2, 1] and shrinking.size == 2
    assert caplog.messages == [
        "out of memory with 8 rows at once (setting); going on with 4",
        "out of memory with 4 rows at once (setting); going on with 2",
    ]


def test_a_short_batch_that_does_not_fit_halves_what_was_tried():
    shrinking, calls = batches(100), []
    assert shrinking.run(6, limited(3, calls)) == list(range(6))
    assert calls == [6, 3, 3] and shrinking.size == 3


def test_one_row_that_does_not_fit_is_one_clear_line():
    with pytest.raises(ConfigError, match=r"^out of memory with 1 of the rows at once \(setting\); lower the setting$"):
        batches(2).run(2, limited(0, []))


def test_a_size_that_must_stay_is_not_lowered_but_refused():
    calls: list[int] = []
    with pytest.raises(ConfigError, match=r"^out of memory with 4 of the rows .*; set fewer, or lower the setting$"):
        Batches(4, "rows at once (setting)", "lower the setting", fixed=True).run(8, limited(3, calls))
    assert calls == [4]


def test_the_tensors_of_a_failed_attempt_are_gone_before_the_next():
    kept: list[weakref.ref] = []

    def call(rows: slice) -> list[int]:
        assert all(reference() is None for reference in kept)
        activations = torch.ones(1000)
        kept.append(weakref.ref(activations))
        if rows.stop - rows.start > 1:
            raise torch.OutOfMemoryError("no room")
        return [0]

    gc.disable()  # nothing may depend on when the collector happens to run
    try:
        assert batches(4).run(2, call) == [0, 0]
    finally:
        gc.enable()
    assert len(kept) == 3


def test_sampling_shrinks_its_batches_and_makes_the_same_pictures(caplog):
    roomy, tight = policy_of("sd-eps", batch_size=4), policy_of("sd-eps", batch_size=4)
    decoded: list[int] = []

    def memory_of_one(module, args):
        decoded.append(len(args[0]))
        if len(args[0]) > 1:
            raise torch.OutOfMemoryError("no room")

    tight.pipeline.vae.decoder.register_forward_pre_hook(memory_of_one)
    prompts, seeds = [*PROMPTS, PROMPTS[0]], [*SEEDS, 14]
    with caplog.at_level(logging.WARNING, "raftdiff"):
        found = tight.sample(prompts, seeds)
    assert decoded == [4, 2, 1, 1, 1, 1] and tight.batch_size == 1
    assert "out of memory with 4 images at once (sampling.batch_size); going on with 2" in caplog.text
    for sample, expected in zip(found, roomy.sample(prompts, seeds), strict=True):
        assert (sample.id, sample.seed) == (expected.id, expected.seed)
        torch.testing.assert_close(sample.latents, expected.latents, atol=1e-4, rtol=0)
    tight.sample(prompts[:2], seeds[:2])
    assert decoded[6:] == [1, 1]  # also in the next round


def test_a_reward_is_given_smaller_batches_until_they_fit():
    class Small:
        name, modality = "small", "image"

        def __init__(self) -> None:
            self.sizes: list[int] = []

        def score(self, samples):
            self.sizes.append(len(samples))
            if len(samples) > 2:
                raise torch.OutOfMemoryError("no room")
            return torch.tensor([float(sample.seed) for sample in samples])

    reward, samples = Small(), make_samples(7)
    assert score_parts(samples, reward, batch_size=5, max_failed=0).tolist() == [float(s.seed) for s in samples]
    assert reward.sizes == [5, 2, 2, 2, 1]


def test_a_reward_that_has_no_room_for_one_picture_stops_the_run_with_one_line():
    class Large:
        name, modality = "large", "image"

        def score(self, samples):
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(ConfigError, match=r"^out of memory with 1 of the images for reward 'large'.*`device: cpu`"):
        score_parts(make_samples(3), Large(), batch_size=2, max_failed=1)


def test_the_log_ratio_does_not_depend_on_the_memory():
    policy = policy_of("sd-eps")
    scored = [Scored(sample=sample, parts={}, reward=0.0) for sample in policy.sample(PROMPTS, SEEDS)]
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.1

    def ratios() -> list[float]:
        found = with_log_ratio(scored, policy, seed=0, round=1, batch_size=3, stop=StopRequest())
        return [s.log_ratio for s in found if s.log_ratio is not None]

    expected, rows = ratios(), []

    def memory_of_one(module, args, kwargs):
        rows.append(len(args[0]) if args else len(kwargs["sample"]))
        if rows[-1] > 1:
            raise torch.OutOfMemoryError("no room")

    policy.denoiser.register_forward_pre_hook(memory_of_one, with_kwargs=True)
    assert ratios() == pytest.approx(expected, abs=1e-5) and any(expected)
    assert rows == [3, 1, 1, 1, 1, 1, 1]
