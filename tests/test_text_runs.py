"""Runs of language models: each algorithm that can, from Python and the command line, stopped and gone on with."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file
from test_cli import call, refused
from test_processes import in_two_processes, sample_bytes
from tiny_runs import Told
from tiny_text import PROMPTS, WORDS, goodness, text_config, text_run, tiny_language_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from raftdiff import align
from raftdiff.card import plain
from raftdiff.compare import CompareConfig, compare, gain
from raftdiff.config import RunConfig
from raftdiff.data import load_completions, load_text_preferences
from raftdiff.errors import ConfigError, DataError
from raftdiff.evaluation import distinct_2, diversity, text_distance
from raftdiff.interrupts import Interrupted
from raftdiff.pipelines.llm import LanguagePolicy
from raftdiff.plan import plan, probed
from raftdiff.rounds import Result, run_rounds
from raftdiff.sharding import shard
from raftdiff.store import SampleStore
from raftdiff.types import Prompt, Sample

ADAPTER = "adapter_model.safetensors"
GOOD = 3 + WORDS.index("good")
COMPLETIONS = [{"prompt": prompt, "completion": "good good good"} for prompt in PROMPTS]
PREFERENCES = [{"prompt": prompt, "chosen": "good good", "rejected": "bad red blue"} for prompt in PROMPTS]


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    """No test here cuts the power, so nothing has to wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def finish(config: RunConfig, *, resume: bool = False, **parts: Any) -> Result:
    return run_rounds(text_run(config, **parts), resume=resume)


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def exported(folder: Path) -> bytes:
    return (folder / "lora" / ADAPTER).read_bytes()


# -- every algorithm ---------------------------------------------------------------------------------------------------


ALGORITHMS: dict[str, dict[str, Any]] = {
    "raft": {"algorithm": {"name": "raft"}},
    "raft-kl": {"algorithm": {"name": "raft", "options": {"kl_beta": 0.05}}},
    "rest": {
        "algorithm": {
            "name": "rest",
            "options": {"rule": "interpolation", "thresholds": [0.8, 0.9], "learning_rate_decay": 1.0},
        }
    },
    "rest-gold": {"algorithm": {"name": "rest", "options": {"thresholds": [0.5, 0.75], "loss_type": "gold"}}},
    "dpo": {"algorithm": {"name": "dpo", "options": {"beta": 0.1}}},
    "rwr": {"algorithm": {"name": "rwr", "options": {"beta": 0.1}}},
    "policy-gradient": {"algorithm": {"name": "policy-gradient", "options": {"kl_beta": 0.001}}},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_texts_get_better_by_each_algorithm(tmp_path, name: str):
    settings: dict[str, Any] = {
        "rounds": 4,
        "sampling": {"samples_per_prompt": 12, "batch_size": 48},
        "training": {"steps": 12, "batch_size": 16, "learning_rate": 0.05},
        "evaluation": {"every": 2, "seeds_per_prompt": 8},
    }
    result = finish(text_config(tmp_path, **settings, **ALGORITHMS[name]))
    assert result.aligned[0].gains["goodness"].mean > 0.1
    assert {"goodness", "diversity"} < result.aligned[0].metrics.keys()
    report = result.reports[1]
    assert report.requested == 48 == report.scored + report.failed + report.skipped
    if name == "raft-kl":
        assert result.reports[-1].rewards["log_ratio"] != 0
    if name == "policy-gradient":
        assert {"ratio", "ratio_change", "clipped", "kl"} <= report.training.keys()


def test_supervised_fine_tuning_learns_the_users_own_texts(tmp_path):
    data = lines(tmp_path / "own.jsonl", COMPLETIONS)
    settings = {"algorithm": {"name": "sft"}, "data": {"path": str(data)}, "training": {"steps": 40, "batch_size": 4}}
    result = finish(text_config(tmp_path, **settings))
    assert result.aligned[0].metrics["goodness"].mean > 0.8
    assert result.reports[2].training["error"] < 2 < result.reports[1].training["error"]


def test_offline_preferences_move_the_model_towards_what_is_chosen(tmp_path):
    table = pa.Table.from_pylist(PREFERENCES)
    pq.write_table(table, tmp_path / "pairs.parquet")
    algorithm = {"name": "dpo", "options": {"source": "offline", "beta": 0.1}}
    data = {"path": str(tmp_path / "pairs.parquet")}
    settings = {"algorithm": algorithm, "data": data, "training": {"steps": 10, "batch_size": 4, "learning_rate": 0.02}}
    result = finish(text_config(tmp_path, **settings))
    assert result.reports[2].training["accuracy"] == 1.0
    assert result.reports[2].training["chosen_reward"] > result.reports[2].training["rejected_reward"]


def test_own_texts_are_scored_selected_and_mixed_in_like_own_pictures(tmp_path):
    data = {"path": str(lines(tmp_path / "own.jsonl", COMPLETIONS)), "share": 0.5}
    rest = finish(text_config(tmp_path, name="rest", algorithm={"name": "rest"}, data=data))
    assert rest.reports[1].selected >= 4  # all of them are perfect
    mixed = finish(text_config(tmp_path, name="raft", data=data))
    assert mixed.reports[1].selected == 2 * len(SampleStore(mixed.folder).read_selection(1))


def test_what_a_language_model_cannot_do_is_said_before_it_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="algorithm nft needs denoised, which LanguagePolicy does not have"):
        text_run(text_config(tmp_path, algorithm={"name": "nft"}, training={"ema_decay": 0.5}))
    with pytest.raises(ConfigError, match="the prompt 'a a a .* does not fit"):
        text_run(text_config(tmp_path, evaluation={"prompts": ["a " * 60]}))


