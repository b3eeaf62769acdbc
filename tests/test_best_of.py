"""Best-of-N: the candidates drawn, what they are ranked by, the pipeline that gives the best, and the command."""

from __future__ import annotations

import copy
import io
import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from PIL import Image
from rich.console import Console
from test_cli import call, refused
from tiny_runs import ThreeWeights, redness, tiny_pipeline

import raftdiff
from raftdiff.best_of_n import best, draw, kl_bound, rank, summary, table
from raftdiff.errors import ConfigError, ScoringError
from raftdiff.pipelines.best_of import BestOf
from raftdiff.reward_models.function import FunctionReward
from raftdiff.scoring import WeightedReward
from raftdiff.types import Prompt, Sample

PROMPTS = [Prompt(text="a red circle"), Prompt(text="a blue square")]


def weighted(function, name: str = "made", weight: float = 1.0) -> WeightedReward:
    return WeightedReward(reward=FunctionReward(function, name), weight=weight)


def in_order(*values: float | None) -> WeightedReward:
    """A reward that gives these values, in the order in which it sees the samples."""
    left = list(values)
    return weighted(lambda images, prompts: [left.pop(0) for _ in images])


def gray(level: int) -> Sample:
    return Sample(id=str(level), prompt=PROMPTS[0], seed=level, image=torch.full((3, 4, 4), level, dtype=torch.uint8))


def brightness(images, prompts) -> list[float]:
    return [float(image.getpixel((0, 0))[0]) for image in images]


# ------------------------------------------------------------------------------------------------ ranking


def test_one_reward_ranks_by_its_raw_value_whatever_its_weight():
    assert [s.reward for s in rank([gray(10), gray(30)], [weighted(brightness, weight=5.0)])] == [10.0, 30.0]
    assert [s.reward for s in rank([gray(10), gray(30)], [weighted(brightness, weight=-5.0)])] == [-10.0, -30.0]


def test_several_rewards_rank_by_the_mean_of_their_standardized_values():
    rewards = [weighted(brightness, "light"), weighted(lambda images, prompts: [7.0, 5.0], "other", 3.0)]
    scored = rank([gray(10), gray(30)], rewards)  # standardized: -1 and 1; 1 and -1
    assert [s.reward for s in scored] == pytest.approx([(-1 + 3) / 4, (1 - 3) / 4])
    assert [dict(s.parts) for s in scored] == [{"light": 10.0, "other": 7.0}, {"light": 30.0, "other": 5.0}]


def test_candidates_that_all_fail_are_an_error_that_says_so():
    with pytest.raises(ScoringError, match="not one of 2 candidates could be scored"):
        rank([gray(10), gray(30)], [in_order(None, None)])


# ------------------------------------------------------------------------------------------------ drawing


def test_each_group_has_the_next_n_seeds_and_gives_its_best():
    rewards = [in_order(0, 5, 1, 9, 2, 3, 4, 4, 3, 8, 7, 6)]
    groups = draw(ThreeWeights(), PROMPTS, rewards, n=3, seeds=2, first_seed=10)
    seeds = [[s.sample.seed for s in group.samples] for group in groups]
    assert seeds == [[10, 11, 12], [13, 14, 15]] * 2
    found = best(groups)
    assert [(one.scored.sample.prompt.text, one.scored.sample.seed) for one in found] == [
        ("a red circle", 11),
        ("a red circle", 13),
        ("a blue square", 10),  # the first of equals
        ("a blue square", 13),
    ]
    alone = ThreeWeights().sample([PROMPTS[0]], [11])[0]
    assert torch.equal(found[0].scored.sample.image, alone.image)
    assert found[0].record == {
        "scores": {"made": 5.0},
        "reward": 5.0,
        "candidates": 3,
        "scored": 3,
        "mean_reward": 2.0,
        "worst_reward": 0.0,
    }


def test_a_failed_score_is_missing_and_not_zero():
    groups = draw(ThreeWeights(), PROMPTS, [in_order(-4, None, -2, None, None, None)], n=3, seeds=1)
    (only,) = best(groups)  # nothing of the second prompt could be scored
    assert only.scored.sample.seed == 2
    assert only.record | {"scores": {}} == {
        "scores": {},
        "reward": -2.0,
        "candidates": 3,
        "scored": 2,
        "mean_reward": -3.0,
        "worst_reward": -4.0,
    }
    assert "6 candidates, 4 without a score, 1 of the 2 pictures without any, left out" in summary(groups)


def test_a_flawed_picture_is_never_the_best():
    policy = ThreeWeights(flawed=["a red circle"])
    groups = draw(policy, PROMPTS, [in_order(1, 2)], n=2, seeds=1)  # which sees those of the other prompt alone
    assert [one.scored.sample.prompt.text for one in best(groups)] == ["a blue square"]
    with pytest.raises(ScoringError, match="the first is flawed: black image"):
        draw(policy, PROMPTS[:1], [in_order()], n=2, seeds=1)


