"""Prompts that a language model writes for an image model: which texts are taken, and runs on them."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_processes import in_two_processes, sample_bytes
from tiny_models import stable_diffusion
from tiny_runs import Told, exported, pipeline_run, tiny_config
from tiny_text import tiny_language_model

from raftdiff.build import build
from raftdiff.config import ModelConfig, RunConfig, WriterConfig, load_config
from raftdiff.errors import ConfigError, DataError, WeightsError
from raftdiff.interrupts import Interrupted
from raftdiff.pipelines.llm import LanguageModel, LanguagePolicy, load_language_model
from raftdiff.plan import lines, plan, probed
from raftdiff.prompts import ATTEMPTS, load_prompts, round_prompts, sample_seed, save_prompts, written_prompts
from raftdiff.rounds import run_rounds
from raftdiff.shapes.captions import parse
from raftdiff.store import SampleStore
from raftdiff.types import Prompt
from raftdiff.writer import PromptWriter

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "written-prompts.yaml"
OPENINGS = "shapes-text:caption/32/41"
HELD_OUT = ["a red circle", "two purple triangles"]
A, B, C = (Prompt(text=text, metadata={"task": "t"}) for text in "ABC")


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    """No test here cuts the power, so nothing has to wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def told(texts: dict[str, list[str]]) -> Any:
    """A writer of these texts, those of the first attempt first."""
    places = {sample_seed(5, 3, p.id, k): (p.text, k) for p in (A, B, C) for k in range(ATTEMPTS)}

    def write(openings: Sequence[Prompt], seeds: Sequence[int]) -> list[str]:
        assert [places[seed][0] for seed in seeds] == [opening.text for opening in openings]
        return [texts[text][k] for text, k in map(places.__getitem__, seeds)]

    return write


def test_what_is_empty_repeated_held_out_or_unreadable_is_written_again_with_the_next_seed():
    texts = {"A": [" a cat\n"], "B": ["  ", "a cat", "a dog", "a bird"], "C": ["a\0", "a fox"]}
    found = written_prompts(told(texts), [A, B, C], kept_out={"a dog"}, round=3, seed=5)
    assert [p.text for p in found] == ["a cat", "a bird", "a fox"]
    assert [p.metadata for p in found] == [{"task": "t", "opening": text} for text in "ABC"]


def test_an_opening_that_gets_no_prompt_is_left_out_with_a_warning_and_none_at_all_is_an_error(caplog):
    texts = {"A": ["a cat"], "B": ["a cat"] * ATTEMPTS, "C": ["", *["a cat"] * ATTEMPTS]}
    assert [p.text for p in written_prompts(told(texts), [A, B, C], round=3, seed=5)] == ["a cat"]
    assert "round 3: 2 of 3 openings have no prompt after 8 texts each (15 texts repeated, 1 texts empty" in caplog.text
    with pytest.raises(DataError, match=r"round 3: 1 of 1 openings .* \(8 texts held out\); give prompts.writer other"):
        written_prompts(told(texts), [B], kept_out={"a cat"}, round=3, seed=5)


def test_written_prompts_are_read_back_as_they_are(tmp_path):
    prompts = [Prompt(text=text, metadata={"opening": "é"}) for text in ("ça", "two\nlines", "a\u2028b", '"x", y')]
    save_prompts(tmp_path / "prompts" / "round-0001.jsonl", prompts)
    assert load_prompts(tmp_path / "prompts" / "round-0001.jsonl") == prompts


# -- the language model -----------------------------------------------------------------------------------------------


def writer(**settings: Any) -> PromptWriter:
    return PromptWriter(
        WriterConfig(**{"max_new_tokens": 24} | settings), held_out=[Prompt(text=text) for text in HELD_OUT], seed=7
    )


@pytest.fixture(scope="module")
def openings() -> list[Prompt]:
    return load_prompts(OPENINGS)


@pytest.fixture(scope="module")
def first(openings) -> list[Prompt]:
    return writer()(openings, round=1)