def test_a_teacher_must_have_the_same_tokens_and_then_samples(tmp_path):
    better = tiny_language_model()
    better.transformer.lm_head.weight.data[GOOD] *= 3
    better.save_pretrained(tmp_path / "better")
    algorithm = {"name": "raft", "teacher": str(tmp_path / "better")}
    settings = {"algorithm": algorithm, "training": {"steps": 8, "learning_rate": 0.05}}
    taught = finish(text_config(tmp_path, **settings))
    alone = finish(text_config(tmp_path, name="alone", training=settings["training"]))
    assert taught.reports[1].rewards["goodness"] > alone.reports[1].rewards["goodness"]
    better.tokenizer.add_tokens(["other"])
    better.save_pretrained(tmp_path / "better")
    with pytest.raises(ConfigError, match="its tokens are not those of model.path"):
        text_run(text_config(tmp_path, name="third", **settings))


def test_the_weights_of_a_language_model_are_not_split():
    with pytest.raises(ConfigError, match="--use_fsdp is for diffusion models"):
        shard(LanguagePolicy(tiny_language_model()), Accelerator())


# -- stopping, and several processes -----------------------------------------------------------------------------------


POLICY_GRADIENT = {
    "algorithm": {"name": "policy-gradient"},
    "training": {"steps": 4, "save_every_steps": 2, "learning_rate": 0.01},
}


@pytest.mark.parametrize("settings", [{"training": {"save_every_steps": 2}}, POLICY_GRADIENT], ids=["raft", "pg"])
@pytest.mark.parametrize("stage", ["sample", "train", "evaluate"])
def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(tmp_path, settings: dict, stage: str):
    whole = finish(text_config(tmp_path / "whole", **settings))

    def stop(round: int, name: str) -> None:
        if (round, name) == (2, stage):
            os.kill(os.getpid(), signal.SIGTERM)

    config = text_config(tmp_path / "stopped", **settings)
    with pytest.raises(Interrupted):
        finish(config, display=Told(stop))
    resumed = finish(config, resume=True)
    assert exported(resumed.folder) == exported(whole.folder)
    assert sample_bytes(resumed.folder) == sample_bytes(whole.folder)
    assert [r.training for r in resumed.reports] == [r.training for r in whole.reports]


