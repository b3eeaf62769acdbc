"""The reward `pictures` against pictures drawn by hand, runs of language models on it, and the demo of one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_cli import call
from tiny_runs import tiny_pipeline
from tiny_text import text_config, text_run
from transformers import AutoModelForCausalLM

from raftdiff import cli
from raftdiff.build import build, build_prompts, build_reward
from raftdiff.config import RewardConfig, RunConfig, load_config, load_preset
from raftdiff.errors import ConfigError, DataError
from raftdiff.pictures import PicturesReward
from raftdiff.prompts import load_prompts, sample_seed
from raftdiff.protocols import Reward
from raftdiff.reward_models.image_stats import ImageStatsReward
from raftdiff.reward_models.jpeg import JpegReward
from raftdiff.rounds import run_rounds
from raftdiff.store import SampleStore
from raftdiff.types import Prompt, Sample

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "prompt-writer.yaml"
TEXTS = ["a red circle", "a blue square on a white background", "a green cross"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def written(*texts: str) -> list[Sample]:
    prompt = Prompt(text="Words: red. Caption:")
    return [Sample(id=f"0001-{prompt.id}-{k:03d}", prompt=prompt, seed=k, text=text) for k, text in enumerate(texts)]


def pixels_by_hand(sample: Sample, k: int) -> Sample:
    """The k-th picture of a text, by the pipeline alone."""
    generator = torch.Generator().manual_seed(sample_seed(0, 0, sample.id, k))
    arguments = {"num_inference_steps": 2, "guidance_scale": 1.5, "generator": generator, "output_type": "pt"}
    drawn = tiny_pipeline()(sample.text, **arguments).images[0]
    return Sample(id="", prompt=Prompt(text=sample.text), seed=0, image=(drawn * 255).round().to(torch.uint8))


def test_a_text_has_the_mean_over_its_pictures_of_the_weighted_sum_of_their_rewards(model):
    options = {"model": model, "steps": 2, "guidance": 1.5, "images_per_text": 2, "batch_size": 4}
    rewards = [{"name": "jpeg", "weight": 2.0}, {"name": "image-stats", "options": {"metric": "saturation"}}]
    made = build_reward(RewardConfig(name="pictures", options={**options, "rewards": rewards})).reward
    samples = written(*TEXTS)
    pictures = [[pixels_by_hand(sample, k) for k in range(2)] for sample in samples]
    parts = [2 * JpegReward().score(row) + ImageStatsReward(metric="saturation").score(row) for row in pictures]
    assert isinstance(made, Reward) and made.weights_from == f"pictures of {model}"
    assert made.score(samples).tolist() == pytest.approx([part.mean().item() for part in parts], abs=0.02)


def test_the_pictures_of_a_sample_are_a_function_of_its_id_in_any_batch(model):
    reward = PicturesReward([{"name": "jpeg"}], model=model, steps=2, batch_size=2)
    samples = written(TEXTS[0], TEXTS[0], TEXTS[1])
    first = reward.score(samples)
    assert first[0] != first[1]  # one text, two ids
    assert torch.allclose(reward.score(samples[::-1]), first.flip(0), rtol=1e-3)
    assert reward.score([]).shape == (0,)
    assert not reward._policy._prompts._encodings  # which would grow with every text


def test_a_text_whose_pictures_cannot_be_judged_has_no_value(model):
    reward = PicturesReward([{"name": "shapes-oracle"}], model=model, steps=1)
    known, unknown = reward.score(written("a red circle", "not a caption")).tolist()
    assert 0 <= known <= 1 and unknown != unknown
    with pytest.raises(DataError, match="holds no text"):
        reward.score([Sample(id="s", prompt=Prompt(text="p"), seed=0)])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rewards": [{"name": "jpeg"}], "images_per_text": 0}, "images_per_text of the reward pictures is 0"),
        ({"rewards": [{"name": "jpeg"}], "steps": 0}, "options of the reward pictures: sampling.num_inference_steps"),
        ({"rewards": [{"name": "jpeg"}], "step": 2}, "pictures has no option 'step'; did you mean 'steps'"),
        ({"rewards": [{"name": "length"}]}, "takes rewards of pictures, and length is of texts"),
        ({"rewards": [{"name": "jpg"}]}, "unknown reward 'jpg'; did you mean 'jpeg'"),
        ({"rewards": []}, "at least one reward needs a weight"),
        ({"rewards": [{"name": "os:Path"}]}, "names code to be imported"),
        ({}, "needs the option 'rewards'"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(options, said):
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        build_reward(RewardConfig(name="pictures", options=options))
    assert "\n" not in str(refused.value)


def test_a_language_model_is_aligned_with_the_pictures_of_its_texts(model, tmp_path):
    options = {"model": model, "steps": 1, "rewards": [{"name": "jpeg"}]}
    config = text_config(tmp_path, rounds=1, rewards=[{"name": "pictures", "options": options}])
    result = run_rounds(text_run(config))
    store = SampleStore(config.folder)
    scores = store.read_scores(1)["pictures"]
    samples = [s for s in store.read_samples(1) if s.flaw is None]  # the tiny model also writes nothing at all
    again = PicturesReward(**options).score(samples).tolist()
    assert [scores[s.id] for s in samples] == pytest.approx(again, rel=1e-3)
    for example in store.read_selection(1):
        of_prompt = [scores[s.id] for s in samples if s.prompt.id == example.sample.prompt.id]
        assert scores[example.sample.id] == max(of_prompt)
    assert result.reports[1].failed == 0 and result.reports[1].selected == 4


def few(config: RunConfig, output: Path, *, held_out: str) -> RunConfig:
    """The same run, in a moment."""
    small = config.model_dump(mode="json")
    small |= {"output": str(output), "rounds": 1, "tracker": "none"}
    small["prompts"]["per_round"] = 4
    small["sampling"]["samples_per_prompt"] = 4
    small["training"] |= {"epochs": 2, "batch_size": 4}
    small["evaluation"] |= {"prompts": held_out, "every": 1}
    for reward in (*small["rewards"], *small["evaluation"]["rewards"]):
        if reward["name"] == "pictures":
            reward["options"]["steps"] = 2
    return RunConfig.model_validate(small)


def test_the_example_writes_captions_whose_pictures_are_judged(tmp_path):
    config = few(load_config(EXAMPLE), tmp_path, held_out="shapes-text:caption/4/42")
    result = run_rounds(build(config))
    assert result.reports[1].requested == 16 and result.reports[1].selected == 4
    base, aligned = result.base[0].metrics, result.aligned[0].metrics
    assert base.keys() == aligned.keys() >= {"pictures", "pictures-strict"}
    assert 0 <= aligned["pictures-strict"].mean <= 1


def test_the_demo_of_the_language_model_ends_with_a_table_and_a_line_that_loads_its_adapter(tmp_path, monkeypatch):
    preset = load_preset("demo-text")
    monkeypatch.setattr(cli, "load_preset", lambda name: {"demo-text": small}[name])
    small = few(preset, tmp_path, held_out="shapes-text:translation/4/13")
    shown = call("demo", "text", "--output", tmp_path, "--seed", 3)
    assert shown.code == 0, shown.err
    table = shown.out.split("\n\n")[1]
    for name in ("shapes-translation", "translation-strict", "sentiment", "diversity"):
        assert name in table
    folder = tmp_path / "demo-text"
    assert load_config(folder / "config.yaml").seed == 3 and (folder / "report.html").is_file()
    (line,) = re.findall("load it  (.*)", shown.out)
    loaded = {"AutoModelForCausalLM": AutoModelForCausalLM}
    exec(line, loaded)
    assert isinstance(loaded["model"], PeftModel) and str(folder / "lora") in line


def test_the_demo_of_the_language_model_reports_on_prompts_that_nothing_was_chosen_or_trained_on():
    prompts, held_out = ({p.text for p in some} for some in build_prompts(load_preset("demo-text")))
    chosen_on = {p.text for p in load_prompts("shapes-text:translation/96/12")}
    assert len(held_out) == 96 and not held_out & prompts and not held_out & chosen_on
