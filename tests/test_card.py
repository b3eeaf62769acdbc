"""The card beside a LoRA, as the hub and its readers take it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from tiny_runs import pipeline_run, tiny_config

from raftdiff.card import HERE, plain, provenance, public_settings, write_card
from raftdiff.config import RewardConfig, RunConfig
from raftdiff.evaluation import Verdict
from raftdiff.rounds import run_rounds
from raftdiff.types import Evaluation, Interval, Prompt, RoundReport, Sample

HOSTILE = "]($(x)) <script>alert(1)</script> | **b** `c` @all http://x.y\n---\n# head"


def report(round: int, mean: float, gain: Interval | None = None) -> RoundReport:
    evaluation = Evaluation(
        guidance_scale=1.0,
        metrics={"clip": Interval(mean=mean, low=mean - 1, high=mean + 1, count=4)},
        gains={"clip": gain} if gain else {},
        per_sample={"clip": (mean,)},
        failed=0,
    )
    return RoundReport(
        round=round, requested=0, scored=0, failed=0, skipped=0, selected=0, rewards={}, training={},
        evaluations=(evaluation,),
    )  # fmt: skip


REPORTS = [report(0, 20.0), report(1, 22.5, Interval(mean=2.5, low=1.5, high=3.5, count=4))]
VERDICT = Verdict(kind="healthy", message="The reward rises.", best=1)


def samples(texts: list[str], value: int, side: int = 16) -> list[Sample]:
    image = torch.full((3, side, side), value, dtype=torch.uint8)
    return [Sample(id="", prompt=Prompt(text=text), seed=0, image=image) for text in texts]


def card(folder: Path, config: RunConfig | None = None, *, texts: list[str] | None = None, **changes: Any) -> str:
    texts = texts or ["a red circle", "a blue square"]
    values: dict[str, Any] = {
        "config": config or RunConfig(name="my-lora", model={"path": "me/model"}),
        "modality": "image",
        "reports": REPORTS,
        "verdict": VERDICT,
        "before": samples(texts, 40),
        "after": samples(texts, 200),
        "load_line": f"pipe.load_lora_weights('{HERE}')",
    }
    write_card(folder, **values | changes)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_front_matter_is_what_the_hub_reads(tmp_path: Path):
    card(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("me/model", "diffusers", "text-to-image")
    assert data.tags == ["lora", "text-to-image", "raftdiff"]


@pytest.mark.parametrize("path", ["shapes", "./my-model", "/home/me/model", "me/model: x\nlicense: mit"])
def test_a_base_that_is_not_on_the_hub_is_not_claimed_to_be(path: str, tmp_path: Path):
    card(tmp_path, RunConfig(name="my-lora", model={"path": path}))
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model is None and data.license is None


def test_the_table_has_base_gain_and_interval(tmp_path: Path):
    lines = card(tmp_path).splitlines()
    assert "| clip | trained | 20.0 | 22.5 | +2.5 | 1.5 to 3.5 |" in lines
    assert "Without guidance:" in lines


def test_it_says_what_was_trained_on_and_what_not(tmp_path: Path):
    config = RunConfig(
        name="my-lora",
        rewards=[RewardConfig(name="clip", weight=0.5), RewardConfig(name="jpeg", weight=0, label="small")],
        evaluation={"rewards": [{"name": "aesthetic"}]},
    )
    text = card(tmp_path, config)
    assert "- **Trained on:** clip (weight 0.5)\n" in text
    assert "- **Measured, and not trained on:** small, aesthetic\n" in text
    assert "The reward rises\\." in text and "pipe.load_lora_weights('folder-or-repository')" in text


def test_the_picture_has_the_base_above_and_the_aligned_below(tmp_path: Path):
    card(tmp_path)
    picture = Image.open(tmp_path / "before-after.webp").convert("L")
    assert picture.width > picture.height * 0.9 and min(picture.size) >= 2 * 128
    below = picture.height * 3 // 4
    for x in (picture.width // 4, picture.width * 3 // 4):
        assert abs(picture.getpixel((x, picture.height // 4)) - 40) < 8 and abs(picture.getpixel((x, below)) - 200) < 8


def test_large_pictures_are_scaled_down(tmp_path: Path):
    texts = [f"prompt {i}" for i in range(12)]
    text = card(tmp_path, texts=texts, before=samples(texts, 0, 512), after=samples(texts, 9, 512))
    assert max(Image.open(tmp_path / "before-after.webp").size) == 2048
    assert text.count("\n1. prompt ") == 8


def test_texts_from_anywhere_show_as_they_are(tmp_path: Path):
    text = card(tmp_path, texts=[HOSTILE], verdict=Verdict(kind="healthy", message=HOSTILE, best=1))
    assert "<script>" not in text.split("## Settings")[0] and "\n# head" not in text
    assert (
        r"1. \]\(\$\(x\)\) \<script\>alert\(1\)\<\/script\> \| \*\*b\*\* \`c\` \@all http\:\/\/x\.y \-\-\- \# head"
        in text
    )


def test_plain_text_is_one_line_of_escaped_punctuation():
    assert plain("a_b\n  | c. ünï") == r"a\_b \| c\. ünï"


def test_settings_cannot_leave_their_block(tmp_path: Path):
    prompt = "```\n</details>\n````` # x"
    text = card(tmp_path, RunConfig(name="my-lora", prompts={"source": [prompt]}))
    block = text.split("``````yaml\n")[1].split("``````")[0]
    assert yaml.safe_load(block)["prompts"]["source"] == [prompt]


def test_settings_are_shown_without_secrets_and_without_the_place_of_the_run(tmp_path: Path):
    config = RunConfig(
        name="my-lora",
        output="/home/me/runs",
        rewards=[{"name": "judge", "options": {"api_key": "abc", "max_tokens": 5}}],
    )
    settings = public_settings(config)
    assert settings["rewards"][0]["options"] == {"api_key": "(removed)", "max_tokens": 5}
    for text in (card(tmp_path, config), json.dumps(provenance(config))):
        assert "abc" not in text and "/home/me" not in text


def test_a_lora_of_a_language_model_has_no_picture(tmp_path: Path):
    texts = [Sample(id="", prompt=Prompt(text="hello"), seed=0, text="hi")]
    card(tmp_path, modality="text", before=texts, after=texts)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert not (tmp_path / "before-after.webp").exists()


def test_the_header_names_base_rewards_algorithm_and_settings():
    config = RunConfig(model={"path": "me/model", "revision": "v1"}, rewards=[{"name": "clip", "weight": 2.0}])
    header = provenance(config)
    assert (header["base_model"], header["base_revision"], header["algorithm"]) == ("me/model", "v1", "raft")
    assert json.loads(header["rewards"]) == {"clip": 2.0}
    assert json.loads(header["config"])["rounds"] == config.rounds


def test_two_runs_in_other_places_write_the_same_card(tmp_path: Path):
    folders = [
        run_rounds(pipeline_run(tiny_config(tmp_path / place, rounds=1))).lora_path for place in ("here", "elsewhere")
    ]
    for name in ("README.md", "before-after.webp", "pytorch_lora_weights.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    text = (folders[0] / "README.md").read_text()
    assert "pipe.load_lora_weights('folder-or-repository')" in text and str(tmp_path) not in text
    assert "1. a red circle" in text and "| reward | trained |" in text
