"""PPO: tokens become more likely by how much better the rest of a text went than the value head expected."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import ADAPTER_FILE, three_weights_run, tiny_config
from tiny_text import PROMPTS, text_config, text_run, tiny_language_model

from raftdiff.algorithms.ppo import Ppo
from raftdiff.build import build_algorithm, check_needs
from raftdiff.config import RunConfig
from raftdiff.errors import ConfigError, DataError, TrainingError
from raftdiff.losses import adapted_kl, clipped_value_error
from raftdiff.pipelines.diffusion import DiffusionPolicy
from raftdiff.pipelines.llm import LanguagePolicy
from raftdiff.plan import probed
from raftdiff.reward_models.function import FunctionReward
from raftdiff.rounds import run_rounds
from raftdiff.scoring import WeightedReward, score
from raftdiff.selection import gae, whitened
from raftdiff.types import (
    Batch,
    Completion,
    Draw,
    Example,
    Group,
    Phase,
    Prompt,
    RoundReport,
    Sample,
    Scored,
    padded,
)

LETTERS = ".abc"  # the first ends a text


class Writer:
    """A language model in seven weights: the logits of four letters, whatever came before, and the values before the
    first, second and third."""

    modality: Literal["text"] = "text"
    log_prob_rounding = 1e-6
    longest = 3

    def __init__(self) -> None:
        self.logits = torch.nn.Parameter(torch.zeros(len(LETTERS)))
        self.values = torch.nn.Parameter(torch.zeros(self.longest))
        self.passes = 0

    def sample(self, prompts: Sequence[Prompt], seeds: Sequence[int], **ignored: Any) -> list[Sample]:
        return [self._one(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def _one(self, prompt: Prompt, seed: int) -> Sample:
        generator = torch.Generator().manual_seed(seed)
        tokens: list[int] = []
        while len(tokens) < self.longest and 0 not in tokens:
            tokens.append(int(torch.multinomial(self.logits.detach().softmax(0), 1, generator=generator)))
        self.passes += len(tokens)
        return self.written(tokens, prompt, seed)

    @torch.no_grad()
    def written(self, tokens: Sequence[int], prompt: Prompt, seed: int = 0) -> Sample:
        tokens_T = torch.tensor(tokens)
        return Sample(
            id=f"{prompt.text}-{seed}",
            prompt=prompt,
            seed=seed,
            text="".join(LETTERS[token] for token in tokens),
            completion=Completion(
                tokens_T=tokens_T,
                log_prob_T=self.logits.log_softmax(0)[tokens_T],
                value_T=self.values[: len(tokens)].clone(),
                reference_log_prob_T=torch.full((len(tokens),), -math.log(len(LETTERS))),
            ),
        )

    def log_prob_and_value(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens_BT, mask_BT = padded([sample.completion.tokens_T for sample in samples if sample.completion])
        self.passes += int(mask_BT.sum()) * 3
        value_T = self.values[: tokens_BT.shape[1]]
        return self.logits.log_softmax(0)[tokens_BT] * mask_BT, value_T * mask_BT

    def draw(self, samples: Sequence[Sample], generator: torch.Generator) -> Draw:
        count = len(samples)
        return Draw(noise=torch.zeros(count, 0), quantile_B=torch.zeros(count), dropped_B=torch.zeros(count).bool())

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.logits, self.values]

    @contextmanager
    def reference(self) -> Iterator[None]:
        logits, self.logits.data = self.logits.data, torch.zeros_like(self.logits)
        try:
            yield
        finally:
            self.logits.data = logits

    def adapter_state(self) -> dict[str, torch.Tensor]:
        return {"logits": self.logits.detach().clone(), "values": self.values.detach().clone()}

    def load_adapter(self, state: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            self.logits.copy_(state["logits"])
            self.values.copy_(state["values"])

    def export(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        save_file(self.adapter_state(), path / ADAPTER_FILE)

    def fingerprint(self) -> str:
        return "writer"


def share_of_a(texts: Sequence[str], prompts: Sequence[str]) -> list[float]:
    return [text.count("a") / len(text) for text in texts]


# -- formulas ----------------------------------------------------------------------------------------------------------


def test_advantages_of_tokens_sum_the_surprises_that_follow():
    """delta = (-.5, 0 + .5 * 4 - 2, 1 - 4) = (-.5, 0, -3), and each A = delta + .5 * .5 * the next."""
    assert gae([0.5, 0.0, 1.0], [2.0, 2.0, 4.0], gamma=0.5, decay=0.5) == [-0.6875, -0.75, -3.0]
    assert gae([0.5, 0.0, 1.0], [2.0, 2.0, 4.0], gamma=1.0, decay=1.0) == [-0.5, -1.0, -3.0]  # what came, less V
    assert gae([0.5, 0.0, 1.0], [2.0, 2.0, 4.0], gamma=1.0, decay=0.0) == [0.5, 2.0, -3.0]  # the surprise alone


def test_whitening_is_over_the_tokens_of_all_texts():
    found = whitened([[1.0, 1.0, 1.0], [5.0]])
    assert found[0] == pytest.approx([-1 / math.sqrt(3)] * 3) and found[1] == pytest.approx([math.sqrt(3)])
    assert [row.tolist() for row in whitened([[2.0], [2.0, 2.0]])] == [[0.0], [0.0, 0.0]]
    assert whitened([]) == []


def test_a_value_that_has_left_its_range_is_held_to_the_worse_of_both_errors():
    """Of V = 1 (old .5, R 2; clipped .7: error 1.69), V = 1 (old .9, R 2: error 1) and V = 3 (old 0, R -1: 16)."""
    value_BT = torch.tensor([[1.0, 1.0], [3.0, 0.0]], requires_grad=True)
    old_BT, return_BT = torch.tensor([[0.5, 0.9], [0.0, 0.0]]), torch.tensor([[2.0, 2.0], [-1.0, 0.0]])
    mask_BT = torch.tensor([[True, True], [True, False]])
    loss_B, metrics = clipped_value_error(value_BT, old_BT, return_BT, mask_BT, clip=0.2)
    assert loss_B.tolist() == pytest.approx([(1.69 + 1) / 4, 8.0])
    assert metrics["value_error"].tolist() == [1.0, 16.0] and metrics["value_clipped"].tolist() == [0.5, 1.0]
    loss_B.sum().backward()
    assert value_BT.grad is not None
    assert value_BT.grad.tolist() == [[0.0, -0.5], [4.0, 0.0]]  # none where it has gone as far as it may


def test_the_penalty_follows_the_divergence_by_at_most_a_fifth_a_horizon():
    assert adapted_kl(0.1, 6.6, target=6.0, share=0.5) == pytest.approx(0.105)
    assert adapted_kl(0.1, 60.0, target=6.0, share=0.5) == pytest.approx(0.11)
    assert adapted_kl(0.1, -1.0, target=6.0, share=0.5) == pytest.approx(0.09)
    assert adapted_kl(0.1, 0.0, target=6.0, share=70.0) == pytest.approx(0.08)  # a round beyond the horizon
    assert adapted_kl(0.1, 6.0, target=6.0, share=1.0) == 0.1


# -- selection ---------------------------------------------------------------------------------------------------------


def text(name: str, *, log_prob: Sequence[float], reference: Sequence[float], value: Sequence[float]) -> Sample:
    completion = Completion(
        tokens_T=torch.ones(len(value), dtype=torch.int64),
        log_prob_T=torch.tensor(log_prob),
        value_T=torch.tensor(value),
        reference_log_prob_T=torch.tensor(reference),
    )
    return Sample(id=name, prompt=Prompt(text="p"), seed=0, text=name, completion=completion)


SHORT = text("short", log_prob=[-1.0], reference=[-2.0], value=[0.5])
LONG = text("long", log_prob=[-1.0, -1.0, -1.0], reference=[-1.0, -3.0, -1.0], value=[1.0, 0.0, 1.0])


def groups(*scored: tuple[Sample, float | None]) -> list[Group]:
    return [Group(prompt=s.prompt, samples=(Scored(sample=s, parts={}, reward=r),)) for s, r in scored]


def select(ppo: Ppo, *scored: tuple[Sample, float | None], coefficient: float = 0.0) -> list[Example]:
    return ppo.select(groups(*scored), round=1, seed=0, phase=Phase(grown=1, kl_coefficient=coefficient))


def test_the_reward_comes_with_the_last_token_and_the_penalty_with_each():
    ppo = Ppo(gamma=1.0, gae_lambda=1.0)
    short, long = select(ppo, (SHORT, 2.0), (LONG, 3.0), coefficient=0.5)
    # Rewards of tokens: short 2 - .5; long 0, -1, 3. What is yet to come at each, the return: 1.5; 2, 2, 3.
    assert short.return_T is not None and short.return_T.tolist() == [1.5]
    assert long.return_T is not None and long.return_T.tolist() == [2.0, 2.0, 3.0]
    raw = np.array([1.0, 1.0, 2.0, 2.0])  # less the values
    white = (raw - 1.5) / 0.5
    assert short.advantage_T is not None and long.advantage_T is not None
    assert [*short.advantage_T.tolist(), *long.advantage_T.tolist()] == pytest.approx(white.tolist())
    assert short.advantage_T.dtype == short.return_T.dtype == torch.float32
    assert (short.weight, long.weight) == (0.5, 1.5)  # by tokens, 1 on the average
    assert (short.step, long.step) == (None, None)


def test_texts_without_a_reward_are_left_out():
    assert [example.sample.id for example in select(Ppo(), (SHORT, None), (LONG, 1.0))] == ["long"]
    assert select(Ppo(), (SHORT, None)) == [] and Ppo().select([], round=1, seed=0, phase=Phase(grown=1)) == []


def test_rewards_are_scaled_by_their_deviation_and_clipped_where_asked_for():
    def returns(ppo: Ppo, *rewards: float) -> list[float]:
        examples = select(ppo, *[(replace(SHORT, id=str(i)), reward) for i, reward in enumerate(rewards)])
        return [e.return_T.item() for e in examples if e.return_T is not None]

    assert returns(Ppo(), 30.0, -10.0) == [30.0, -10.0]
    assert returns(Ppo(max_reward=12.0), 30.0, -10.0) == [12.0, -10.0]
    assert returns(Ppo(scale_rewards=True), 30.0, -10.0) == pytest.approx([1.5, -0.5])
    assert returns(Ppo(scale_rewards=True, max_reward=1.0), 30.0, -10.0) == pytest.approx([1.0, -0.5])
    assert returns(Ppo(scale_rewards=True), 3.0, 3.0) == [3.0, 3.0]


def test_a_text_that_was_sampled_without_values_is_named():
    assert SHORT.completion is not None
    for lacking in (
        None,
        replace(SHORT.completion, value_T=None),
        replace(SHORT.completion, reference_log_prob_T=None),
    ):
        with pytest.raises(DataError, match="sample short has no values of its tokens"):
            select(Ppo(), (replace(SHORT, completion=lacking), 1.0))


# -- the penalty's weight ----------------------------------------------------------------------------------------------


def report(kl: float | None, scored: int) -> RoundReport:
    counts = {"requested": scored, "scored": scored, "failed": 0, "skipped": 0, "selected": scored}
    return RoundReport(round=0, rewards={} if kl is None else {"log_ratio": kl}, training={}, **counts)


def test_each_round_has_the_weight_that_the_divergence_of_those_before_it_has_left():
    ppo = Ppo(kl_coefficient=0.1, kl_target=2.0, kl_horizon=100.0)
    reports = [report(None, 0), report(2.2, 50), report(None, 0), report(1.0, 100)]
    expected = [0.1, 0.1 * 1.05, 0.1 * 1.05, 0.1 * 1.05 * 0.8]
    phases = [ppo.phase(i, reports[:i]) for i in range(1, 5)]
    assert [phase.kl_coefficient for phase in phases] == pytest.approx(expected)
    assert [phase.grown for phase in phases] == [1, 2, 3, 4]
    assert Ppo(kl_coefficient=0.1, kl_target=None).phase(5, reports).kl_coefficient == 0.1


def test_the_divergence_of_a_text_is_in_its_score_without_another_pass():
    plain = replace(SHORT, id="plain", completion=None)
    without = Completion(tokens_T=torch.ones(1), log_prob_T=torch.ones(1))
    reward = WeightedReward(reward=FunctionReward(share_of_a, "share"))
    scored = score([SHORT, LONG, plain, replace(SHORT, completion=without)], [reward], combine="sum")
    assert [s.log_ratio for s in scored] == [1.0, 2.0, 0.0, 0.0]


# -- loss --------------------------------------------------------------------------------------------------------------


def batch_of(writer: Writer, *, updates: int = 0) -> Batch:
    """The text `a.` with the advantages 1, -2 and the weight .8, `b` with the advantage 3 and 1.2; all returns 1."""
    prompt = Prompt(text="p")
    examples = [
        Example(
            sample=writer.written(tokens, prompt),
            weight=weight,
            advantage_T=torch.tensor(advantages),
            return_T=torch.ones(len(tokens)),
        )
        for tokens, weight, advantages in (([1, 0], 0.8, [1.0, -2.0]), ([2], 1.2, [3.0]))
    ]
    return Batch(
        examples=examples,
        weight_B=torch.tensor([example.weight for example in examples]),
        draw=writer.draw([example.sample for example in examples], torch.Generator()),
        updates=updates,
    )


def test_before_the_first_update_the_gradient_is_that_of_the_advantages_and_of_the_squared_error():
    writer = Writer()
    loss_B, metrics = Ppo(value_coefficient=0.5).loss(writer, batch_of(writer))
    # Policy: -(1 - 2) / 2 and -3. Values: all 0, their squared errors 1. By the weights.
    assert loss_B.tolist() == pytest.approx([0.8 * (0.5 + 0.25), 1.2 * (-3 + 0.25)])
    assert metrics["policy_loss"].tolist() == [0.5, -3.0]
    assert metrics["ratio"].tolist() == [1.0, 1.0] and metrics["clipped"].tolist() == [0.0, 0.0]
    assert metrics["value_error"].tolist() == [1.0, 1.0] and metrics["kl"].tolist() == [0.0, 0.0]
    assert all(not value_B.requires_grad for value_B in metrics.values())
    loss_B.sum().backward()
    # d log p(y) / d logits = [y] - 1/4: of "a" -.8 * .5, of "." +.8, of "b" -1.2 * 3.
    pull = torch.tensor([0.8, -0.4, -3.6, 0.0])
    assert writer.logits.grad is not None and writer.values.grad is not None
    torch.testing.assert_close(writer.logits.grad, pull - pull.sum() / 4)
    torch.testing.assert_close(writer.values.grad, 0.5 * torch.tensor([-0.8 / 2 - 1.2, -0.8 / 2, 0.0]))


def test_after_an_update_ratios_and_values_are_clipped_and_the_divergence_from_the_base_is_logged():
    writer = Writer()
    batch = batch_of(writer, updates=1)
    with torch.no_grad():
        writer.logits[2] = 3.0
        writer.values += 0.5
    loss_B, metrics = Ppo(clip=0.2, value_clip=0.2, value_coefficient=1.0).loss(writer, batch)
    ratio = 4 * math.exp(3) / (math.exp(3) + 3)
    assert metrics["ratio"].tolist() == pytest.approx([4 / (math.exp(3) + 3), ratio])
    assert metrics["clipped"].tolist() == [1.0, 1.0] and metrics["value_clipped"].tolist() == [1.0, 1.0]
    assert loss_B[1].item() == pytest.approx(1.2 * (-1.2 * 3 + 0.8**2 / 2))  # both held: 1 + .2, and 0 + .2
    assert metrics["kl"][1].item() == pytest.approx(math.log(ratio))
    gradients = torch.autograd.grad(loss_B[1], [writer.logits, writer.values])
    assert [gradient.abs().sum().item() for gradient in gradients] == [0.0, 0.0]


def test_rows_have_the_same_loss_and_gradient_in_any_division_of_a_batch():
    writer = Writer()
    batch = batch_of(writer)
    together_B, _ = Ppo().loss(writer, batch)
    apart = [
        Ppo().loss(writer, replace(batch, examples=[example], weight_B=batch.weight_B[i : i + 1]))[0]
        for i, example in enumerate(batch.examples)
    ]
    torch.testing.assert_close(together_B, torch.cat(apart))


def test_texts_of_another_policy_are_refused():
    writer = Writer()
    batch = batch_of(writer)
    with torch.no_grad():
        writer.logits[1] = 1e-3
    with pytest.raises(TrainingError, match="off 1 by"):
        Ppo().loss(writer, batch)
    Ppo().loss(writer, replace(batch, updates=1))


# -- runs --------------------------------------------------------------------------------------------------------------

SETTINGS = {
    "algorithm": {"name": "ppo", "options": {"kl_coefficient": 0.02, "kl_target": 0.3, "kl_horizon": 100.0}},
    "combine": "sum",
    "sampling": {"samples_per_prompt": 8},
    "training": {"steps": None, "epochs": 4, "batch_size": 8, "learning_rate": 0.05},
}


def write(tmp_path: Path, **settings: Any):
    config = tiny_config(tmp_path, **SETTINGS | settings)
    run = three_weights_run(config, policy=Writer(), reward=share_of_a)  # type: ignore[arg-type]
    return run_rounds(run), run.policy


def test_ppo_raises_the_reward_over_several_epochs_and_holds_the_divergence(tmp_path):
    result, writer = write(tmp_path, rounds=6)
    assert result.aligned[0].gains["redness"].low > 0.1
    assert writer.logits[1] > max(*writer.logits[2:])
    rounds = result.reports[1:]
    assert all(r.training["steps"] == 16 for r in rounds)  # 4 epochs of 32 texts in batches of 8
    assert rounds[0].rewards["log_ratio"] == 0.0 < rounds[-1].rewards["log_ratio"]
    assert rounds[-1].training["value_error"] < rounds[0].training["value_error"]
    coefficients = [r.phase.kl_coefficient for r in rounds]
    share = 32 / 100
    assert coefficients[:2] == pytest.approx([0.02, 0.02 * (1 - 0.2 * share)])
    for r, before, after in zip(rounds, coefficients, coefficients[1:], strict=False):
        assert after == adapted_kl(before, r.rewards["log_ratio"], target=0.3, share=share)
    assert max(coefficients) > 0.02


def test_a_large_penalty_keeps_the_base_model(tmp_path):
    free, _ = write(tmp_path / "free", rounds=3, algorithm={"name": "ppo", "options": {"kl_coefficient": 0.0}})
    options = {"kl_coefficient": 2.0, "kl_target": None}
    held, _ = write(tmp_path / "held", rounds=3, algorithm={"name": "ppo", "options": options})
    assert held.reports[-1].rewards["log_ratio"] < free.reports[-1].rewards["log_ratio"] / 2
    assert {r.phase.kl_coefficient for r in held.reports[1:]} == {2.0}


def test_a_language_model_keeps_what_it_says_of_its_own_texts_and_both_losses_reach_its_lora():
    policy = LanguagePolicy(tiny_language_model(), max_new_tokens=6, temperature=0.8, value=True)
    with torch.no_grad():
        for i, p in enumerate(policy.parameters()):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    samples = policy.sample([Prompt(text=text) for text in PROMPTS], range(4))
    log_prob_BT, value_BT = policy.log_prob_and_value(samples)
    rows = zip(samples, log_prob_BT, value_BT, strict=True)
    kept = [(s.completion, log_prob_T, value_T) for s, log_prob_T, value_T in rows if s.completion]
    for completion, log_prob_T, value_T in kept:
        count = len(completion.tokens_T)
        torch.testing.assert_close(log_prob_T[:count], completion.log_prob_T)
        torch.testing.assert_close(value_T[:count], completion.value_T)
        assert value_T[:count].abs().min() > 0 and not value_T[count:].any() and not log_prob_T[count:].any()
        assert completion.log_ratio != 0
    for output_BT in (log_prob_BT, value_BT):
        gradients = torch.autograd.grad(output_BT.sum(), policy.parameters(), retain_graph=True, allow_unused=True)
        assert all(g is not None and g.any() for g in gradients[:-2])  # the LoRA; the last two are the value head's
    assert all(g is not None and g.any() for g in gradients[-2:])


PPO_OF_TEXT = {
    "algorithm": {"name": "ppo", "options": {"kl_coefficient": 0.01}},
    "training": {"steps": None, "epochs": 2, "batch_size": 8, "learning_rate": 0.05},
}


def test_a_language_model_leaves_its_base_and_is_resumed_as_if_it_had_not_stopped(tmp_path):
    def lora(result) -> bytes:
        return (result.lora_path / "adapter_model.safetensors").read_bytes()

    whole = run_rounds(text_run(text_config(tmp_path / "whole", rounds=2, **PPO_OF_TEXT)))
    assert whole.reports[1].rewards["log_ratio"] == pytest.approx(0.0, abs=1e-5)
    assert whole.reports[-1].rewards["log_ratio"] > 0.1
    assert whole.reports[1].training["ratio_change"] > 0
    run_rounds(text_run(text_config(tmp_path / "stopped", rounds=1, **PPO_OF_TEXT)))
    resumed = run_rounds(text_run(text_config(tmp_path / "stopped", rounds=2, **PPO_OF_TEXT)), resume=True)
    assert lora(resumed) == lora(whole)
    assert [(r.phase, r.training) for r in resumed.reports] == [(r.phase, r.training) for r in whole.reports]


def test_a_plan_counts_the_readings_of_the_value_head_and_of_the_base_model(tmp_path):
    config = text_config(tmp_path, rounds=1, **PPO_OF_TEXT)
    planned = {work.stage: work.passes for work in probed(text_run(config), config).rounds[1]}
    spent = {cost.stage: cost.passes for cost in run_rounds(text_run(config)).reports[1].ledger}
    assert spent["train"] == pytest.approx(2 * spent["sample"], rel=0.1)  # 2 epochs x 3 of what was read 3 times
    for stage in ("sample", "train"):
        assert planned[stage] == pytest.approx(spent[stage], rel=0.3)  # texts are of any length, and some are empty


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip": 0.0}, "clip is 0.0"),
        ({"value_clip": -1.0}, "value_clip is -1.0"),
        ({"value_coefficient": math.nan}, "value_coefficient is nan"),
        ({"kl_coefficient": -0.1}, "kl_coefficient is -0.1"),
        ({"kl_target": 0.0}, "kl_target is 0.0"),
        ({"kl_horizon": math.inf}, "kl_horizon is inf"),
        ({"max_reward": 0.0}, "max_reward is 0.0"),
        ({"gamma": 1.1}, "gamma is 1.1"),
        ({"gae_lambda": math.nan}, "gae_lambda is nan"),
    ],
)
def test_options_that_cannot_be_run_are_refused(options: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        Ppo(**options)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"training": {"ema_decay": 0.9}}, "ema_decay must be 0"),
        ({"adapter": {"dropout": 0.1}}, "dropout must be 0"),
        ({"algorithm": {"teacher": "other"}}, "teacher must be left out"),
        ({"algorithm": {"replay": 0.5}}, "replay must be 0"),
        ({"data": {"path": "mine"}}, "data must be left out"),
    ],
)
def test_settings_under_which_another_policy_would_be_trained_are_refused(settings, words: str):
    algorithm = settings.pop("algorithm", {}) | {"name": "ppo"}
    with pytest.raises(ConfigError, match=f"PPO: .*{words}"):
        build_algorithm(RunConfig.model_validate(settings | {"algorithm": algorithm}))


def test_it_needs_a_model_with_values():
    with pytest.raises(
        ConfigError, match="algorithm ppo needs log_prob_and_value, which DiffusionPolicy does not have"
    ):
        check_needs(Ppo(), "ppo", DiffusionPolicy)
    check_needs(Ppo(), "ppo", Writer)
