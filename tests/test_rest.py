"""ReST grows once and improves several times on what it grew, above rising thresholds."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from tiny_runs import PointPolicy, Told, exported, in_child, pipeline_run, redness, three_weights_run, tiny_config

from raftdiff.algorithms.raft import Raft
from raftdiff.algorithms.rest import Rest
from raftdiff.build import check_needs
from raftdiff.config import RunConfig
from raftdiff.errors import ConfigError
from raftdiff.interrupts import Interrupted
from raftdiff.pipelines.diffusion import DiffusionPolicy
from raftdiff.pipelines.llm import LanguagePolicy
from raftdiff.report import read_metrics
from raftdiff.rounds import run_rounds
from raftdiff.store import SampleStore
from raftdiff.types import Batch, Draw, Evaluation, Example, Group, Interval, Phase, Prompt, RoundReport, Sample, Scored


def group(text: str, *rewards: float | None) -> Group:
    """The samples of the prompt `text`; the k-th has the id `text-k`."""
    prompt = Prompt(text=text)
    return Group(
        prompt=prompt,
        samples=tuple(
            Scored(sample=Sample(id=f"{text}-{k}", prompt=prompt, seed=k), parts={}, reward=reward)
            for k, reward in enumerate(rewards)
        ),
    )


def select(rest: Rest | Raft, groups: Sequence[Group], *, improve: int = 0) -> list[Example]:
    return rest.select(groups, round=1 + improve, seed=0, phase=Phase(grown=1, improve=improve))


def weights(rest: Rest, groups: Sequence[Group], *, improve: int = 0) -> dict[str, float]:
    return {example.sample.id: example.weight for example in select(rest, groups, improve=improve)}


# ------------------------------------------------------------------------------------------------------------ phases


def report(round: int, phase: Phase, reward: float | None) -> RoundReport:
    """What a round reported, with the trained reward on the held-out prompts, or without an evaluation."""
    metrics = {} if reward is None else {"reward": Interval(mean=reward, low=0.0, high=0.0, count=4)}
    evaluation = Evaluation(guidance_scale=1.0, metrics=metrics, gains={}, per_sample={}, failed=0)
    counts = dict.fromkeys(("requested", "scored", "failed", "skipped", "selected"), 0)
    evaluations = () if reward is None else (evaluation,)
    return RoundReport(round=round, phase=phase, rewards={}, training={}, evaluations=evaluations, **counts)


def phases(rest: Rest, rewards: Sequence[float | None]) -> list[tuple[int, int, float]]:
    """(grown, improve, learning rate) of the rounds that follow on rounds with these rewards, the base first."""
    reports: list[RoundReport] = []
    for round, reward in enumerate(rewards):
        phase = rest.phase(round, reports) if round else Phase(grown=0)
        reports.append(report(round, phase, reward))
    return [(r.phase.grown, r.phase.improve, r.phase.learning_rate) for r in reports[1:]]


def test_each_grow_is_improved_on_once_for_each_threshold_at_a_falling_learning_rate():
    rest = Rest(thresholds=[0.5, 0.7, 0.9], learning_rate_decay=0.5)
    first = [(1, 0, 1.0), (1, 1, 0.5), (1, 2, 0.25)]
    assert phases(rest, [0, 1, 2, 3, 4, 5]) == [*first, (4, 0, 1.0), (4, 1, 0.5)]


def test_the_gate_grows_anew_after_an_improve_that_did_not_raise_the_held_out_reward():
    rewards = [0.0, 1.0, 1.0, 2.0, 1.5, 1.6, 1.7]  # round 2 did not, nor did round 4
    grown = [(1, 0), (1, 1), (3, 0), (3, 1), (5, 0), (5, 1)]
    assert [phase[:2] for phase in phases(Rest(), rewards)] == grown
    straight = [(1, 0), (1, 1), (1, 2), (1, 3), (5, 0), (5, 1)]
    assert [phase[:2] for phase in phases(Rest(gate=False), rewards)] == straight


def test_the_gate_stays_open_where_one_of_the_two_rounds_was_not_evaluated():
    assert [phase[:2] for phase in phases(Rest(), [3.0, None, 2.0, None, 0.0])] == [(1, 0), (1, 1), (1, 2), (1, 3)]


# --------------------------------------------------------------------------------------------------------- selection


GROUPS = [group("hard", 0.0, 1.0, 2.0, 3.0), group("easy", 7.0, 8.0, 9.0, 10.0)]


def test_each_rule_filters_by_the_threshold_of_its_improve_with_the_weight_1():
    globally = Rest(rule="global", thresholds=[0.0, 0.7, 0.95])
    assert len(select(globally, GROUPS)) == 8
    assert weights(globally, GROUPS, improve=1) == {"easy-3": 1.0, "easy-2": 1.0, "easy-1": 1.0}
    assert weights(globally, GROUPS, improve=2) == {"easy-3": 1.0}
    of_prompts = dict.fromkeys(["hard-3", "hard-2", "easy-3", "easy-2"], 1.0)
    assert weights(Rest(rule="percentile", thresholds=[0.5]), GROUPS) == of_prompts
    assert weights(Rest(rule="interpolation", thresholds=[0.0, 0.5]), GROUPS) == of_prompts
    best = weights(Rest(rule="interpolation", thresholds=[0.0, 0.5]), GROUPS, improve=1)
    assert best == {"hard-3": 1.0, "easy-3": 1.0}  # 1.5 + .5 * 1.5 = 2.25 is above 2


def test_per_prompt_rules_keep_every_prompt_and_a_high_global_threshold_loses_some():
    """Claim S6, at each of the default thresholds."""
    for improve in range(4):
        for rule in ("percentile", "interpolation"):
            assert {e.sample.prompt.text for e in select(Rest(rule=rule), GROUPS, improve=improve)} == {"hard", "easy"}
        lost = select(Rest(rule="global"), GROUPS, improve=improve)
        assert {example.sample.prompt.text for example in lost} == {"easy"}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_raft_is_rest_with_one_improve_and_the_quantile_that_leaves_the_best_of_each_prompt(keep):
    generator = torch.Generator().manual_seed(0)
    groups = [group(f"p{i}", *torch.randn(8, generator=generator).tolist()) for i in range(20)]
    rest = Rest(rule="percentile", thresholds=[1 - keep / 8])
    assert select(rest, groups) == select(Raft(keep=keep), groups)


def test_a_threshold_that_keeps_nothing_is_an_empty_round_that_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        assert select(Rest(rule="global"), [group("a", 2.0, 2.0), group("b", None)], improve=1) == []
    assert caplog.messages == ["round 2: global > 0.8 keeps nothing of 2 scored samples"]
    assert select(Rest(), []) == select(Rest(loss_type="vmpo"), [group("a", None)]) == []


# ----------------------------------------------------------------------------------------------------------- weights


def test_vmpo_weighs_the_better_half_by_advantage_rather_than_by_reward():
    # Advantages: a 1 and -1, b 3 and -3. The better half is a-1 (reward 2) and b-1 (reward 1).
    groups = [group("a", 0.0, 2.0), group("b", -5.0, 1.0)]
    found = weights(Rest(rule="global", thresholds=[0.0], loss_type="vmpo", epsilon=0.1), groups)
    assert found.keys() == {"a-1", "b-1"}
    share = found["b-1"] / 2
    assert share > 0.5 and found["a-1"] / 2 == pytest.approx(1 - share)
    nats = share * math.log(2 * share) + (1 - share) * math.log(2 * (1 - share))
    assert nats == pytest.approx(0.1, rel=1e-3)


def test_the_filter_stands_before_the_offline_losses_and_the_value_is_of_the_whole_group():
    # Above .5 of each prompt are a-1, a-2 and b-1, b-2; their advantages over the means 3 and 1 are 1, 3 and 2, 4.
    groups = [group("a", 0.0, 4.0, 6.0, 2.0), group("b", -3.0, 3.0, 5.0, -1.0)]
    found = weights(Rest(thresholds=[0.5], loss_type="vmpo"), groups)
    assert found.keys() == {"a-2", "b-2"} and found["b-2"] > found["a-2"] > 0


def test_bvmpo_adds_a_lambda_that_falls_from_1_to_1e_5_to_the_weight_of_every_sample():
    groups = [group("a", 0.0, 2.0), group("b", -5.0, 1.0)]
    thresholds = [0.0, 1e-3, 2e-3]
    vmpo = weights(Rest(rule="global", thresholds=[0.0], loss_type="vmpo"), groups)
    rest = Rest(rule="global", thresholds=thresholds, loss_type="bvmpo")
    assert weights(rest, groups) == {"a-1": vmpo["a-1"] + 1, "a-0": 1.0, "b-1": vmpo["b-1"] + 1, "b-0": 1.0}
    assert weights(rest, groups, improve=1)["a-0"] == pytest.approx(10**-2.5)
    assert weights(rest, groups, improve=2)["a-0"] == pytest.approx(1e-5)


def test_gold_weighs_by_the_reward_scaled_over_all_prompts_and_the_worst_of_all_falls_out():
    rest = Rest(rule="global", thresholds=[0.0], loss_type="gold")
    found = weights(rest, GROUPS)
    assert found == {f"hard-{k}": k / 10 for k in (1, 2, 3)} | {f"easy-{k}": (7 + k) / 10 for k in range(4)}


def test_gold_is_for_policies_with_tokens():
    assert Rest(loss_type="gold").needs == ("token_log_prob",) and Rest().needs == ()
    check_needs(Rest(loss_type="gold"), "rest", LanguagePolicy)
    with pytest.raises(ConfigError, match="algorithm rest needs token_log_prob, which DiffusionPolicy does not have"):
        check_needs(Rest(loss_type="gold"), "rest", DiffusionPolicy)


def test_oac_weighs_by_the_advantage_in_its_deviations_and_clips_it():
    # Advantages 1, -1, 7, -7: their deviation is 5.
    groups = [group("a", 3.0, 1.0), group("b", 10.0, -4.0)]
    rest = Rest(rule="global", thresholds=[0.0], loss_type="oac", advantage_clip=1.2)
    assert weights(rest, groups) == pytest.approx({"a-0": 0.2, "a-1": -0.2, "b-0": 1.2, "b-1": -1.2})
    assert select(rest, [group("a", 3.0, 3.0)]) == []  # no advantage, nothing to learn


def test_a_negative_weight_pushes_away():
    prompt = Prompt(text="a")
    samples = [Sample(id=str(k), prompt=prompt, seed=k, latents=torch.full((1,), k + 2.0)) for k in range(2)]
    draw = Draw(noise=torch.zeros(2, 1), quantile_B=torch.zeros(2), dropped_B=torch.zeros(2, dtype=torch.bool))
    policy = PointPolicy()
    examples = [Example(sample=sample) for sample in samples]
    batch = Batch(examples=examples, weight_B=torch.tensor([0.5, -1.0]), draw=draw)
    loss_B, metrics = Rest(loss_type="oac").loss(policy, batch)  # type: ignore[arg-type]
    assert loss_B.tolist() == [0.5, -4.0] and metrics["error"].tolist() == [1.0, 4.0]
    loss_B.sum().backward()
    assert policy.mean.grad is not None and policy.mean.grad.item() == 3.0  # .5 * -2 + 1 * 4: down, away from 3


# -------------------------------------------------------------------------------------------------------------- runs


def rest_config(output, **settings) -> RunConfig:
    """Two Grows of two Improve steps each; the gate is open, so that the phases do not depend on the reward."""
    options = {"thresholds": [0.5, 0.9], "gate": False} | settings.pop("options", {})
    return tiny_config(output, **{"rounds": 4, "algorithm": {"name": "rest", "options": options}} | settings)


def finish(config, *, resume: bool = False, **parts):
    return run_rounds(three_weights_run(config, **parts), resume=resume)


def test_what_is_grown_is_sampled_and_scored_once_for_all_its_improve_steps(tmp_path):
    judged: Counter[str] = Counter()

    def counted(images, prompts):
        judged.update(prompts)
        return redness(images, prompts)

    config = rest_config(tmp_path, evaluation={"every": 4})
    reports = finish(config, reward=counted).reports
    assert [(r.phase.grown, r.phase.improve) for r in reports[1:]] == [(1, 0), (1, 1), (3, 0), (3, 1)]
    passes = [{cost.stage: cost.passes for cost in r.ledger}["sample"] for r in reports[1:]]
    assert passes == [8, 0, 8, 0]
    assert SampleStore(config.folder).rounds() == [1, 3]
    assert judged.total() == 4 + 2 * 8 + 4  # the base, two Grows and the last evaluation
    assert [r.training["learning_rate"] for r in reports[1:]] == pytest.approx([0.1, 0.05, 0.1, 0.05])
    selected = [SampleStore(config.folder).read_selection(round) for round in (1, 2)]
    assert {e.sample.id for e in selected[1]} <= {e.sample.id for e in selected[0]}  # the threshold rises
    assert all(e.sample.id.startswith("0001-") for e in selected[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """The adapter of a run that nothing happened to."""
    return exported(finish(rest_config(tmp_path_factory.mktemp("whole"))).folder)


@pytest.mark.parametrize("stage", ["sample", "score", "train", "evaluate"])
def test_stopped_in_a_later_improve_a_run_goes_on_to_the_same_adapter(tmp_path, whole, stage):
    config = rest_config(tmp_path)
    stages: list[tuple[int, str]] = []

    def stop(round: int, name: str) -> None:
        stages.append((round, name))
        if name == stage and [n for _, n in stages].count(stage) == (3 if stage == "evaluate" else 2):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        finish(config, display=Told(stop))
    assert len(read_metrics(config.folder / "metrics.jsonl")) == 2  # the base and the first Improve
    result = finish(config, resume=True)
    assert exported(result.folder) == whole
    assert {cost.stage: cost.passes for cost in result.reports[2].ledger}["sample"] == 0


def test_a_pipeline_killed_inside_an_improve_goes_on_to_the_same_adapter(tmp_path):
    settings = {"rounds": 2, "training": {"save_every_steps": 2, "learning_rate": 1e-2}}
    straight = run_rounds(pipeline_run(rest_config(tmp_path / "straight", **settings)))
    config = rest_config(tmp_path / "killed", **settings)

    def kill_when_there() -> None:
        if (config.folder / "checkpoints" / "round-0001-step-00002").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    killed = in_child(lambda: run_rounds(pipeline_run(config)), on_write=kill_when_there, of=config.folder)
    assert killed == -signal.SIGKILL
    resumed = run_rounds(pipeline_run(config), resume=True)
    assert exported(resumed.folder) == exported(straight.folder)
    assert [r.phase for r in resumed.reports] == [r.phase for r in straight.reports]
    assert [r.training for r in resumed.reports] == [r.training for r in straight.reports]


def test_with_one_improve_and_the_quantile_of_the_best_a_run_is_a_run_of_raft(tmp_path):
    raft = finish(tiny_config(tmp_path / "raft"))
    options = {"rule": "percentile", "thresholds": [0.5]}  # of K = 2
    rest = finish(tiny_config(tmp_path / "rest", algorithm={"name": "rest", "options": options}))
    assert exported(rest.folder) == exported(raft.folder)


def own(id: str, text: str, *color: int) -> Example:
    """A user's picture of one color."""
    image = torch.tensor(color, dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    return Example(sample=Sample(id=id, prompt=Prompt(text=text), seed=0, image=image, latents=torch.zeros(3, 2, 2)))


class Selected(Rest):
    """ReST that keeps what it was given and what it chose."""

    def select(self, groups, *, round, seed, phase):
        chosen = super().select(groups, round=round, seed=seed, phase=phase)
        seen[round] = {g.prompt.text: len(g.samples) for g in groups}, [e.sample.id for e in chosen]
        return chosen


seen: dict[int, tuple[dict[str, int], list[str]]] = {}


def test_the_users_pictures_are_scored_once_in_a_run_grouped_by_caption_and_filtered(tmp_path):
    judged: Counter[str] = Counter()

    def counted(images, prompts):
        judged.update(prompts)
        return redness(images, prompts)

    # One caption is also a prompt of the run; its two pictures are redder and bluer than all samples.
    data = [
        own("red", "a red circle", 255, 0, 0),
        own("blue", "a red circle", 0, 0, 255),
        own("own", "my own", 9, 9, 9),
    ]
    config = rest_config(tmp_path, data={"path": "unused"}, combine="sum", evaluation={"every": 4})
    stop = Told(lambda round, name: os.kill(os.getpid(), signal.SIGTERM) if (round, name) == (2, "train") else None)
    options = {"thresholds": [0.5, 0.9], "gate": False}
    with pytest.raises(Interrupted):
        finish(config, algorithm=Selected(**options), data=data, reward=counted, display=stop)
    result = finish(config, algorithm=Selected(**options), data=data, reward=counted, resume=True)
    assert judged["my own"] == 1  # in four rounds and two launches
    assert [r.requested for r in result.reports[1:]] == [8] * 4
    assert result.reports[1].rewards["best_of_group"] < 128  # that of the red picture is 255
    assert ">16<small>" in result.report_path.read_text(encoding="utf-8")  # samples drawn, in two Grows
    for round in (1, 2, 3, 4):
        sizes, chosen = seen[round]
        assert sizes == {"a red circle": 4, "a blue square": 2, "a green triangle": 2, "a yellow star": 2, "my own": 1}
        assert {"red", "own"} <= set(chosen) and "blue" not in chosen


def test_a_run_raises_its_reward(tmp_path):
    config = rest_config(
        tmp_path, sampling={"samples_per_prompt": 8}, training={"steps": 20}, options={"thresholds": [0.7, 0.9]}
    )
    gains = [r.evaluations[0].gains["redness"].mean for r in finish(config).reports[1:]]
    assert 5 < gains[0] < gains[1] < gains[2] < gains[3]  # of 255; claim S1


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rule": "percentil"}, "did you mean 'percentile'"),
        ({"loss_type": "silver"}, "there are bc, vmpo, bvmpo, oac, gold"),
        ({"least_importance": 1.5}, "at most 1"),
        ({"thresholds": []}, "give a list of numbers"),
        ({"thresholds": 0.9}, "give a list of numbers"),
        ({"thresholds": "0.9"}, "give a list of numbers"),
        ({"thresholds": [0.9, 0.7]}, "needs a higher one"),
        ({"thresholds": [0.7, 0.7]}, "needs a higher one"),
        ({"thresholds": [70, 90]}, "0.9 for the 90th percentile"),
        ({"thresholds": [float("nan")]}, "between 0 and 1"),
        ({"thresholds": [0.9, 1.0], "rule": "global"}, "nothing is above 1"),
        ({"learning_rate_decay": 1.5}, "positive and at most 1"),
        ({"learning_rate_decay": 0.0}, "learning_rate_decay is 0.0"),
        ({"epsilon": -1.0}, "epsilon is -1.0"),
        ({"advantage_clip": float("inf")}, "advantage_clip is inf"),
    ],
)
def test_options_that_cannot_be_run_are_refused(options: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        Rest(**options)


def test_one_sample_a_prompt_is_refused_where_samples_of_a_prompt_are_compared():
    config = RunConfig.model_validate({"sampling": {"samples_per_prompt": 1}})
    for rest in (Rest(), Rest(rule="interpolation"), Rest(rule="global", loss_type="oac")):
        with pytest.raises(ConfigError, match="samples_per_prompt >= 2"):
            rest.validate(config)
    Rest(rule="global").validate(config)


def test_replay_is_refused_as_every_improve_is_one():
    with pytest.raises(ConfigError, match=r"leave out algorithm\.replay"):
        Rest().validate(RunConfig.model_validate({"algorithm": {"name": "rest", "replay": 0.2}}))
