"""Votes: tokens, durability, the leaderboard, and the way from votes to a trained LoRA."""

from __future__ import annotations

import io
import math
import os
import select
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny_app import save_model
from tiny_runs import ADAPTER_FILE

from raftdiff.app.leaderboard import ELO, agreements, fit, shown_names, standings
from raftdiff.app.votes import CHOICES, KEPT_OPEN, Side, Vote, VoteRefused, Votes
from raftdiff.build import build
from raftdiff.config import load_config
from raftdiff.data import load_preferences
from raftdiff.errors import DataError, StorageError
from raftdiff.rounds import run_rounds


def picture(color: tuple[int, int, int]) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(data, "PNG")
    return data.getvalue()


RED, BLUE = picture((255, 0, 0)), picture((0, 0, 255))


def issue(votes: Votes, prompt: str = "a red circle", seed: int = 0):
    left = Side(model="base@00", scores={"clip": 1.0}, png=RED)
    return votes.issue(prompt, seed, left, Side(model="demo@01", scores={"clip": 2.0}, png=BLUE))


def vote(left: str, right: str, choice: str, left_score: float = 0.0, right_score: float = 0.0) -> Vote:
    scores = {"left_scores": {"clip": left_score}, "right_scores": {"clip": right_score}}
    return Vote(prompt="p", left=left, right=right, choice=choice, **scores)  # type: ignore[arg-type]


@pytest.fixture
def votes(tmp_path) -> Votes:
    return Votes(tmp_path / "votes.sqlite")


# ------------------------------------------------------------------------------------------------ tokens


def test_a_token_takes_one_vote_and_the_same_vote_again_changes_nothing(votes):
    pair = issue(votes)
    assert votes.record(pair.token, "right") == votes.record(pair.token, "right")
    with pytest.raises(VoteRefused, match="has a vote already"):
        votes.record(pair.token, "left")
    [counted] = votes.all()
    assert (counted.choice, counted.left, counted.right) == ("right", "base@00", "demo@01")
    assert counted.left_scores == {"clip": 1.0} and votes.tokens() == {pair.token}


@pytest.mark.parametrize("token", ["", "a" * 24, "' OR 1=1 --", "../votes.sqlite"])
def test_a_token_that_was_not_issued_is_refused(votes, token):
    issue(votes)
    with pytest.raises(VoteRefused, match="not issued here"):
        votes.record(token, "left")
    assert votes.all() == []


def test_a_vote_is_one_of_four(votes):
    pair = issue(votes)
    with pytest.raises(VoteRefused, match="left, right, tie, bad"):
        votes.record(pair.token, "both")
    for choice in CHOICES:
        votes.record(issue(votes).token, choice)
    assert [v.choice for v in votes.all()] == list(CHOICES)


def test_pairs_that_nobody_voted_on_do_not_fill_the_disk(votes, monkeypatch):
    monkeypatch.setattr("raftdiff.app.votes.KEPT_OPEN", 3)
    assert KEPT_OPEN > 3
    voted, *pairs = [issue(votes, seed=seed) for seed in range(2)]
    votes.record(voted.token, "tie")
    pairs += [issue(votes, seed=seed) for seed in range(2, 6)]
    with pytest.raises(VoteRefused, match="too old"):
        votes.record(pairs[0].token, "left")
    for pair in pairs[-3:]:
        votes.record(pair.token, "left")
    assert len(votes.all()) == 4


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "votes.sqlite").write_text("these are no votes, " * 100)
    with pytest.raises(StorageError, match="votes.sqlite: the votes cannot be kept there"):
        Votes(tmp_path / "votes.sqlite")


# ------------------------------------------------------------------------------------------------ durability


def voter(path: Path, acknowledged: int) -> None:
    """Vote for ever; write each token to the pipe once its vote is acknowledged."""
    votes = Votes(path)
    while True:
        pair = issue(votes, seed=os.getpid())
        votes.record(pair.token, "left")
        os.write(acknowledged, f"{pair.token}\n".encode())


def test_no_acknowledged_vote_of_eight_voters_is_lost_when_they_are_killed(tmp_path):
    path = tmp_path / "votes.sqlite"
    Votes(path)
    reading, writing = os.pipe()
    children: list[int] = []

    def begin() -> None:
        if (pid := os.fork()) == 0:
            try:
                voter(path, writing)
            finally:
                os._exit(1)
        children.append(pid)

    told = b""
    try:
        for _ in range(8):
            begin()
        for killed in range(12):  # each after some more votes, by whoever is at it then
            wanted = told.count(b"\n") + 8
            while told.count(b"\n") < wanted:
                assert select.select([reading], [], [], 30)[0], "no voter gets on"
                told += os.read(reading, 65536)
            os.kill(children[killed], signal.SIGKILL)
            begin()
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            os.waitpid(pid, 0)
        os.close(writing)
    while more := os.read(reading, 65536):
        told += more
    os.close(reading)
    acknowledged = told.decode().split()
    votes = Votes(path)
    assert len(acknowledged) >= 96 and len(set(acknowledged)) == len(acknowledged)
    assert set(acknowledged) <= votes.tokens()
    # A voter that was killed between its commit and its word has one vote more than it said, and no more than that.
    assert len(votes.all()) <= len(acknowledged) + len(children)


# ------------------------------------------------------------------------------------------------ leaderboard


