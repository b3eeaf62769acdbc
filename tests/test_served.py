"""Teachers behind an OpenAI-compatible server, over real HTTP: what is asked, what is taken, and runs on it."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_judges import serving
from tiny_runs import Told
from tiny_text import END, WORDS, text_config, text_run, tiny_language_model

from raftdiff import endpoint
from raftdiff.algorithms.raft import Raft
from raftdiff.build import build, load_model
from raftdiff.config import ModelConfig, RunConfig
from raftdiff.errors import ConfigError, EndpointError, MissingExtraError
from raftdiff.interrupts import Interrupted
from raftdiff.pipelines.llm import LanguageModel, LanguagePolicy
from raftdiff.pipelines.served import SEEDS, ServedModel
from raftdiff.rounds import run_rounds
from raftdiff.store import SampleStore
from raftdiff.types import Prompt

UNSEEN = (0, 2)  # tokens that no text shows: padding, unknown
GOOD = 3 + WORDS.index("good")
PROMPTS = [Prompt(text=text) for text in ("a b c", "one red", "two blue a b")]


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    """No test here cuts the power, so nothing has to wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def written(text: Any, reason: Any = "stop") -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": reason}], "usage": {"prompt_tokens": 9, "completion_tokens": 9}}


def good(request: dict[str, Any]) -> dict[str, Any]:
    return written(" good red")


def served(output: Path, address: str, *, server: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
    asked = {"model": "m", "backoff_s": 0.001} | (server or {})
    algorithm = {"name": "raft", "teacher": address, "server": asked}
    return text_config(output, **{"algorithm": algorithm} | settings)


def teacher(config: RunConfig, model: LanguageModel | None = None) -> ServedModel:
    return ServedModel(config, LanguagePolicy.from_config(config, model or tiny_language_model()))


def test_a_request_says_how_the_run_samples_and_a_text_comes_back_in_its_own_tokens(tmp_path):
    sampling = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5, "stop": ["."]}
    with serving(lambda request: written(" good red", "length" if "one" in request["prompt"] else "stop")) as (
        server,
        address,
    ):
        config = served(tmp_path, address, server={"extra": {"top_k": 5}}, sampling=sampling)
        asked = teacher(config)
        samples = asked.sample(PROMPTS[:2], [3, SEEDS + 4], guidance_scale=1.0, noise_level=None)
    assert sorted(server.requests, key=lambda r: r["prompt"]) == [
        {"model": "m", "prompt": "a b c", "seed": 3, "max_tokens": 5, **sampling_of(sampling), "top_k": 5},
        {"model": "m", "prompt": "one red", "seed": 4, "max_tokens": 5, **sampling_of(sampling), "top_k": 5},
    ]
    red, end = 3 + WORDS.index("red"), 1
    ended, cut_off = (s.completion for s in samples)
    assert ended is not None and ended.tokens_T.tolist() == [GOOD, red, end] and ended.finished
    assert cut_off is not None and cut_off.tokens_T.tolist() == [GOOD, red] and not cut_off.finished
    assert ended.log_prob_T.isnan().all() and [s.text for s in samples] == [" good red"] * 2
    assert [(s.prompt, s.seed, s.flaw) for s in samples] == [(PROMPTS[0], 3, None), (PROMPTS[1], SEEDS + 4, None)]
    assert asked.passes == (3 + 3) + (2 + 2)  # tokens of prompts and completions


def sampling_of(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in ("temperature", "top_p", "stop")}


def test_a_prompt_goes_out_in_the_chat_template_without_the_token_that_servers_begin_with(tmp_path):
    model = tiny_language_model(template=END + " red {{ messages[0].content }} blue")
    model.tokenizer.bos_token = END
    with serving(good) as (server, address):
        teacher(served(tmp_path, address), model).sample(PROMPTS[:1], [0])
    assert server.requests[0]["prompt"] == " red a b c blue"


@pytest.mark.parametrize(
    "fault",
    [
        (429, {"retry-after": "0"}),
        (500, {}),
        "truncated",
        "slow",
        b"<html>",
        b'{"choices": [{"text": null, "finish_reason": "stop"}]}',
        b'{"choices": [{"text": "\\ud800", "finish_reason": "stop"}]}',
        b"",
    ],
    ids=str,
)
def test_a_fault_that_passes_costs_a_retry_and_no_sample(tmp_path, fault):
    with serving(good) as (server, address):
        server.faults = [fault, fault]
        config = served(tmp_path, address, server={"timeout_s": 0.5, "concurrency": 1})
        (sample,) = teacher(config).sample(PROMPTS[:1], [0])
        assert sample.flaw is None and sample.text == " good red" and len(server.requests) == 3


