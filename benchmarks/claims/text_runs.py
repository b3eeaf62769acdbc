"""Runs of the embedded language model that the claims on texts share, and what is measured on them.

Evaluated are prompts that no dose was chosen on: not those of the demo's choice, nor those of docs/ppo.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.common import configured, run
from raftdiff.build import build_algorithm, build_policy, load_model
from raftdiff.checkpoint import Checkpoints
from raftdiff.config import RunConfig, load_config, load_preset
from raftdiff.evaluation import paired_interval
from raftdiff.prompts import load_prompts
from raftdiff.rounds import Result
from raftdiff.shapes.texts import french_of, read_french
from raftdiff.store import SampleStore
from raftdiff.types import Interval, Sample

PRESET = "demo-text"
METRICS = ("reward", "translation-strict", "diversity")
SEEN = "shapes-text:translation/64/2"  # what the doses of docs/ppo.md were chosen on
REVIEWS = "shapes-text:continuation/256/1"


def unseen_prompts() -> list[str]:
    """The demo's held-out prompts but those that a dose of PPO was chosen on."""
    seen = {prompt.text for prompt in load_prompts(SEEN)}
    return [p.text for p in load_prompts(load_preset(PRESET).evaluation.prompts or "") if p.text not in seen]


def translation(output: str, name: str, **changes: Any) -> Result:
    """The demo's run with settings changed, evaluated at its end."""
    settings = {"seed": 1, "evaluation.every": 100, "evaluation.prompts": unseen_prompts()}
    return run(configured(PRESET, output, f"text-{name}", settings | changes))


def continuation(output: str, name: str, **changes: Any) -> Result:
    """Reviews gone on with, to be well meant: RAFT by the sentiment reward, at the demo's dose."""
    settings = {
        "seed": 1,
        "rounds": 2,
        "prompts.source": REVIEWS,
        "rewards": [{"name": "sentiment"}],
        "evaluation.rewards": [{"name": "repetition"}],
        "evaluation.prompts": "shapes-text:continuation/96/7",
        "evaluation.every": 100,
    }
    return run(configured(PRESET, output, f"text-{name}", settings | changes))


def rest(
    output: str,
    name: str,
    *,
    grows: int,
    thresholds: tuple[float, ...],
    rule: str = "percentile",
    loss_type: str = "bc",
    **changes: Any,
) -> Result:
    """ReST on translations with so many Grows of one Improve for each threshold."""
    options = {
        "rule": rule,
        "thresholds": list(thresholds),
        "loss_type": loss_type,
        "gate": False,
        "learning_rate_decay": 0.8,
    }
    settings = {
        "rounds": grows * len(thresholds),
        "training.steps": 40,
        "algorithm": {"name": "rest", "options": options},
    }
    return translation(output, f"rest-{name}", **settings, **changes)


def written(result: Result, round: int | None = None) -> list[Sample]:
    """What the model after a round, or after the last, wrote for the held-out prompts, by prompt, then seed."""
    store = SampleStore(result.folder / "evaluation" / "guidance-1")
    return store.read_samples(result.reports[-1].round if round is None else round)


def log_ratios(result: Result, round: int | None = None) -> np.ndarray:
    """log p - log p_base of those texts, in nats, [N]: their mean is the divergence KL(p || p_base)."""
    samples = written(result, round)
    own_N = np.array([float(s.completion.log_prob_T.double().sum()) for s in samples if s.completion is not None])
    return own_N + errors(base_policy(load_config(result.folder / "config.yaml")), samples)


def divergence(result: Result) -> Interval:
    """KL(p || p_base) of a text in nats, with its interval over prompts."""
    return paired_interval(log_ratios(result), [sample.prompt.id for sample in written(result)])


def base_policy(config: RunConfig) -> Any:
    """The model as it is before the run `config`."""
    return build_policy(config, load_model(config.model), needs=build_algorithm(config).needs)


def trained_policy(result: Result) -> Any:
    """The model that the run ended with."""
    policy = base_policy(load_config(result.folder / "config.yaml"))
    checkpoint = Checkpoints(result.folder / "checkpoints").load(result.reports[-1].round)
    policy.load_adapter(checkpoint.tensors("adapter"))
    return policy


@torch.no_grad()
def errors(policy: Any, samples: list[Sample]) -> np.ndarray:
    """-log p of each text at temperature 1, in nats, [N]."""
    generator = torch.Generator()
    return (
        torch.cat([policy.error(part, policy.draw(part, generator)).cpu() for part in _chunks(samples, 128)])
        .double()
        .numpy()
    )


def _chunks(samples: list[Sample], size: int) -> list[list[Sample]]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def right_answer(prompt: str) -> str:
    """The translation without a mistake. `prompt` is one of the translation task."""
    return str(read_french(french_of(prompt) or ""))


def perplexity(policy: Any) -> float:
    """Of a token of the right translations of the held-out prompts."""
    prompts = load_prompts(unseen_prompts())
    answers = policy.encode_outputs(prompts, [right_answer(prompt.text) for prompt in prompts])
    tokens = sum(len(answer.completion.tokens_T) for answer in answers)
    return float(np.exp(errors(policy, answers).sum() / tokens))