def test_the_table_sets_the_best_beside_all():
    found = best(draw(ThreeWeights(), PROMPTS, [in_order(1, 3, 5, 5)], n=2, seeds=1))
    console = Console(width=200, file=io.StringIO())
    console.print(table(found))
    assert console.file.getvalue().split("\n")[1].split() == ["made", "3.5", "4", "+0.5", "0", "to", "1"]


def test_the_bound_holds_and_is_reached_by_a_reward_without_ties():
    assert kl_bound(8) == pytest.approx(1.204442, abs=1e-6)
    for outcomes, slack in ((3, 0.5), (100_000, 1e-3)):  # uniform, each with a reward of its own
        mass = np.diff(np.linspace(0, 1, outcomes + 1) ** 8)  # the best of 8 is outcome i
        divergence = float((mass[mass > 0] * np.log(outcomes * mass[mass > 0])).sum())
        assert kl_bound(8) - slack < divergence < kl_bound(8)


# ------------------------------------------------------------------------------------------------ the pipeline


@pytest.fixture(scope="module")
def pipe():
    made = tiny_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


ARGUMENTS = {"num_inference_steps": 2, "guidance_scale": 1.0}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_the_output_is_the_best_of_n_of_the_pipelines_own(pipe):
    texts, generator = [p.text for p in PROMPTS], seeded()
    drawn = [pipe(texts, generator=generator, **ARGUMENTS).images for _ in range(4)]
    values = np.array([redness(images, texts) for images in drawn])
    output = raftdiff.best_of(pipe, redness, n=4)(texts, generator=seeded(), **ARGUMENTS)
    assert type(output) is StableDiffusionPipelineOutput
    assert output.rewards == values.max(0).tolist()
    assert len(set(values[:, 0])) > 1
    for i, k in enumerate(values.argmax(0)):
        assert np.array_equal(output.images[i], drawn[k][i])


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_every_output_type_is_the_same_choice(pipe, output_type):
    wrapped = raftdiff.best_of(pipe, redness, n=3)
    plain = wrapped("a red circle", generator=seeded(), **ARGUMENTS)
    (images, unsafe) = wrapped(
        "a red circle", generator=seeded(), output_type=output_type, return_dict=False, **ARGUMENTS
    )
    assert type(images) is {"pil": list, "np": np.ndarray, "pt": torch.Tensor}[output_type] and unsafe is None
    pixels = np.asarray(images[0].permute(1, 2, 0) if output_type == "pt" else images[0])
    expected = np.asarray(plain.images[0])
    assert np.array_equal(pixels if output_type == "pil" else (pixels * 255).round(), expected)


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_candidates_of_one_call_stay_with_their_prompt(pipe, batch_size, each):
    seen: list[str] = []

    def red_or_blue(images, prompts):
        seen.extend(prompts)
        return [red if "red" in prompt else -red for red, prompt in zip(redness(images, prompts), prompts, strict=True)]

    wrapped = raftdiff.best_of(pipe, red_or_blue, n=3, batch_size=batch_size)
    output = wrapped([p.text for p in PROMPTS], num_images_per_prompt=each, generator=seeded(), **ARGUMENTS)
    assert seen == ["a red circle"] * 3 * each + ["a blue square"] * 3 * each
    reds = redness(output.images, [])
    assert output.rewards == reds[:each] + [-red for red in reds[each:]]


class Grays:
    """A pipeline that makes gray pictures, one for each prompt, of the levels and safety verdicts it is given."""

    def __init__(self, *drawn: tuple[int, bool]):
        self.drawn = list(drawn)

    def __call__(self, prompt, generator=None):
        made = [self.drawn.pop(0) for _ in ([prompt] if isinstance(prompt, str) else prompt)]
        images = [Image.new("RGB", (4, 4), (level,) * 3) for level, _ in made]
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=[unsafe for _, unsafe in made])


def test_flawed_candidates_are_not_chosen_and_every_field_follows_the_choice():
    pipeline = Grays((200, True), (50, False), (0, False), (90, False))
    darkest = FunctionReward(lambda images, prompts: [-v for v in brightness(images, prompts)], "dark")
    output = BestOf(pipeline, darkest, n=4)("a red circle")
    assert (output.rewards, output.nsfw_content_detected) == ([-50.0], [False])
    assert output.images[0].getpixel((0, 0)) == (50, 50, 50)


def test_a_picture_without_a_reward_is_the_first_candidate_and_is_said_to_be(caplog):
    pipeline = Grays((200, True), (50, False), (190, True), (90, False))
    output = BestOf(pipeline, FunctionReward(brightness, "light"), n=2)(["a red circle", "a blue square"])
    assert math.isnan(output.rewards[0]) and output.rewards[1] == 90.0
    assert [image.getpixel((0, 0))[0] for image in output.images] == [200, 90]
    assert output.nsfw_content_detected == [True, False]
    assert "1 of 2 pictures have no reward" in caplog.text