def embedded() -> LanguagePolicy:
    return LanguagePolicy(load_language_model(ModelConfig(modality="text")), max_new_tokens=24)


def by_hand(policy: LanguagePolicy, openings: Sequence[Prompt]) -> dict[str, str]:
    """Opening to the first text from it, of those that can be taken at once."""
    samples = policy.sample(openings, [sample_seed(7, 1, opening.id, 0) for opening in openings])
    taken: dict[str, str] = {}
    for sample in samples:
        text = str(sample.text).strip()
        if text and text not in (*HELD_OUT, *taken.values()):
            taken[sample.prompt.text] = text
    return taken


def test_a_prompt_is_what_the_model_writes_after_its_opening_and_nothing_of_the_opening(openings, first):
    expected = by_hand(embedded(), openings)
    assert len(expected) > 0.8 * len(openings)
    assert expected.items() <= {p.metadata["opening"]: p.text for p in first}.items()
    assert len(first) == len({p.text for p in first}) == len(openings)
    assert sum(parse_or_none(p.text) is not None for p in first) >= 0.8 * len(openings)


def parse_or_none(text: str) -> Any:
    try:
        return parse(text)
    except ValueError:
        return None


def test_the_prompts_of_a_round_are_a_function_of_seed_and_round_in_any_batch(openings, first):
    other = writer(batch_size=3)
    assert other(openings, round=1) == first
    later = other(openings, round=2)
    assert {p.text for p in later} != {p.text for p in first} and other(openings, round=1) == first


def test_a_held_out_text_is_never_written(openings):
    seen = {p.text for round in (1, 2, 3) for p in writer()(openings, round=round)}
    held_out = sorted(seen)[::4]
    strict = PromptWriter(WriterConfig(max_new_tokens=24), held_out=[Prompt(text=t) for t in held_out], seed=7)
    again = {p.text for round in (1, 2, 3) for p in strict(openings, round=round)}
    assert again.isdisjoint(held_out) and len(again) > len(held_out)


def test_the_lora_of_a_finished_run_writes(tmp_path, openings, first):
    policy = embedded()
    for parameter in policy.parameters():
        parameter.data += 0.02
    policy.export(tmp_path / "lora")
    found = writer(lora=str(tmp_path / "lora"))
    found.check(openings)
    written = {p.metadata["opening"]: p.text for p in found(openings, round=1)}
    assert by_hand(policy, openings).items() <= written.items()
    assert list(written.values()) != [p.text for p in first]


# -- runs -------------------------------------------------------------------------------------------------------------


def written_config(output: Path, **settings: Any) -> RunConfig:
    """A tiny run whose prompts are written by the embedded language model, four a round."""
    prompts = {"source": OPENINGS, "per_round": 4, "writer": {"max_new_tokens": 24}}
    plain = {"prompts": prompts, "evaluation": {"prompts": HELD_OUT}}
    return tiny_config(output, **plain | settings)


