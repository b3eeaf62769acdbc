"""DPO pairs the better sample with the worse one, and its loss is the papers' on errors that share one draw."""

from __future__ import annotations

import importlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from PIL import Image
from tiny_runs import exported, pipeline_run, three_weights_run, tiny_config

from raftdiff.algorithms.dpo import Dpo
from raftdiff.build import build_algorithm
from raftdiff.config import AdapterConfig, RunConfig
from raftdiff.data import load_preferences
from raftdiff.errors import ConfigError, DataError
from raftdiff.pipelines.diffusion import DiffusionPolicy
from raftdiff.protocols import Algorithm
from raftdiff.report import read_metrics
from raftdiff.rounds import run_rounds
from raftdiff.store import SampleStore
from raftdiff.types import Batch, Draw, Example, Group, Phase, Prompt, Sample, Scored

PROMPT = Prompt(text="a")

# -- pairs -------------------------------------------------------------------------------------------------------------


def group(text: str, *rewards: float | None) -> Group:
    """The samples of the prompt `text`; the k-th has the id `text-k`."""
    prompt = Prompt(text=text)
    samples = [Sample(id=f"{text}-{k}", prompt=prompt, seed=k) for k in range(len(rewards))]
    scored = [Scored(sample=s, parts={}, reward=reward) for s, reward in zip(samples, rewards, strict=True)]
    return Group(prompt=prompt, samples=tuple(scored))


def paired(dpo: Dpo, *groups: Group) -> list[tuple[str, str]]:
    examples = dpo.select(groups, round=1, seed=0, phase=Phase(grown=1))
    assert all(example.weight == 1.0 and example.step is None for example in examples)
    return [(example.sample.id, example.rejected.id) for example in examples if example.rejected is not None]


GROUPS = [group("a", 1.0, 5.0, 3.0), group("b", 9.0, 8.5, 7.0)]


def test_the_best_of_each_prompt_is_preferred_to_its_worst():
    assert paired(Dpo(), *GROUPS) == [("a-1", "a-0"), ("b-0", "b-2")]


def test_all_pairs_are_every_better_sample_against_every_worse_one():
    a = [("a-1", "a-2"), ("a-1", "a-0"), ("a-2", "a-0")]
    assert paired(Dpo(pairing="all"), *GROUPS) == [*a, ("b-0", "b-1"), ("b-0", "b-2"), ("b-1", "b-2")]


def test_pairs_whose_rewards_differ_by_less_than_the_margin_are_left_out():
    assert paired(Dpo(min_margin=2.0), *GROUPS) == [("a-1", "a-0"), ("b-0", "b-2")]
    assert paired(Dpo(min_margin=2.5), *GROUPS) == [("a-1", "a-0")]
    assert paired(Dpo(pairing="all", min_margin=1.5), GROUPS[1]) == [("b-0", "b-2"), ("b-1", "b-2")]


def test_equal_rewards_are_never_paired_and_failed_samples_never_lose(caplog: pytest.LogCaptureFixture):
    flat, failed = group("a", 0.1, 0.1, 0.1), group("b", 2.0, None, math.nan)
    with caplog.at_level(logging.INFO):
        assert paired(Dpo(), flat, failed, group("c")) == paired(Dpo(pairing="all"), flat, failed) == []
    assert "3 of 3 prompts gave no pair" in caplog.text
    assert paired(Dpo(pairing="all"), group("a", 1.0, 2.0, 2.0)) == [("a-1", "a-0"), ("a-2", "a-0")]
    assert paired(Dpo(), group("a", None, -3.0, -1.0)) == [("a-2", "a-1")]


# -- the loss ----------------------------------------------------------------------------------------------------------


class Categorical:
    """A policy over a few outcomes, in double precision: the seed of a sample says which one it is."""

    def __init__(self, reference: Sequence[float]) -> None:
        self.first = torch.tensor(reference, dtype=torch.float64).log()
        self.logits = torch.nn.Parameter(self.first.clone())
        self.calls: list[tuple[bool, list[int], list[float]]] = []

    def error(self, samples: Sequence[Sample], draw: Draw) -> torch.Tensor:
        outcomes = [sample.seed for sample in samples]
        self.calls.append((torch.is_grad_enabled(), outcomes, draw.quantile_B.tolist()))
        return -self.logits.log_softmax(0)[outcomes]

    @contextmanager
    def reference(self) -> Iterator[None]:
        trained, self.logits.data = self.logits.data, self.first
        try:
            yield
        finally:
            self.logits.data = trained


