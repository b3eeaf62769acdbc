"""Preferences and the models that learn them: hand-computed accuracies, scales and weights; heads and language models
that learn what they are shown, are published whole, and load as rewards."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import expit
from tiny_text import WORDS, tiny_language_model, tiny_tokenizer

from raftdiff.build import build_reward
from raftdiff.config import RewardConfig
from raftdiff.errors import DataError, TrainingError, WeightsError
from raftdiff.losses import bradley_terry
from raftdiff.preferences import (
    Preference,
    accuracy,
    calibration,
    cross_validated,
    objective_weights,
    split_by_prompt,
)
from raftdiff.principles import Principle
from raftdiff.protocols import Reward
from raftdiff.reward_models.preference import HEAD, PreferenceReward
from raftdiff.reward_models.preference_training import (
    HEAD_FIT,
    Fit,
    differences,
    train_picture_model,
    train_text_model,
)
from raftdiff.reward_models.reward_model import RewardModel
from raftdiff.scoring import score_parts
from raftdiff.types import Prompt, Sample

BRIGHT = Principle(name="bright", modality="image", direction="more", wording="light")
GOOD = Principle(name="good", modality="text", direction="more", wording="goodness")
EMBEDDED = {"model": "shapes"}


def picture(prompt: str, k: int, brightness: int) -> Sample:
    generator = torch.Generator().manual_seed(1000 * brightness + k)
    image = torch.randint(0, 60, (3, 32, 32), generator=generator) + brightness
    return Sample(id=f"0001-{prompt}-{k:02d}", prompt=Prompt(text=prompt), seed=k, image=image.to(torch.uint8))


def bright_and_dark(prompts: int = 10, pairs: int = 4) -> list[Preference]:
    return [
        Preference(chosen=picture(f"p{i}", 2 * k, 150), rejected=picture(f"p{i}", 2 * k + 1, 20), margin=1.0)
        for i in range(prompts)
        for k in range(pairs)
    ]


def test_the_loss_is_minus_the_log_likelihood_of_the_choice_and_a_margin_asks_for_more():
    loss_B, metrics = bradley_terry(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.5]))
    assert loss_B.tolist() == pytest.approx([math.log(1 + math.exp(-1.0)), math.log(1 + math.exp(3.5))])
    assert metrics["accuracy"].tolist() == [1.0, 0.0]


def test_prompts_are_held_out_with_all_their_pairs_and_the_same_ones_for_every_principle():
    preferences = bright_and_dark(prompts=40)
    train, held_out = split_by_prompt(preferences, 0.25)
    sides = [{p.chosen.prompt.text for p in side} for side in (train, held_out)]
    assert sides[0].isdisjoint(sides[1]) and len(train) + len(held_out) == 160
    assert 4 <= len(sides[1]) <= 17  # of 40 at .25: within two and a half deviations
    fewer = [p for p in preferences if p.chosen.prompt.text[-1] in "02468"]
    kept = {p.chosen.prompt.text for p in split_by_prompt(fewer, 0.25)[1]}
    assert kept == {text for text in sides[1] if text[-1] in "02468"}
    assert {p.chosen.prompt.text for p in split_by_prompt(preferences, 0.25, seed=1)[1]} != sides[1]


def test_both_sides_of_a_split_have_a_prompt_and_one_prompt_cannot_be_split():
    two = bright_and_dark(prompts=2)
    assert [len(side) for share in (0.0, 1.0) for side in split_by_prompt(two, share)] == [4, 4, 4, 4]
    with pytest.raises(DataError, match="preferences for 1 prompts; it takes at least 2"):
        split_by_prompt(bright_and_dark(prompts=1), 0.5)


def test_accuracy_has_its_wilson_interval():
    found = accuracy(np.array([1.0] * 8 + [-1.0, 0.0]))
    center, half = (0.8 + 1.92073 / 10) / (1 + 3.84146 / 10), 1.959964 / 1.384146 * math.sqrt(0.016 + 3.84146 / 400)
    assert (found.mean, found.count) == (0.8, 10)
    assert (found.low, found.high) == (pytest.approx(center - half, abs=1e-4), pytest.approx(center + half, abs=1e-4))
    assert math.isnan(accuracy(np.array([])).mean)


def test_the_calibrated_scale_makes_differences_log_odds():
    rng = np.random.default_rng(0)
    difference_N = rng.normal(size=20_000)
    chosen_N = np.where(rng.random(20_000) < expit(0.7 * difference_N), difference_N, -difference_N)
    assert calibration(chosen_N) == pytest.approx(0.7, abs=0.04)
    assert calibration(5 * chosen_N) == pytest.approx(0.14, abs=0.008)
    assert 0 < calibration(np.ones(10)) == pytest.approx(math.log(11.0), rel=1e-3)  # of Platt's target 11/12
    assert calibration(-np.ones(10)) < 0.01


def simulated(rng: np.random.Generator, true_R: np.ndarray, count: int = 4000) -> np.ndarray:
    """Differences of scores, of the one that is preferred less the other's, where log-odds are linear in them."""
    x_NR = rng.normal(size=(count, len(true_R))) * np.array([1.0, 5.0, 2.0])
    return np.where(rng.random(count) < expit(x_NR @ true_R), 1, -1)[:, None] * x_NR


