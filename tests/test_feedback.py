"""AI feedback on a run's samples, from labels to weights, with simulated feedback of the embedded world."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from test_cli import call, refused
from test_judges import completion as answered
from test_judges import serving

from raftdiff.config import ModelConfig, RunConfig, dump_config, parse_config
from raftdiff.errors import ConfigError, DataError, ScoringError
from raftdiff.feedback import Choice, Feedback, label_run, train_models
from raftdiff.principles import Principle, load_principles
from raftdiff.reward_models.judge import Comparison, Judge
from raftdiff.shapes.captions import corrupt, random_caption
from raftdiff.shapes.scenes import random_scene, render
from raftdiff.store import SampleStore
from raftdiff.types import Prompt, Sample

COLOR = load_principles(["shapes/color"])[0]


def careless(prompts: int, k: int) -> list[Sample]:
    """Pictures of captions of which a part was misread, k for each prompt."""
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(prompts):
        caption = random_caption(rng, "single")
        prompt = Prompt(text=str(caption))
        for j in range(k):
            image = render(random_scene(corrupt(caption, 0.4, rng), rng)).transpose(2, 0, 1).copy()
            id = f"0001-{prompt.id}-{j:02d}"
            samples.append(Sample(id=id, prompt=prompt, seed=j, image=torch.from_numpy(image)))
    return samples


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with 6 prompts of 4 samples, the last of them flawed."""
    return made_run(tmp_path / "run", careless(6, 4))


def made_run(folder: Path, samples: Sequence[Sample]) -> Path:
    flawed = Sample(id="0001-x-00", prompt=samples[0].prompt, seed=0, image=samples[0].image, flaw="black image")
    SampleStore(folder).write_samples(1, 0, [*samples, flawed])
    (folder / "config.yaml").write_text(dump_config(RunConfig()))
    return folder


class Scripted(Judge):
    """Prefers the sample with the larger seed, and keeps what it was asked; no answer for the ids in `mute`."""

    def __init__(self, mute: Sequence[str] = ()) -> None:
        self.asked: list[tuple[str, str]] = []
        self.mute = set(mute)

    def _prefer(self, pairs, principle):
        self.asked += [(a.id, b.id) for a, b in pairs]
        return [math.nan if {a.id, b.id} & self.mute else float(a.seed - b.seed) for a, b in pairs]

    def _grade(self, samples, principle):
        raise NotImplementedError


def label(run: Path, judge: Judge, principles: Sequence[Principle] = (COLOR,), **settings):
    return label_run(run, judge, principles, made_of=("scripted", {}), **settings)


def test_pairs_are_of_one_prompt_the_same_each_time_and_without_flawed_samples(run):
    feedback = Feedback(run)
    pairs = feedback.pairs(per_prompt=3)
    assert len(pairs) == 18 and len({frozenset((a.id, b.id)) for a, b in pairs}) == 18
    assert all(a.prompt == b.prompt and a.flaw is b.flaw is None for a, b in pairs)
    ids = [(a.id, b.id) for a, b in pairs]
    assert ids == [(a.id, b.id) for a, b in feedback.pairs(per_prompt=3)]
    assert set(ids) < {(a.id, b.id) for a, b in feedback.pairs(per_prompt=6)}
    assert set(ids) != {(a.id, b.id) for a, b in feedback.pairs(per_prompt=3, seed=1)}
    assert len(feedback.pairs(per_prompt=99)) == 6 * 6


def test_labels_say_who_is_preferred_and_by_how_much(run):
    (tally,) = label(run, Scripted(), per_prompt=2)
    assert (tally.pairs, tally.decided, tally.ties, tally.missing) == (12, 12, 0, 0)
    for preference in Feedback(run).preferences("color"):
        assert preference.margin == preference.chosen.seed - preference.rejected.seed > 0
        assert preference.chosen.latents is None
    rows = pq.read_table(run / "feedback/labels/color-00000.parquet").to_pylist()
    assert len(rows) == 12 and all(row["forward"] == row["backward"] for row in rows)