@pytest.mark.parametrize(
    ("reply", "flaw"),
    [
        (written(""), "empty completion"),
        (written(" \n"), "empty completion"),
        (written(" good", "content_filter"), "the server ended the completion: content_filter"),
        (written(" good" * 60), "more it does not fit into the 48 of this model"),
    ],
)
def test_what_cannot_be_trained_on_is_a_flawed_sample(tmp_path, reply, flaw):
    with serving(lambda request: reply) as (_, address):
        (sample,) = teacher(served(tmp_path, address)).sample(PROMPTS[:1], [0])
    assert sample.flaw is not None and flaw in sample.flaw and "\n" not in sample.flaw


def test_a_text_that_stays_away_is_a_flawed_sample_and_many_are_an_outage(tmp_path, caplog):
    with serving(lambda request: good(request) if "two" in request["prompt"] else {"choices": []}) as (_, address):
        config = served(tmp_path, address, server={"retries": 1})
        samples = teacher(config).sample([PROMPTS[0], *[PROMPTS[2]] * 3], range(4))
        assert [s.flaw for s in samples] == ["no completion: the reply is no completion", None, None, None]
        assert "teacher: 1 of 4 texts are missing: the reply is no completion" in caplog.text
        with pytest.raises(EndpointError, match=r"2 of 4 requests to .*/completions have no answer .*max_failed"):
            teacher(config).sample([*PROMPTS[:2], PROMPTS[2], PROMPTS[2]], range(4))


def test_a_deadline_ends_what_a_slow_server_does_not(tmp_path):
    with serving(good) as (server, address):
        server.faults = ["slow"] * 9
        config = served(tmp_path, address, server={"deadline_s": 0.3}, max_failed=1.0)
        (sample,) = teacher(config).sample(PROMPTS[:1], [0])
    assert sample.flaw == "no completion: none within 0.3 s"