def test_the_weights_are_those_of_the_simulation_and_a_useless_or_opposed_objective_is_seen():
    weights = objective_weights(
        ["a", "useless", "opposed"], simulated(np.random.default_rng(0), np.array([1.5, 0, -0.4]))
    )
    assert [w.raw for w in weights] == pytest.approx([1.5, 0.0, -0.4], abs=0.1)
    assert [w.deviation for w in weights] == pytest.approx([1.0, 5.0, 2.0], rel=0.05)
    a, useless, opposed = weights
    assert a.low > 0 and useless.low < 0 < useless.high and opposed.high < 0
    assert all(w.weight == pytest.approx(w.raw * w.deviation) for w in weights)


def test_the_interval_of_a_weight_holds_it_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(100):
        weight = objective_weights(["a", "b", "c"], simulated(rng, np.array([0.8, 0.1, 0.0]), count=200))[0]
        held += weight.low / weight.deviation <= 0.8 <= weight.high / weight.deviation
    assert 88 <= held <= 100


def test_cross_validation_leaves_the_pairs_of_a_prompt_out_together():
    x_NR = np.array([[1.0], [1.0], [1.0], [-1.0], [-1.0], [1.0], [2.0], [-3.0]])
    prompts = ["p", "p", "p", "p", "q", "q", "r", "r"]
    sum_N = cross_validated(["a"], x_NR, prompts, folds=3)
    without_p = objective_weights(["a"], x_NR[4:])[0].raw
    assert sum_N[:4].tolist() == pytest.approx([without_p, without_p, without_p, -without_p])
    without_r = objective_weights(["a"], x_NR[:6])[0].raw
    assert sum_N[6:].tolist() == pytest.approx([2 * without_r, -3 * without_r])
    with pytest.raises(DataError, match="held-out pairs of 1 prompts; it takes at least 2"):
        cross_validated(["a"], x_NR[:2], ["p", "p"])


def test_weights_without_a_finite_best_are_refused():
    with pytest.raises(DataError, match="some weights explain every one of the 3 overall preferences"):
        objective_weights(["a"], np.array([[1.0], [2.0], [0.5]]))
    with pytest.raises(DataError, match="b: the scores of no pair differ"):
        objective_weights(["a", "b"], np.array([[1.0, 0.0], [-1.0, 0.0]]))


@pytest.fixture(scope="module")
def bright(tmp_path_factory):
    """A head that was trained to prefer bright pictures."""
    folder = tmp_path_factory.mktemp("models") / "bright"
    return folder, train_picture_model(bright_and_dark(), BRIGHT, folder, encoder=EMBEDDED, origin={"judge": "me"})


def test_a_head_on_clip_learns_what_it_is_shown(bright):
    _, fitted = bright
    assert fitted.accuracy.mean == 1.0 and fitted.accuracy.count == 40 - fitted.pairs >= 4