def texts_of(file: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run_rounds(pipeline_run(written_config(tmp_path_factory.mktemp("whole"))))


def test_a_run_samples_the_prompts_that_were_written_and_shows_them(whole):
    store, openings = SampleStore(whole.folder), load_prompts(OPENINGS)
    for round in (1, 2):
        texts = texts_of(whole.folder / "prompts" / f"round-{round:04d}.jsonl")
        samples = store.read_samples(round)
        dealt_out = round_prompts(openings, round=round - 1, per_round=4, seed=0)
        assert [s.prompt.text for s in samples] == [text for text in texts for _ in range(2)]
        assert [s.prompt.metadata["opening"] for s in samples[::2]] == [p.text for p in dealt_out]
        assert not set(texts) & set(HELD_OUT)
        costs = [(cost.stage, cost.passes > 0) for cost in whole.reports[round].ledger]
        assert costs[:2] == [("write", False), ("sample", True)]
    shown = whole.report_path.read_text(encoding="utf-8")
    assert any(text in shown for text in texts)
    judged = SampleStore(whole.folder / "evaluation" / "guidance-1").read_samples(2)
    assert {s.prompt.text for s in judged} == set(HELD_OUT)


class Refusing:
    """A writer that must not be asked for some rounds."""

    def __init__(self, writer: Any, rounds: Sequence[int]) -> None:
        self.writer, self.rounds = writer, rounds

    def __call__(self, openings: Sequence[Prompt], *, round: int) -> list[Prompt]:
        assert round not in self.rounds, round
        return self.writer(openings, round=round)


def test_a_run_stopped_after_writing_reads_what_was_written_and_ends_with_the_same_bytes(tmp_path, whole):
    def stop(round: int, stage: str) -> None:
        if (round, stage) == (2, "sample"):
            os.kill(os.getpid(), signal.SIGTERM)

    config = written_config(tmp_path)
    with pytest.raises(Interrupted):
        run_rounds(pipeline_run(config, display=Told(stop)))
    assert SampleStore(config.folder).rounds() == [1]
    before = (config.folder / "prompts" / "round-0002.jsonl").read_bytes()
    run = pipeline_run(config)
    resumed = run_rounds(replace(run, writer=Refusing(run.writer, rounds=[1, 2])), resume=True)
    assert (config.folder / "prompts" / "round-0002.jsonl").read_bytes() == before
    assert sample_bytes(resumed.folder) == sample_bytes(whole.folder)
    assert exported(resumed.folder) == exported(whole.folder)


def test_one_of_two_processes_writes_and_both_read(tmp_path, whole):
    config = written_config(tmp_path, rounds=1)
    asked = tmp_path / "asked"

    def work() -> None:
        run = pipeline_run(config)

        def counted(openings: Sequence[Prompt], *, round: int) -> list[Prompt]:
            with asked.open("a") as file:
                file.write(f"{round}\n")
            return run.writer(openings, round=round)

        run_rounds(replace(run, writer=counted))

    in_two_processes(work)
    assert asked.read_text() == "1\n"
    name = Path("prompts") / "round-0001.jsonl"
    assert (config.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    one, two = (SampleStore(folder).read_samples(1) for folder in (whole.folder, config.folder))
    assert [(s.id, s.prompt) for s in two] == [(s.id, s.prompt) for s in one]


def test_rest_writes_once_for_each_grow(tmp_path):
    options = {"thresholds": [0.1, 0.5], "gate": False}
    result = run_rounds(
        pipeline_run(written_config(tmp_path, rounds=4, algorithm={"name": "rest", "options": options}))
    )
    assert sorted(p.name for p in (result.folder / "prompts").iterdir()) == ["round-0001.jsonl", "round-0003.jsonl"]
    assert [report.phase.grown for report in result.reports[1:]] == [1, 1, 3, 3]


def test_the_plan_counts_what_is_written_and_the_probe_measures_it(tmp_path):
    config = written_config(tmp_path)
    _, first, second = ({w.stage: w for w in stages} for stages in plan(config, probing=False).rounds)
    assert first["write"] == second["write"] and (first["write"].images, first["write"].passes) == (4, 0)
    found = probed(pipeline_run(config), config)
    assert found.probe is not None and found.probe.seconds_each["write"] > 0
    assert any(line.startswith("write: prompts by a language model") for line in lines(found))
    assert not config.folder.exists()


@pytest.fixture
def tiny_text(tmp_path) -> Path:
    tiny_language_model().save_pretrained(tmp_path / "text")
    return tmp_path / "text"


def refused(tmp_path: Path, kind: type[Exception], message: str, **settings: Any) -> None:
    with pytest.raises(kind, match=re.escape(message)) as found:
        build(written_config(tmp_path, **settings), pipeline=None)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluation": {"prompts": None}}, "prompts.writer: every round has other prompts; set evaluation.prompts"),
        ({"model": {"modality": "text"}}, "prompts.writer: not for model.modality: text; leave it out"),
        ({"prompts": {"writer": {"temperature": 0}}}, "temperature"),
    ],
)
def test_settings_that_do_not_fit_a_writer_are_refused(tmp_path, settings, message):
    plain = {"prompts": {"writer": {}}, "evaluation": {"prompts": HELD_OUT}, "rewards": [{"name": "jpeg"}]}
    with pytest.raises(ValueError, match=re.escape(message)):
        RunConfig.model_validate(plain | settings)