def batch_of(pairs: Sequence[tuple[int, int]], weights: Sequence[float] | None = None) -> Batch:
    outcomes = [[Sample(id=str(k), prompt=PROMPT, seed=k) for k in pair] for pair in pairs]
    count = len(pairs)
    return Batch(
        examples=[Example(sample=better, rejected=worse) for better, worse in outcomes],
        weight_B=torch.tensor(weights or [1.0] * count, dtype=torch.float64),
        draw=Draw(
            noise=torch.zeros(count, 1),
            quantile_B=torch.arange(count) / 8,
            dropped_B=torch.zeros(count, dtype=torch.bool),
        ),
    )


def test_both_sides_and_the_reference_see_the_same_draw_in_one_batch_each():
    policy = Categorical([0.5, 0.3, 0.2])
    Dpo().loss(policy, batch_of([(0, 1), (2, 0)]))  # type: ignore[arg-type]
    assert policy.calls == [
        (False, [0, 2, 1, 0], [0.0, 0.125, 0.0, 0.125]),
        (True, [0, 2, 1, 0], [0.0, 0.125, 0.0, 0.125]),
    ]


def test_at_the_start_the_loss_is_log_2_and_the_gradient_that_of_the_paper():
    """-beta sigmoid(-beta h) (grad log pi(w) - grad log pi(l)), which in logits is one at w less one at l."""
    policy = Categorical([0.5, 0.3, 0.2])
    loss_B, metrics = Dpo(beta=3.0).loss(policy, batch_of([(0, 2)]))  # type: ignore[arg-type]
    assert loss_B.item() == pytest.approx(math.log(2)) and metrics["margin"].item() == 0.0
    loss_B.sum().backward()
    assert policy.logits.grad is not None and policy.logits.grad.tolist() == pytest.approx([-1.5, 0.0, 1.5])
    policy.logits.grad = None
    policy.logits.data += torch.tensor([0.2, 0.0, -0.3], dtype=torch.float64)  # h = .5
    loss_B, metrics = Dpo(beta=3.0).loss(policy, batch_of([(0, 2)], [2.0]))  # type: ignore[arg-type]
    assert loss_B.item() == pytest.approx(2 * math.log1p(math.exp(-1.5)))
    assert metrics["margin"].item() == pytest.approx(1.5)
    loss_B.sum().backward()
    slope = 2 * 3 / (1 + math.exp(1.5))
    assert policy.logits.grad is not None and policy.logits.grad.tolist() == pytest.approx([-slope, 0.0, slope])


@pytest.mark.parametrize("beta", [0.5, 1.0, 4.0])
def test_the_optimum_is_the_reference_times_the_exponential_of_the_reward_over_beta(beta: float):
    """On every pair, as often as the reference makes it and people with the rewards r would choose so."""
    reference, reward = [0.4, 0.3, 0.2, 0.1], [0.0, 1.0, -0.5, 2.0]
    pairs = list(permutations(range(4), 2))
    chosen = [reference[a] * reference[b] / (1 + math.exp(reward[b] - reward[a])) for a, b in pairs]
    policy, dpo = Categorical(reference), Dpo(beta=beta)
    optimizer = torch.optim.LBFGS([policy.logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        total = dpo.loss(policy, batch_of(pairs, chosen))[0].sum()  # type: ignore[arg-type]
        total.backward()
        return total

    for _ in range(20):
        optimizer.step(loss)
    tilted = [p * math.exp(r / beta) for p, r in zip(reference, reward, strict=True)]
    assert policy.logits.softmax(0).tolist() == pytest.approx([t / sum(tilted) for t in tilted], abs=1e-6)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_dpos_loss_is_log_2_at_the_start(family: str):
    policy = DiffusionPolicy(
        tiny_models.FAMILIES[family](),
        AdapterConfig(rank=2),
        num_inference_steps=2,
        guidance_scale=1.0,
        call={"height": 16, "width": 16},
    )
    samples = policy.sample([Prompt(text="a red circle"), Prompt(text="a blue square")] * 2, [1, 2, 3, 4])
    examples = [Example(sample=samples[k], rejected=samples[k + 2]) for k in range(2)]
    draw = policy.draw(samples[:2], torch.Generator().manual_seed(0))
    loss_B, metrics = Dpo().loss(policy, Batch(examples=examples, weight_B=torch.ones(2), draw=draw))
    assert loss_B.tolist() == pytest.approx([math.log(2)] * 2)
    assert metrics["margin"].tolist() == [0.0, 0.0] and metrics["accuracy"].tolist() == [0.5, 0.5]
    loss_B.sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters())


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, "beta is 0.0; it must be positive"),
        ({"beta": -5.0}, "beta is -5.0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"beta": float("inf")}, "beta is inf"),
        ({"loss_type": "sigmiod"}, "loss_type is 'sigmiod'; did you mean 'sigmoid'"),
        ({"source": "offlin"}, "source is 'offlin'; did you mean 'offline'"),
        ({"pairing": "every"}, r"pairing is 'every' \(there are best-worst, all\)"),
        ({"loss_type": "cdpo"}, "label_smoothing is None; cdpo needs the share of wrong labels"),
        ({"label_smoothing": 0.1}, "the others do not take it"),
        ({"loss_type": "cdpo", "label_smoothing": 0.5}, "label_smoothing is 0.5; it must lie between 0 and .5"),
        ({"loss_type": "cdpo", "label_smoothing": 0.0}, "label_smoothing is 0.0"),
        ({"min_margin": -1.0}, "min_margin is -1.0"),
        ({"min_margin": float("nan")}, "min_margin is nan"),
        ({"source": "offline", "min_margin": 1.0}, "source is offline: pairing and min_margin are for"),
        ({"source": "offline", "pairing": "all"}, "source is offline: pairing and min_margin are for"),
    ],
)
def test_options_that_cannot_be_run_are_refused(options: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        Dpo(**options)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sampling": {"samples_per_prompt": 1}}, "set sampling.samples_per_prompt >= 2"),
        ({"algorithm": {"options": {"source": "offline"}}}, "trains on your own data alone: set data.path"),
        ({"algorithm": {"options": {"source": "offline"}, "replay": 0.5}}, "leave out algorithm.replay and .teacher"),
        ({"algorithm": {"options": {"source": "offline"}, "teacher": "x"}}, "leave out algorithm.replay and .teacher"),
    ],
)
def test_settings_that_leave_nothing_to_prefer_are_refused(settings: dict, words: str):
    settings = {"algorithm": {}} | settings
    settings["algorithm"] = {"name": "dpo"} | settings["algorithm"]
    with pytest.raises(ConfigError, match=words):
        build_algorithm(RunConfig.model_validate(settings))