def test_a_preference_model_is_a_reward_by_its_folder(bright):
    folder, _ = bright
    reward = build_reward(RewardConfig(name="preference", options={"path": str(folder)})).reward
    assert isinstance(reward, Reward) and reward.modality == "image"
    value_N = score_parts([picture("new", 0, 150), picture("new", 1, 20)], reward)
    assert value_N[0] > value_N[1]
    assert PreferenceReward(folder).name == "bright"
    preferences = bright_and_dark()
    samples = [s for p in split_by_prompt(preferences, HEAD_FIT.held_out)[0] for s in (p.chosen, p.rejected)]
    assert PreferenceReward(folder).score(samples).mean().item() == pytest.approx(0.0, abs=1e-3)
    assert PreferenceReward(folder).score([]).shape == (0,)


def test_training_twice_gives_the_same_bytes(bright, tmp_path):
    folder, _ = bright
    train_picture_model(bright_and_dark(), BRIGHT, tmp_path / "again", encoder=EMBEDDED, origin={"judge": "me"})
    assert (tmp_path / "again" / HEAD).read_bytes() == (folder / HEAD).read_bytes()


def test_the_manifest_says_what_a_model_is(bright):
    folder, fitted = bright
    meta = PreferenceReward(folder).meta
    assert (meta["principle"], meta["encoder"], meta["labels"]) == (BRIGHT.model_dump(), EMBEDDED, {"judge": "me"})
    assert meta["held_out"]["mean"] == 1.0 and meta["fit"]["epochs"] == HEAD_FIT.epochs
    assert meta["scale"] == fitted.scale > 0


def test_a_damaged_or_absent_model_is_refused_in_one_line(bright, tmp_path):
    folder, _ = bright
    with pytest.raises(WeightsError, match="holds no preference model: manifest.json is missing; `raftdiff preference"):
        PreferenceReward(tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    data = bytearray((copy / HEAD).read_bytes())
    data[-1] ^= 1
    (copy / HEAD).write_bytes(data)
    with pytest.raises(WeightsError, match=f"{HEAD} is damaged"):
        PreferenceReward(copy)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    preferences = [
        Preference(chosen=p.chosen, rejected=p.rejected, margin=math.inf) for p in bright_and_dark(prompts=3)
    ]
    with pytest.raises(TrainingError, match="not finite; lower --learning-rate"):
        train_picture_model(preferences, BRIGHT, tmp_path / "m", encoder=EMBEDDED)
    assert not (tmp_path / "m").exists()
    fit = Fit(epochs=1, learning_rate=1e-3, batch_size=8, margins=False)
    assert train_picture_model(preferences, BRIGHT, tmp_path / "m", encoder=EMBEDDED, fit=fit).pairs > 0


def test_differences_are_of_the_chosen_less_the_rejected():
    def score(samples):
        return torch.tensor([float(s.id[-2:]) for s in samples])

    pair = Preference(chosen=picture("p", 7, 100), rejected=picture("p", 3, 100))
    assert differences(score, [pair]).tolist() == [4.0]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("language") / "model"
    tiny_language_model().transformer.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def good_and_bad() -> list[Preference]:
    def said(i: int, k: int, word: str) -> Sample:
        text = " ".join([WORDS[(i + k) % 3], word, "."])
        return Sample(id=f"0001-{i}-{k}-{word}", prompt=Prompt(text=f"c {i}"), seed=0, text=text)

    return [Preference(chosen=said(i, k, "good"), rejected=said(i, k, "bad")) for i in range(6) for k in range(4)]


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_language_model_learns_what_it_is_shown_and_loads_as_either_reward(language_model, tmp_path, lora_rank):
    fit = Fit(epochs=8, learning_rate=0.02, batch_size=8)
    folder = tmp_path / "good"
    fitted = train_text_model(
        good_and_bad(), GOOD, folder, model=str(language_model), lora_rank=lora_rank, fit=fit, origin={}
    )
    assert fitted.accuracy.mean == 1.0
    chosen, rejected = ([getattr(p, side) for p in good_and_bad()] for side in ("chosen", "rejected"))
    reward, plain = PreferenceReward(folder), RewardModel(folder)
    assert (reward.score(chosen) > reward.score(rejected)).all() and reward.modality == "text"
    assert torch.allclose(reward.score(chosen), fitted.scale * (plain.score(chosen) - fitted.mean), atol=1e-4)
    assert not list(folder.glob("*.bin"))  # safetensors alone