def test_two_processes_write_the_same_texts(tmp_path):
    settings = {"sampling": {"batch_size": 4}, "training": {"learning_rate": 1e-3}}
    one, two = (text_config(tmp_path / name, **settings) for name in ("one", "two"))
    finish(one)
    in_two_processes(lambda: finish(two))
    first = [name for name in sample_bytes(one.folder) if "round-0001" in name or "round-0000" in name]
    first = [name for name in first if name.startswith("samples") or "round-0000" in name]
    assert len(first) == 6  # four batches of the round, two of the base's evaluation
    assert all(sample_bytes(two.folder)[name] == sample_bytes(one.folder)[name] for name in first)
    ones, twos = (load_file(config.folder / "lora" / ADAPTER) for config in (one, two))
    assert all(torch.allclose(ones[name], twos[name], atol=1e-5) for name in ones)


# -- from Python -------------------------------------------------------------------------------------------------------


def test_align_takes_a_model_and_its_tokenizer(tmp_path):
    model = tiny_language_model().transformer
    settings = {
        "output": str(tmp_path),
        "tracker": "none",
        "rounds": 1,
        "sampling": {"max_new_tokens": 4, "samples_per_prompt": 4},
        "training": {"steps": 2, "learning_rate": 0.05},
        "adapter": {"rank": 2},
    }
    result = align(model, PROMPTS, reward=goodness, tokenizer=tiny_tokenizer(), **settings)
    ids = torch.tensor([[3, 4]])
    fresh = PeftModel.from_pretrained(tiny_language_model().transformer, result.lora_path)
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, model(ids).logits)
        assert not torch.equal(tiny_language_model().transformer(ids).logits, model(ids).logits)
    assert "peft.PeftModel.from_pretrained(model, " in result.load_line
    again = align(model, PROMPTS, reward=goodness, tokenizer=tiny_tokenizer(), name="again", **settings)
    assert again.base[0].metrics == result.base[0].metrics  # it begins at the base model
    with pytest.raises(ConfigError, match="LlamaForCausalLM is a language model: give its tokenizer too"):
        align(tiny_language_model().transformer, PROMPTS, reward=goodness, name="third", **settings)


def test_the_report_and_the_card_show_texts_and_speak_of_no_guidance(tmp_path):
    result = finish(text_config(tmp_path))
    report = result.report_path.read_text(encoding="utf-8")
    sample = SampleStore(result.folder / "evaluation" / "guidance-1").read_samples(0)[0]
    assert "<blockquote" in report and (sample.text or "") in report
    card = (result.lora_path / "README.md").read_text(encoding="utf-8")
    assert "text-generation" in card and "library_name: peft" in card and "PeftModel.from_pretrained" in card
    assert f"| {plain(sample.prompt.text)} | {plain(sample.text or '')} |" in card
    for page in (report, card):
        assert "without guidance" not in page.lower()


def test_diversity_of_texts_is_the_share_of_their_bigrams_that_differ():
    assert distinct_2(["a b c", "a b d"]) == 3 / 4  # ab bc ab bd
    assert distinct_2(["A b c", "a B c"]) == 1 / 2
    assert distinct_2(["the the the the"]) == 1 / 3
    assert distinct_2(["one", ""]) != distinct_2(["one", ""])  # NaN: there are none

    def samples(*texts: str, flaw: str | None = None) -> list[Sample]:
        return [Sample(id=t, prompt=Prompt(text="p"), seed=0, text=t, flaw=flaw) for t in texts]

    same, other = diversity([samples("a b c", "a b c"), samples("a b c", "c b a")])
    assert (same, other) == (0.5, 1.0)
    [lone] = diversity([[*samples("a b"), *samples("c d", flaw="empty")]])
    assert lone != lone


def test_the_distance_of_texts_is_the_share_of_bigrams_that_only_one_has():
    assert text_distance("a b c", "a b c") == 0.0
    assert text_distance("a b c", "a b d") == 1 - 1 / 3
    assert text_distance("a b", "c d") == 1.0
    assert text_distance("one", "one") == 0.0 and text_distance("one", "two") == 1.0 and text_distance("", "") == 0.0