def test_what_is_labeled_is_not_asked_about_again_and_what_is_missing_is(run):
    victim = Feedback(run).pairs(per_prompt=2)[0][0].id
    first, again, more = Scripted(mute=[victim]), Scripted(), Scripted()
    (tally,) = label(run, first, per_prompt=2)
    assert tally.missing >= 1 and len(first.asked) == 24
    (mended,) = label(run, again, per_prompt=2)
    assert mended.missing == 0 and len(again.asked) == 2 * tally.missing
    assert {victim} <= {id for pair in again.asked for id in pair}
    label(run, more, per_prompt=3)
    assert len(more.asked) == 2 * 6  # the pairs that are new


def test_a_part_that_was_damaged_is_labeled_again(run):
    label(run, Scripted(), per_prompt=2)
    part = run / "feedback/labels/color-00000.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    again = Scripted()
    (tally,) = label(run, again, per_prompt=2)
    assert len(again.asked) == 24 and tally.decided == 12
    assert (run / "feedback/labels/color-00001.parquet").is_file()


def test_labels_of_another_judge_or_wording_need_another_name(run):
    label(run, Scripted())
    with pytest.raises(
        ConfigError, match="of another judge \\(judge: scripted, now oracle\\); give these another --name"
    ):
        label_run(run, Scripted(), [COLOR], made_of=("oracle", {}))
    other = COLOR.model_copy(update={"wording": "hue"})
    with pytest.raises(ConfigError, match="of another 'color'.*another --name"):
        label(run, Scripted(), [other])
    label(run, Scripted(), [other], name="second")
    label(run, Scripted(), load_principles(["shapes/shape"]))
    assert [p.name for p in Feedback(run).principles] == ["color", "shape"]


def test_a_judge_that_mostly_has_no_answer_stops_the_labeling_and_what_was_labeled_stays(run):
    mute = [sample.id for sample in SampleStore(run).read_samples(1) if sample.seed < 2]
    with pytest.raises(ScoringError, match="no valid answer for .* of 32 pairs \\(principle color\\)"):
        label(run, Scripted(mute=mute), per_prompt=6)
    assert Feedback(run).labels("color")