def test_options_from_a_file_have_the_types_of_their_fields():
    def dpo(**options: Any) -> Algorithm:
        return build_algorithm(RunConfig.model_validate({"algorithm": {"name": "dpo", "options": options}}))

    assert dpo(beta="1e3") == dpo(beta=1000) == Dpo(beta=1000.0)  # what YAML makes of 1e3 is text
    for beta in ("large", None, [1]):
        with pytest.raises(ConfigError, match=r"dpo: option 'beta': Input should be a valid number"):
            dpo(beta=beta)
    with pytest.raises(ConfigError, match="pairing is 3"):
        dpo(pairing=3)


def test_offline_dpo_needs_no_candidates_and_is_an_algorithm():
    one = {"sampling": {"samples_per_prompt": 1}, "data": {"path": "x"}}
    offline = {"name": "dpo", "options": {"source": "offline", "beta": 1000, "loss_type": "ipo"}}
    dpo = build_algorithm(RunConfig.model_validate(one | {"algorithm": offline}))
    assert isinstance(dpo, Algorithm) and dpo.pairs and not dpo.samples
    assert Dpo().pairs and Dpo().samples


# -- runs --------------------------------------------------------------------------------------------------------------


def online(path: Path, **algorithm: Any) -> RunConfig:
    """Runs of `ThreeWeights`, whose errors are about 1."""
    return tiny_config(
        path,
        rounds=3,
        algorithm={"name": "dpo", "options": {"beta": 4.0}} | algorithm,
        sampling={"samples_per_prompt": 4},
        training={"steps": 10, "batch_size": 4, "learning_rate": 0.05, "save_every_steps": 4},
    )


def test_an_online_run_raises_its_reward_and_logs_how_well_it_prefers(tmp_path):
    curves: dict[int, dict[str, float]] = {}
    run = three_weights_run(online(tmp_path))
    result = run_rounds(replace(run, track=lambda round, values: curves.update({round: dict(values)})))
    assert result.aligned[0].gains["redness"].low > 10  # of 255
    first, *_, last = [report.training for report in read_metrics(result.folder / "metrics.jsonl")[1:]]
    assert last["accuracy"] > 0.9 and last["margin"] > first["margin"] > 0 and last["loss"] < math.log(2)
    assert last["margin"] == pytest.approx(last["chosen_reward"] - last["rejected_reward"])
    assert last["chosen_error"] < last["rejected_error"]
    assert curves[3]["train/accuracy"] == last["accuracy"] and curves[3]["train/margin"] == last["margin"]
    page = result.report_path.read_text(encoding="utf-8")
    assert all(f"training: {name}" in page for name in ("accuracy", "margin", "chosen_reward", "rejected_reward"))
    assert "training: steps" not in page


def test_pairs_are_replayed_whole_and_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path):
    config = online(tmp_path / "whole", replay=0.5)
    whole = run_rounds(three_weights_run(config))
    assert [report.selected for report in whole.reports] == [0, 4, 8, 8]  # 4 prompts, and as many of earlier rounds
    stored = SampleStore(whole.folder).read_selection(2)
    assert len(stored) == 4 and all(pair.rejected and pair.rejected.prompt == pair.sample.prompt for pair in stored)
    begun = config.model_copy(update={"output": str(tmp_path / "parts"), "rounds": 1})
    run_rounds(three_weights_run(begun))
    resumed = run_rounds(three_weights_run(begun.model_copy(update={"rounds": 3})), resume=True)
    assert exported(resumed.folder) == exported(whole.folder)