def test_methods_are_compared_on_texts_at_an_equal_budget_of_tokens(tmp_path):
    base = text_config(tmp_path).model_dump(mode="json", include={"model", "adapter", "prompts", "rewards", "training"})
    sampling = {"samples_per_prompt": 2, "batch_size": 8, "max_new_tokens": 4}
    config = CompareConfig.model_validate(
        {
            "output": str(tmp_path),
            "budget": 300,
            "base": base | {"sampling": sampling, "tracker": "none"},
            "methods": {"raft": {}, "rwr": {"algorithm": {"name": "rwr"}}},
        }
    )

    class Silent:
        def __init__(self, run: RunConfig) -> None:
            self.told = Told()

        def __enter__(self) -> Told:
            return self.told

        def __exit__(self, *_: object) -> None:
            pass

    outcomes = compare(config, text_run, Silent)
    assert all(outcome.spent()[0] >= 300 for outcome in outcomes)
    moved = gain(outcomes[:1], "drift")
    assert 0 < moved.mean <= 1
    assert "<blockquote" in (config.folder / "compare.html").read_text(encoding="utf-8")


def test_a_plan_counts_tokens_as_the_ledger_does(tmp_path):
    settings = {"sampling": {"max_new_tokens": 6, "samples_per_prompt": 4}, "evaluation": {"every": 2}}
    for name, algorithm in ALGORITHMS.items():
        config = text_config(tmp_path, name=name, **settings, **algorithm)
        planned = probed(text_run(config), config)
        result = finish(config)
        for round, stages in enumerate(planned.rounds):
            spent = {cost.stage: cost.passes for cost in result.reports[round].ledger}
            for work in stages:
                found = spent.get(work.stage.split(" at ")[0], 0)
                if work.stage != "score":
                    assert 0.4 * found <= work.passes <= 2.5 * found, (name, round, work.stage)


# -- from the command line ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_language_model().save_pretrained(folder)
    return folder


