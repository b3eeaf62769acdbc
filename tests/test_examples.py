"""The examples of the how-to pages run, on a tiny pipeline."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_runs import three_weights_run, tiny_config, tiny_pipeline

from raftdiff.build import build, build_algorithm, build_reward
from raftdiff.config import RewardConfig, RunConfig
from raftdiff.errors import ConfigError
from raftdiff.protocols import Algorithm, Reward
from raftdiff.rounds import run_rounds
from raftdiff.types import Group, Phase, Prompt, Sample, Scored

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def my_reward(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("my_reward")


@pytest.fixture
def my_algorithm(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("my_algorithm")


@pytest.fixture
def align_any_pipeline(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("align_any_pipeline")


def picture(*columns: tuple[int, int, int]) -> Sample:
    """A picture one pixel high."""
    return Sample(id="s", prompt=Prompt(text="p"), seed=0, image=torch.tensor(columns, dtype=torch.uint8).T[:, None])


def group(text: str, *rewards: float | None) -> Group:
    prompt = Prompt(text=text)
    return Group(
        prompt=prompt,
        samples=tuple(
            Scored(sample=Sample(id=f"{text}-{k}", prompt=prompt, seed=k), parts={}, reward=reward)
            for k, reward in enumerate(rewards)
        ),
    )


def test_the_reward_example_measures_colorfulness(my_reward):
    reward = my_reward.ColorfulnessReward()
    assert isinstance(reward, Reward)
    # gray: both opponents are 0. Pure red: red-green is 255 everywhere, yellow-blue 127.5, no deviation:
    # 0.3 * sqrt(255^2 + 127.5^2) = 85.530. Red beside green: red-green is 255 and -255 (mean 0, deviation 255),
    # yellow-blue 127.5: 255 + 0.3 * 127.5 = 293.25.
    scores = reward.score([picture((90, 90, 90)), picture((255, 0, 0)), picture((255, 0, 0), (0, 255, 0))])
    assert scores.tolist() == pytest.approx([0.0, 85.530, 293.25], abs=1e-3)


def test_the_reward_example_loads_by_its_module_and_class_only_where_code_is_allowed(my_reward):
    config = RewardConfig(name="my_reward:ColorfulnessReward", options={"scale": 0.5})
    score = build_reward(config, allow_code=True).reward.score([picture((255, 0, 0))])
    assert score.item() == pytest.approx(42.765, abs=1e-3)
    with pytest.raises(ConfigError, match="--allow-code"):
        build_reward(config)


def test_the_reward_example_aligns_a_pipeline(my_reward, tmp_path):
    reward = my_reward.ColorfulnessReward()
    config = tiny_config(tmp_path, rounds=1, rewards=[{"name": reward.name}])
    result = run_rounds(build(config, pipeline=tiny_pipeline(), rewards={reward.name: reward}))
    assert result.reports[-1].scored == 8
    assert "colorfulness" in result.aligned[0].gains


def selected(algorithm: Algorithm, groups: list[Group]) -> dict[str, float]:
    examples = algorithm.select(groups, round=1, seed=0, phase=Phase(grown=1))
    return {example.sample.id: example.weight for example in examples}


def test_the_algorithm_example_weighs_the_best_of_a_prompt_by_rank_alone(my_algorithm):
    # Of the two best of four: ln(2.5 / 1) = .916291 and ln(2.5 / 2) = .223144, times 2 over their sum of 1.139434.
    expected = pytest.approx({"a-3": 1.608326, "a-0": 0.391674, "b-1": 1.0}, abs=1e-5)
    algorithm = my_algorithm.RankWeighted(share=0.5)
    assert selected(algorithm, [group("a", 3.0, None, 1.0, 4.0, 2.0), group("b", 0.0, 1.0, None)]) == expected
    assert selected(algorithm, [group("a", 9.0, None, 1.0, 1e6, 4.0), group("b", 0.0, 0.1, None)]) == expected


def test_the_algorithm_example_selects_nothing_of_a_prompt_without_a_reward(my_algorithm):
    assert selected(my_algorithm.RankWeighted(), [group("a", None, None)]) == {}


def test_the_algorithm_example_refuses_what_it_cannot_run(my_algorithm):
    with pytest.raises(ConfigError, match="share is 0"):
        my_algorithm.RankWeighted(share=0)
    with pytest.raises(ConfigError, match="samples_per_prompt >= 2"):
        my_algorithm.RankWeighted().validate(RunConfig.model_validate({"sampling": {"samples_per_prompt": 1}}))


def test_the_algorithm_example_is_chosen_in_a_file_and_raises_the_reward(my_algorithm, tmp_path):
    chosen = {"name": "my_algorithm:RankWeighted", "options": {"share": 0.25}}
    config = tiny_config(tmp_path, algorithm=chosen, sampling={"samples_per_prompt": 8}, training={"steps": 20})
    with pytest.raises(ConfigError, match="--allow-code"):
        build_algorithm(config)
    result = run_rounds(three_weights_run(config, algorithm=build_algorithm(config, allow_code=True)))
    assert [report.selected for report in result.reports[1:]] == [4 * 2, 4 * 2]
    assert result.aligned[0].gains["redness"].mean > 10  # of 255


def test_the_pipeline_example_aligns_a_saved_pipeline(align_any_pipeline, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n", encoding="utf-8")
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--reward", "jpeg", "--rounds", "1", "--steps", "2"]
    arguments += ["--samples-per-prompt", "2", "--output", str(tmp_path / "runs"), "--name", "tiny"]
    result = align_any_pipeline.main([str(tmp_path / "model"), *arguments])
    assert (tmp_path / "runs" / "tiny" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert result.reports[-1].scored == 4