def preferences(folder: Path, *, lines: int = 4) -> Path:
    """Red pictures preferred to blue ones."""
    folder.mkdir()
    for name, color in (("red", (250, 20, 20)), ("blue", (20, 20, 250))):
        Image.new("RGB", (16, 16), color).save(folder / f"{name}.png")
    row = {"chosen": "red.png", "rejected": "blue.png"}
    rows = [json.dumps(row | {"text": f"picture {i}"}) for i in range(lines)]
    (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def offline(path: Path, data: Path, **settings: Any) -> RunConfig:
    options = {"source": "offline", "beta": 4.0}
    return tiny_config(path, algorithm={"name": "dpo", "options": options}, data={"path": str(data)}, **settings)


def test_an_offline_run_learns_to_prefer_what_people_chose(tmp_path):
    def latents(color: float, seed: int) -> Sample:
        noise = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(seed))
        return Sample(id=f"{color}-{seed}", prompt=PROMPT, seed=0, latents=noise + color)

    data = [Example(sample=latents(0.5, k), rejected=latents(-0.5, k + 50)) for k in range(8)]
    config = offline(tmp_path, tmp_path, training={"learning_rate": 0.05, "batch_size": 4, "steps": 10})
    first, last = [report.training for report in run_rounds(three_weights_run(config, data=data)).reports[1:]]
    assert last["accuracy"] > 0.9 and last["margin"] > first["margin"] > 0 and last["loss"] < math.log(2)


def test_an_offline_run_of_a_pipeline_samples_nothing_but_evaluates(tmp_path):
    config = offline(tmp_path, preferences(tmp_path / "data"), training={"steps": None, "batch_size": 3, "epochs": 2})
    run = pipeline_run(config)
    assert len(run.data) == 4 and all(pair.sample.image is None for pair in run.data)  # latents are enough
    result = run_rounds(run)
    base, _, last = result.reports
    assert SampleStore(result.folder).rounds() == []
    assert (last.requested, last.selected, last.training["steps"]) == (0, 4, 3.0)  # 2 epochs of 4 pairs, by 3
    assert {cost.stage for cost in last.ledger} == {"train", "evaluate"}
    assert last.evaluations[0].gains and not base.evaluations[0].gains
    assert result.report_path.is_file()


def test_own_preferences_may_be_mixed_into_an_online_run(tmp_path):
    config = tiny_config(
        tmp_path,
        rounds=1,
        algorithm={"name": "dpo"},
        data={"path": str(preferences(tmp_path / "data")), "share": 0.5},
        training={"steps": 2},
    )
    run = pipeline_run(config)
    report = run_rounds(run).reports[1]
    assert report.selected == 8 and report.training["steps"] == 2  # a pair of each prompt, and as many of one's own


def test_data_that_are_no_preferences_are_named(tmp_path):
    data = preferences(tmp_path / "data", lines=1)
    (data / "metadata.jsonl").write_text('{"file_name": "red.png", "text": "x"}')
    with pytest.raises(DataError, match=r"metadata\.jsonl, line 1: no jpg_0; a preference has"):
        pipeline_run(offline(tmp_path, data))


def test_the_example_makes_preferences_of_what_a_run_scored(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "examples"))
    example = importlib.import_module("preferences_from_run")
    config = tiny_config(tmp_path, sampling={"samples_per_prompt": 4})
    run_rounds(three_weights_run(config))
    assert example.write(example.preferences(config.folder), tmp_path / "pairs") == 8  # 2 rounds of 4 prompts
    scores = {
        id: value for round in (1, 2) for id, value in SampleStore(config.folder).read_scores(round)["redness"].items()
    }
    pairs = [json.loads(line) for line in (tmp_path / "pairs" / "metadata.jsonl").read_text().splitlines()]
    for pair in pairs:
        chosen, rejected = (Path(pair[side]).stem for side in ("chosen", "rejected"))
        of_prompt = [value for id, value in scores.items() if id[:-3] == chosen[:-3]]
        assert (scores[chosen], scores[rejected]) == (max(of_prompt), min(of_prompt))
    loaded = list(load_preferences(tmp_path / "pairs", height=8, width=8))
    assert [text for text, _, _ in loaded] == [pair["text"] for pair in pairs]
    stored = {s.id: s.image for round in (1, 2) for s in SampleStore(config.folder).read_samples(round)}
    assert torch.equal(loaded[0][1], stored[Path(pairs[0]["chosen"]).stem])