def written(model: Path, folder: Path, **settings: Any) -> Path:
    plain = text_config(folder, **settings).model_dump(mode="json")
    plain["model"] |= {"path": str(model), "device": "cpu"}
    plain["rewards"] = [{"name": "length", "options": {"target": 3}}]
    (folder / "run.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def done(model: Path, tmp_path_factory) -> Path:
    """The folder of a run that the command line has finished."""
    folder = tmp_path_factory.mktemp("runs")
    result = call("train", written(model, folder, rounds=1))
    assert result.code == 0, result.err
    assert "held-out prompts" in result.out and "guidance" not in result.out
    assert "peft.PeftModel.from_pretrained(model, " in result.out
    return folder / "run"


@pytest.mark.parametrize("name", ["policy-gradient", "sft", "dpo"])
def test_other_algorithms_are_run_from_a_file(model: Path, tmp_path, name: str):
    rows, options = {
        "policy-gradient": (None, {"clip": 0.1}),
        "sft": (COMPLETIONS, {}),
        "dpo": (PREFERENCES, {"source": "offline", "beta": 0.1}),
    }[name]
    data = {} if rows is None else {"data": {"path": str(lines(tmp_path / "own.jsonl", rows))}}
    run = written(model, tmp_path, rounds=1, algorithm={"name": name, "options": options}, **data)
    result = call("train", run)
    assert result.code == 0, result.err
    assert (tmp_path / "run" / "lora" / ADAPTER).is_file()


def test_a_text_run_is_trained_resumed_evaluated_and_reported_from_the_command_line(done: Path):
    result = call("resume", done, "--rounds", 2)
    assert result.code == 0 and "resumed after round 1" in result.out, result.err
    other = done.parent / "other.txt"
    other.write_text("good\nbad blue\n", encoding="utf-8")
    evaluated = call("evaluate", done, "--prompts", other, "--seeds", 3)
    assert evaluated.code == 0 and "length" in evaluated.out, evaluated.err
    assert "evaluation.guidance_scales: not for model.modality: text" in refused("evaluate", done, "--guidance", 2)
    assert call("report", done).code == 0


def test_a_plan_of_a_text_run_is_told_with_and_without_a_probe(model: Path, tmp_path):
    run = written(model, tmp_path)
    counted, measured = call("plan", run, "--no-probe"), call("plan", run)
    assert counted.code == 0 and measured.code == 0, counted.err + measured.err
    for said in (counted.out, measured.out):
        assert "texts" in said and "tokens through the model" in said and "images" not in said
    assert "time:" in measured.out and "time:" not in counted.out
    config = RunConfig.model_validate(yaml.safe_load(run.read_text(encoding="utf-8")))
    words = sum(len(prompt.split()) for prompt in PROMPTS) / len(PROMPTS)
    assert plan(config, probing=False).sizes.rows["sample"] == round(words) + 6


def test_texts_are_sampled_and_scored_from_the_command_line(model: Path, done: Path, tmp_path):
    out = tmp_path / "texts"
    asked = ("sample", "--modality", "text", "--model", model, "--prompts", "a b c", "--seeds", 3, "--out", out)
    asked = (*asked, "--max-new-tokens", 5)
    result = call(*asked, "--lora", done / "lora", "--temperature", 0.9, "--stop", "red")
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in (out / "completions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == ["a b c"] * 3 and [row["seed"] for row in rows] == [0, 1, 2]
    best = call(*asked, "--best-of", 4, "--reward", "length", "--option", "length.target=3")
    assert best.code == 0, best.err
    rows = [json.loads(line) for line in (out / "completions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(row["reward"] >= row["mean_reward"] for row in rows)
    own = lines(tmp_path / "mine.jsonl", COMPLETIONS)
    scored = call("score", own, "--reward", "length", "--option", "length.target=3")
    assert scored.code == 0, scored.err
    table = (tmp_path / "mine-scores.csv").read_text(encoding="utf-8").splitlines()
    assert table[0] == "prompt,completion,length" and len(table) == 5
    assert "sampling.num_inference_steps: not for model.modality: text" in refused(*asked, "--steps", 3)


def test_a_finished_text_run_is_exported_as_an_adapter_and_as_a_whole_model(model: Path, done: Path, tmp_path):
    half = call("export", done, "--dtype", "bf16", "--output", tmp_path / "half")
    assert half.code == 0, half.err
    assert {t.dtype for t in load_file(tmp_path / "half" / ADAPTER).values()} == {torch.bfloat16}
    whole = call("export", done, "--merged", "--output", tmp_path / "whole")
    assert whole.code == 0 and str(tmp_path / "whole") in whole.out, whole.err
    ids = torch.tensor([[3, 4, 5]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    carrying = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), done / "lora")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, carrying(ids).logits, atol=1e-5, rtol=1e-5)
    assert "something else stands there" in refused("export", done, "--merged", "--output", done / "samples")
    assert "is for pictures" in refused("export", done, "--format", "kohya")


# -- own data that are wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a"}', "line 2: no text in `completion`"),
        ('{"completion": "a"}', "line 2: no text in `prompt`"),
        ('{"prompt": "a", "completion": 3}', "line 2: no text in `completion`"),
        ('{"prompt": "a", "completion": "  "}', "line 2: no text in `completion`"),
        ('{"prompt": "a", ', "line 2: not a JSON object"),
        ('["a", "b"]', "line 2: not a JSON object"),
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path, line: str, words: str):
    path = tmp_path / "own.jsonl"
    path.write_text(f'{{"prompt": "a", "completion": "b"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(DataError, match=words):
        list(load_completions(path))


def test_files_without_examples_and_preferences_without_a_side_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no example"):
        list(load_completions(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match="give a folder"):
        list(load_completions(tmp_path / "nowhere.txt"))
    path = lines(tmp_path / "pairs.jsonl", [PREFERENCES[0], {"prompt": "a", "chosen": "b"}])
    with pytest.raises(DataError, match="line 2: no text in `rejected`"):
        list(load_text_preferences(path))
    pq.write_table(pa.Table.from_pylist([{"prompt": "a", "completion": None}]), tmp_path / "own.parquet")
    with pytest.raises(DataError, match="row 1: no text in `completion`"):
        list(load_completions(tmp_path / "own.parquet"))