def test_strengths_are_the_log_odds_of_two_models():
    strength, deviation = fit(np.array([[0.0, 3000.0], [1000.0, 0.0]]), reference=1)
    assert strength[1] == deviation[1] == 0
    assert strength[0] == pytest.approx(math.log(3), abs=1e-3)  # the prior moves it by log(3) / 9 / 750
    assert deviation[0] == pytest.approx((4000 * 0.75 * 0.25) ** -0.5, rel=1e-3)


def test_strengths_add_up_along_a_chain_of_models():
    wins = np.zeros((3, 3))
    wins[0, 1], wins[1, 0], wins[1, 2], wins[2, 1] = 3000, 1000, 2000, 1000
    strength, _ = fit(wins, reference=2)
    assert strength == pytest.approx([math.log(6), math.log(2), 0], abs=5e-3)


def test_ties_are_half_a_win_for_each():
    votes = [vote("a", "b", "tie"), vote("b", "a", "bad")] * 10 + [vote("a", "b", "left")] * 10
    by_name = {s.model: s for s in standings(votes, "b")}
    # 20 wins of 30, with a prior of variance 9: s/9 + 30 sigmoid(s) - 20 = 0
    share = 1 / (1 + math.exp(-by_name["a"].points / ELO))
    assert by_name["a"].points / ELO / 9 + 30 * share - 20 == pytest.approx(0, abs=1e-6)
    assert (by_name["a"].wins, by_name["a"].losses, by_name["a"].ties, by_name["a"].votes) == (10, 0, 20, 30)
    assert (by_name["b"].points, by_name["b"].low, by_name["b"].high, by_name["b"].losses) == (0, 0, 0, 10)


def test_who_won_every_vote_has_a_finite_strength_and_a_wide_interval():
    [first, second] = standings([vote("a", "b", "left")] * 3, "b")
    assert first.model == "a" and second.model == "b"
    assert 0 < first.points < 1000 and first.low < 0 < first.high
    assert standings([]) == []


def test_agreement_counts_the_votes_with_a_winner_and_different_scores():
    votes = [
        vote("a", "b", "left", 2, 1),
        vote("a", "b", "right", 2, 1),
        vote("b", "a", "right", 1, 2),
        vote("a", "b", "tie", 2, 1),
        vote("a", "b", "left", 1, 1),
    ]
    [agreement] = agreements(votes)
    assert (agreement.reward, agreement.agreed, agreement.votes) == ("clip", 2, 3)
    assert agreement.low == pytest.approx(0.2077, abs=1e-3) and agreement.high == pytest.approx(0.9385, abs=1e-3)
    assert agreements([vote("a", "b", "bad", 1, 2)]) == []


def test_names_are_short_where_that_is_clear():
    assert shown_names(["base@1", "demo@2", "demo@3"]) == {"base@1": "base", "demo@2": "demo@2", "demo@3": "demo@3"}


# ------------------------------------------------------------------------------------------------ from votes to a LoRA


def test_the_export_has_the_columns_of_pick_a_pic(votes, tmp_path):
    for choice in CHOICES:
        votes.record(issue(votes, prompt=choice).token, choice)
    issue(votes)  # without a vote
    assert votes.export(tmp_path / "preferences.parquet") == 2
    rows = {row["caption"]: row for row in pq.read_table(tmp_path / "preferences.parquet").to_pylist()}
    assert {name: row["label_0"] for name, row in rows.items()} == {"left": 1, "right": 0, "tie": 0.5, "bad": 0.5}
    assert rows["left"]["jpg_0"] == RED and rows["left"]["jpg_1"] == BLUE and rows["left"]["model_1"] == "demo@01"
    read = {
        caption: (a, b) for caption, a, b in load_preferences(tmp_path / "preferences.parquet", height=16, width=16)
    }
    assert read.keys() == {"left", "right"}
    assert read["left"][0][0].float().mean() == 255 and read["right"][0][2].float().mean() == 255


def test_an_export_without_a_winner_is_refused(votes, tmp_path):
    votes.record(issue(votes).token, "tie")
    with pytest.raises(DataError, match="no vote has a winner"):
        votes.export(tmp_path / "preferences.parquet")
    assert not (tmp_path / "preferences.parquet").exists()


def test_votes_train_a_lora(votes, tmp_path):
    for i in range(4):
        votes.record(issue(votes, prompt=f"a red circle, {i}").token, "right" if i else "tie")
    votes.export(tmp_path / "preferences.parquet")
    config = {
        "name": "from-votes",
        "output": str(tmp_path / "runs"),
        "rounds": 1,
        "model": {"path": str(save_model(tmp_path / "model"))},
        "adapter": {"rank": 2},
        "algorithm": {"name": "dpo", "options": {"source": "offline"}},
        "data": {"path": str(tmp_path / "preferences.parquet")},
        "prompts": {"source": ["a red circle", "a blue square"]},
        "rewards": [{"name": "jpeg"}],
        "sampling": {"samples_per_prompt": 2, "num_inference_steps": 2, "guidance_scale": 1.0},
        "training": {"steps": 2, "batch_size": 2},
        "evaluation": {"seeds_per_prompt": 1},
        "tracker": "none",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    result = run_rounds(build(load_config(tmp_path / "run.yaml")))  # as `raftdiff train run.yaml` does
    assert result.lora_path == tmp_path / "runs" / "from-votes" / "lora"
    weights = load_file(result.lora_path / ADAPTER_FILE)
    assert any(name.endswith("lora_B.weight") and tensor.any() for name, tensor in weights.items())