def test_labels_of_an_endpoint_keep_a_ledger_and_no_key(run, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with serving(lambda request: answered("A")) as (_, address):
        options = (f"base_url={address}", "model=m", f"cache={tmp_path / 'cache.sqlite'}", "price=[1, 1]")
        flags = [flag for option in options for flag in ("--option", option)]
        labeled = call("feedback", run, "--principles", "image/overall", "--judge", "endpoint", *flags)
    assert labeled.code == 0, labeled.err
    assert labeled.out.splitlines()[1].split() == ["overall", "24", "0", "24", "0"]  # always A: a tie in both orders
    (line,) = (run / "feedback/labels/ledger.jsonl").read_text().splitlines()
    assert json.loads(line)["requests"] == 48 and json.loads(line)["cost"] == pytest.approx(48 * 101 / 1e6)
    assert all(b"very-secret" not in path.read_bytes() for path in run.rglob("*") if path.is_file())


def test_ties_are_labels_but_not_preferences(run):
    class Undecided(Scripted):
        def compare(self, pairs, principle):
            return [Comparison(forward=1.0, backward=-1.0) for _ in pairs]

    (tally,) = label(run, Undecided(), per_prompt=1)
    assert tally.ties == 6 and Feedback(run).preferences("color") == []
    with pytest.raises(DataError, match="no pair is preferred under any principle"):
        train_models(run, Choice(model="shapes"))


def test_a_principle_for_texts_is_refused_for_pictures_before_anything_is_asked(run):
    judge = Scripted()
    with pytest.raises(ConfigError, match="the run's samples are of the modality image, and detail are not"):
        label(run, judge, load_principles(["text/detail"]))
    assert not judge.asked and not (run / "feedback").exists()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A run of 40 prompts of 6 samples."""
    return made_run(tmp_path_factory.mktemp("world") / "run", careless(40, 6))


def test_from_simulated_feedback_to_weights_by_the_command_line(world):
    names = ["color", "background", "aesthetic", "overall"]
    principles = [f"shapes/{name}" for name in names]
    labeled = call("feedback", world, "--principles", *principles, "--judge", "oracle", "--pairs-per-prompt", 8)
    assert labeled.code == 0, labeled.err
    about = json.loads((world / "feedback/labels/about.json").read_text())
    assert (about["judge"], about["options"], list(about["principles"])) == ("oracle", {}, names)

    trained = call("preference", "train", world, "--epochs", 20)
    assert trained.code == 0, trained.err
    accuracy = {row.split()[0]: float(row.split()[3].rstrip("%")) for row in trained.out.splitlines()[1:5]}
    assert accuracy["aesthetic"] > 75 and accuracy["overall"] > 55, trained.out

    weighed = call("preference", "weights", world)
    assert weighed.code == 0, weighed.err
    assert "all, by weight" in weighed.out and "overall, alone" in weighed.out
    found = yaml.safe_load((world / "preference/weights.yaml").read_text())
    assert found["weights"]["aesthetic"]["low"] > 0
    assert found["accuracy"]["mean"] > 0.55
    config = parse_config({"rewards": found["rewards"]}, where="weights.yaml")
    assert [reward.label for reward in config.rewards] == sorted(set(names) - {"overall"})


def test_the_models_score_pictures_as_rewards(world, tmp_path):
    label(world, Scripted(), name="by-seed")
    train_models(world, Choice(model="shapes", fit={"epochs": 1}), name="by-seed")
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for i, sample in enumerate(SampleStore(world).read_samples(1)[:8]):
        Image.fromarray(sample.image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": sample.prompt.text}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    scored = call(
        "score", folder, "--reward", "preference", "--option", f"preference.path={world / 'preference/color'}"
    )
    assert scored.code == 0 and "8/8" in scored.out, scored.err


def test_what_cannot_be_done_is_one_line(run, tmp_path):
    feedback = ("feedback", run, "--principles", "shapes", "--judge")
    assert "no principles 'shape'; did you mean 'shapes'?" in refused(*feedback[:3], "shape", "--judge", "oracle")
    assert "unknown judge 'orcale'; did you mean 'oracle'?" in refused(*feedback, "orcale")
    assert "has no option 'nois'; did you mean 'noise'?" in refused(*feedback, "oracle", "--option", "nois=0.1")
    assert "write NAME=VALUE" in refused(*feedback, "oracle", "--option", "noise")
    assert "--pairs-per-prompt is 0" in refused(*feedback, "oracle", "--pairs-per-prompt", 0)
    assert "is no run folder" in refused("feedback", tmp_path, *feedback[2:], "oracle")
    assert "holds no two samples of one prompt" in refused(*feedback, "oracle", "--rounds", 7)
    assert "holds no labels; `raftdiff feedback" in refused("preference", "train", run)
    call(*feedback, "oracle", "--option", "noise=0.1")
    assert "has no labels by 'colr'; did you mean 'color'?" in refused(
        "preference", "train", run, "--principles", "colr"
    )
    assert "has no preference models" in refused("preference", "weights", run)


def test_a_model_of_texts_needs_a_language_model(tmp_path):
    prompt = Prompt(text="Hello")
    samples = [Sample(id=f"0001-a-{k}", prompt=prompt, seed=k, text=f"{k}") for k in range(3)]
    SampleStore(tmp_path).write_samples(1, 0, samples)
    label(tmp_path, Scripted(), load_principles(["text/detail"]))
    with pytest.raises(ConfigError, match="begins at a language model: name it with --model"):
        train_models(tmp_path, Choice())


def test_the_default_clip_of_another_model_is_that_of_the_reward_clip(run):
    (run / "config.yaml").write_text(dump_config(RunConfig(model=ModelConfig(path="some/pipeline"))))
    call("feedback", run, "--principles", "shapes/color", "--judge", "oracle")
    assert "ViT-L-14-quickgelu with pretrained 'openai'" in refused("preference", "train", run, code=1)