def test_a_server_that_is_down_or_refuses_is_one_clear_line(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(EndpointError, match="start the teacher there, or mend algorithm.teacher"):
        teacher(served(tmp_path, nowhere)).sample(PROMPTS, range(3))
    with serving(good) as (server, address):
        server.faults = [(404, {})] * 9
        with pytest.raises(ConfigError, match="the teacher at .* knows no such address or model 'm'"):
            teacher(served(tmp_path, address)).sample(PROMPTS, range(3))
        monkeypatch.setenv("MY_KEY", "sk-secret")
        server.faults = [(401, {})]
        with pytest.raises(ConfigError, match="the teacher at .* refuses the key .*: set MY_KEY"):
            teacher(served(tmp_path, address, server={"api_key_env": "MY_KEY"})).sample(PROMPTS[:1], [0])
    assert server.headers[-1]["authorization"] == "Bearer sk-secret"
    with pytest.raises(ConfigError, match="the key in MY_KEY would go unencrypted to http://example.com/v1"):
        teacher(served(tmp_path, "http://example.com/v1", server={"api_key_env": "MY_KEY"}))


# -- runs -------------------------------------------------------------------------------------------------------------


def better() -> LanguageModel:
    """A model that likes to say `good`."""
    model = tiny_language_model()
    model.transformer.lm_head.weight.data[GOOD] *= 3
    return model


class Serving:
    """A language model that answers requests, as a server has it."""

    def __init__(self, model: LanguageModel, **sampling: Any) -> None:
        self.policy = LanguagePolicy(model, **sampling)
        self._lock = threading.Lock()

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            (sample,) = self.policy.sample([Prompt(text=request["prompt"])], [request["seed"]])
        assert sample.completion is not None
        return written(sample.text, "stop" if sample.completion.finished else "length")


def test_a_student_learns_from_a_model_that_is_served(tmp_path):
    settings = {"training": {"steps": 8, "learning_rate": 0.05}, "evaluation": {"seeds_per_prompt": 8}}
    with serving(Serving(better(), max_new_tokens=6)) as (server, address):
        config = served(tmp_path, address, **settings, rounds=3)
        result = run_rounds(text_run(config))
        assert len(server.requests) == 3 * 16
    assert result.aligned[0].gains["goodness"].mean > 0.1
    assert (tmp_path / "run" / "lora" / "adapter_model.safetensors").is_file()
    stored = SampleStore(result.folder).read_samples(1)
    local = LanguagePolicy(better(), max_new_tokens=6)
    again = local.sample([s.prompt for s in stored], [s.seed % SEEDS for s in stored])
    assert [s.text for s in stored] == [s.text for s in again]
    for one, other in zip(stored, again, strict=True):
        if one.flaw is None and one.completion is not None and other.completion is not None:
            shown = [token for token in other.completion.tokens_T.tolist() if token not in UNSEEN]
            assert one.completion.tokens_T.tolist() == shown
            assert one.completion.log_prob_T.isnan().all()
    flawed = [s for s in stored if s.flaw]
    assert {s.flaw for s in flawed} <= {"empty completion"} and result.reports[1].skipped == len(flawed)
    assert {cost.stage: cost.passes for cost in result.reports[1].ledger}["sample"] > 0


def test_a_stopped_run_reads_what_was_stored_and_asks_for_the_rest(tmp_path):
    asked: list[int] = []

    def other_each_time(request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request["seed"])
        return written(f" {WORDS[len(asked) % 10]}")

    def stop(round: int, stage: str) -> None:
        if (round, stage) == (1, "score"):
            os.kill(os.getpid(), signal.SIGTERM)

    with serving(other_each_time) as (_, address):
        config = served(tmp_path, address, rounds=1)
        with pytest.raises(Interrupted):
            run_rounds(text_run(config, display=Told(stop)))
        before = [s.text for s in SampleStore(config.folder).read_samples(1)]
        resumed = run_rounds(text_run(config), resume=True)
    assert len(before) == len(asked) == 16
    assert [s.text for s in SampleStore(resumed.folder).read_samples(1)] == before


def test_the_embedded_model_learns_from_one_that_is_served(tmp_path):
    """The base of the student teaches it: what is best of K is kept."""
    teaching = Serving(load_model(ModelConfig(modality="text")), max_new_tokens=32)
    with serving(teaching) as (server, address):
        config = served(
            tmp_path,
            address,
            rounds=1,
            model={"path": "shapes"},
            prompts={"source": "shapes-text:translation/8/1"},
            rewards=[{"name": "shapes-translation"}],
            sampling={"max_new_tokens": 32},
            training={"learning_rate": 1e-3, "steps": 2},
            evaluation={"prompts": "shapes-text:translation/4/2", "seeds_per_prompt": 1},
        )
        result = run_rounds(build(config))
    report = result.reports[1]
    assert (report.requested, report.scored, report.selected, len(server.requests)) == (32, 32, 8, 32)
    assert report.rewards["shapes-translation"] > 0.5
    assert all(request["prompt"].startswith("French: ") for request in server.requests)


class NeedsLogProb(Raft):
    """An algorithm of another package that does not think of teachers."""

    needs = ("log_prob",)


def test_algorithms_that_need_the_samplers_log_probabilities_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs the log-probabilities of what was sampled, which a server does not"):
        algorithm = {"name": "test_served:NeedsLogProb", "teacher": "http://localhost:9/v1", "server": {"model": "m"}}
        build(text_config(tmp_path, algorithm=algorithm), pipeline=tiny_language_model(), rewards=LIVE, allow_code=True)
    for name in ("policy-gradient", "ppo"):
        algorithm = {"name": name, "teacher": "http://localhost:9/v1", "server": {"model": "m"}}
        with pytest.raises(ConfigError, match="algorithm.teacher must be left out"):
            text_run(text_config(tmp_path, algorithm=algorithm))


class Liked:
    """A reward that is there, and is never asked."""

    name, modality = "goodness", "text"

    def score(self, samples: Sequence[Any]) -> Any:
        raise AssertionError


LIVE = {"goodness": Liked()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"modality": "image"}}, "algorithm.teacher: a server's texts are for model.modality: text"),
        ({"algorithm": {"server": None}}, "algorithm.server: set it, with the name of the model"),
        ({"algorithm": {"teacher": "some/model"}}, "algorithm.server: set it, with the name of the model"),
        ({"algorithm": {"server": {"modell": "m"}}}, "modell"),
    ],
)
def test_settings_of_a_server_that_do_not_fit_are_refused(settings, message):
    algorithm = {"teacher": "https://example.com/v1", "server": {"model": "m"}} | settings.get("algorithm", {})
    plain = {"model": {"modality": "text"}, "rewards": [{"name": "length"}]} | settings | {"algorithm": algorithm}
    with pytest.raises(ValueError, match=re.escape(message)):
        RunConfig.model_validate(plain)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"is asked with httpx2: pip install 'raftdiff\[judge\]'"):
        text_run(served(tmp_path, "http://localhost:9/v1"))