def test_what_cannot_write_is_refused_before_anything_is_loaded(tmp_path, tiny_text):
    def writing(**writer: Any) -> dict[str, Any]:
        return {"rewards": [{"name": "jpeg"}], "prompts": {"source": OPENINGS, "writer": writer}}

    image_model, image_lora = tmp_path / "image", tmp_path / "image-lora"
    stable_diffusion().save_pretrained(image_model)
    where = "prompts.writer: "
    refused(tmp_path, WeightsError, f"{where}the language model 'nowhere' cannot be loaded", **writing(path="nowhere"))
    refused(tmp_path, WeightsError, f"{where}the language model", **writing(path=str(image_model)))
    refused(tmp_path, WeightsError, f"{where}the language model", **writing(path=str(image_model / "text_encoder")))
    too_long = "more it does not fit into the 48 of this model; lower max_new_tokens or shorten the prompt"
    refused(tmp_path, ConfigError, too_long, **writing(path=str(tiny_text), max_new_tokens=48))
    refused(tmp_path, WeightsError, f"{where}{tmp_path}/no holds no LoRA", **writing(lora=f"{tmp_path}/no"))
    pipeline_run(tiny_config(tmp_path)).policy.export(image_lora)
    refused(tmp_path, WeightsError, f"{where}{image_lora} holds no LoRA", **writing(lora=str(image_lora)))
    LanguagePolicy(tiny_language_model()).export(tmp_path / "other")
    other = "prompts.writer: the adapter does not fit this model"
    refused(tmp_path, WeightsError, other, **writing(lora=str(tmp_path / "other")))
    data = {"data": {"path": "x"}, "algorithm": {"name": "sft"}}
    refused(tmp_path, ConfigError, "algorithm sft draws no samples: leave out prompts.writer", **writing(), **data)


def test_the_check_loads_no_weights(tiny_text, openings):
    (tiny_text / "model.safetensors").unlink()
    found = writer(path=str(tiny_text), max_new_tokens=8)
    found.check(openings)
    with pytest.raises(WeightsError, match=r"prompts\.writer: the language model .* cannot be loaded"):
        found(openings, round=1)


def test_any_language_model_writes(tiny_text, openings):
    assert isinstance(tiny_language_model(), LanguageModel)
    found = writer(path=str(tiny_text), max_new_tokens=8, temperature=1.5)(openings, round=1)
    assert 20 <= len({p.text for p in found}) == len(found)


def test_the_example_aligns_on_written_prompts_and_is_judged_on_others(tmp_path):
    plain = load_config(EXAMPLE).model_dump(mode="json") | {"output": str(tmp_path), "rounds": 1, "tracker": "none"}
    plain["prompts"]["per_round"] = 2
    plain["sampling"] |= {"samples_per_prompt": 2, "num_inference_steps": 2}
    plain["training"]["steps"] = 1
    plain["evaluation"] |= {"prompts": "shapes:all/2/42", "seeds_per_prompt": 1}
    result = run_rounds(build(RunConfig.model_validate(plain)))
    assert result.reports[1].requested == 4 and "shapes-oracle" in result.aligned[0].metrics
    assert all(parse(text) for text in texts_of(result.folder / "prompts" / "round-0001.jsonl"))


def test_all_openings_are_taken_where_the_settings_do_not_say_how_many(tmp_path):
    config = written_config(tmp_path, rounds=1, prompts={"source": OPENINGS, "writer": {"max_new_tokens": 24}})
    assert run_rounds(pipeline_run(config)).reports[1].requested == 32 * 2