def test_everything_else_is_the_pipelines():
    pipe = tiny_pipeline()
    wrapped = raftdiff.best_of(pipe, redness, n=2)
    assert wrapped.unet is pipe.unet and wrapped.to("cpu") is wrapped
    wrapped.scheduler = scheduler = DDIMScheduler()
    assert pipe.scheduler is scheduler
    wrapped.n = 5
    assert (wrapped.n, hasattr(pipe, "n")) == (5, False)
    assert copy.copy(wrapped).pipeline is pipe
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = wrapped.nothing_of_the_kind


def test_rewards_may_be_names_with_weights(pipe):
    by_size = raftdiff.best_of(pipe, {"jpeg": -1.0}, n=3)("a red circle", generator=seeded(), **ARGUMENTS)
    by_simplicity = raftdiff.best_of(pipe, "jpeg", n=3)("a red circle", generator=seeded(), **ARGUMENTS)
    assert by_size.rewards[0] > 0 > by_simplicity.rewards[0] >= -by_size.rewards[0]


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda pipe: raftdiff.best_of(pipe, redness, n=1), "the best of 1 is no choice; give 2 candidates or more"),
        (lambda pipe: raftdiff.best_of(pipe, redness, batch_size=0), "batch_size of best-of-n is 0; give 1 or more"),
        (lambda pipe: raftdiff.best_of(pipe, "clp"), "unknown reward 'clp'; did you mean 'clip'?"),
        (lambda pipe: raftdiff.best_of(pipe, {}), "no reward has a weight other than 0"),
        (lambda pipe: raftdiff.best_of(pipe, 3), "3 is neither a registered name, nor a callable, nor a Reward"),
        (lambda pipe: BestOf(pipe, "clip", 8), "'clip' is no Reward; raftdiff.best_of takes names"),
        (lambda pipe: raftdiff.best_of(pipe, redness)(), "give `prompt`, not its embeddings"),
        (lambda pipe: raftdiff.best_of(pipe, redness)("a", latents=torch.zeros(1)), "give a `generator` instead"),
        (lambda pipe: raftdiff.best_of(pipe, redness)("a", output_type="latent"), "output_type 'pil', 'np' or 'pt'"),
    ],
)
def test_what_cannot_be_done_is_one_line(pipe, make, message):
    with pytest.raises(ConfigError) as refusal:
        make(pipe)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_command_refuses_half_of_a_request(tmp_path):
    sample = ("sample", "--prompts", "a red circle", "--out", tmp_path / "images")
    assert "the best of 1 is no choice" in refused(*sample, "--best-of", 1, "--reward", "jpeg")
    assert "--best-of 8 needs a --reward" in refused(*sample, "--best-of", 8)
    assert "give --best-of N too" in refused(*sample, "--reward", "jpeg")
    assert "for a --reward that is given" in refused(*sample, "--option", "jpeg.quality=50")
    assert "did you mean 'jpeg'?" in refused(*sample, "--best-of", 8, "--reward", "jpg")
    assert not (tmp_path / "images").exists()


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_keeps_the_best_of_what_it_would_draw_anyway(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n", encoding="utf-8")
    sample = ("sample", "--model", tmp_path / "model", "--prompts", prompts, "--steps", 2, "--guidance", 1)
    assert call(*sample, "--seeds", 6, "--out", tmp_path / "all").code == 0
    result = call(*sample, "--seeds", 2, "--best-of", 3, "--reward", "jpeg", "--out", tmp_path / "best")
    assert result.code == 0, result.err
    assert "12 candidates; KL(best of 3 || model) <= log 3 - 2/3 = 0.432 nats" in result.out

    def rows(name: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / name / "metadata.jsonl").read_text().splitlines()]

    best_rows, all_rows = rows("best"), rows("all")
    assert [row["text"] for row in best_rows] == ["a red circle"] * 2 + ["a blue square"] * 2
    assert [row["seed"] // 3 for row in best_rows] == [0, 1, 0, 1]
    for row in best_rows:
        (same,) = [other for other in all_rows if (other["text"], other["seed"]) == (row["text"], row["seed"])]
        picture = (tmp_path / "best" / row["file_name"]).read_bytes()
        assert picture == (tmp_path / "all" / same["file_name"]).read_bytes()
        assert row["scores"] == {"jpeg": row["reward"]}
        assert row["worst_reward"] <= row["mean_reward"] <= row["reward"] and row["scored"] == 3
    assert call("score", tmp_path / "best", "--reward", "jpeg").code == 0
    lines = (tmp_path / "best" / "scores.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert [float(line.split(",")[2]) for line in lines] == pytest.approx([row["reward"] for row in best_rows])
