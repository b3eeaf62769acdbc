"""Causal language models of a few thousand weights, with a tokenizer, and runs of them that take a moment."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from raftdiff.build import build
from raftdiff.config import RunConfig
from raftdiff.pipelines.llm import LanguageModel
from raftdiff.reward_models.function import FunctionReward
from raftdiff.rounds import Display, Run

WORDS = ["a", "b", "c", "good", "bad", "red", "blue", "one", "two", "."]
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
PROMPTS = ["a b c", "one red", "two blue a b", "c"]
CONTEXT = 48


def tiny_tokenizer(*, pad: str | None = PAD, template: str | None = None) -> PreTrainedTokenizerFast:
    """Of words between spaces."""
    vocabulary = {word: i for i, word in enumerate([PAD, END, UNKNOWN, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=END, unk_token=UNKNOWN)
    wrapped.chat_template = template
    return wrapped


_COMMON: dict[str, Any] = {"vocab_size": 3 + len(WORDS), "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
}


def _llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**_COMMON, **_SIZES))


def _qwen2() -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**_COMMON, **_SIZES, tie_word_embeddings=True))


def _gpt2() -> Any:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**_COMMON, **sizes))


FAMILIES = {"llama": _llama, "gpt2": _gpt2, "qwen2": _qwen2}


@cache
def _built(family: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return FAMILIES[family]().eval()


def tiny_language_model(family: str = "llama", **tokenizer: Any) -> LanguageModel:
    """A fresh copy, the same each time."""
    return LanguageModel(transformer=copy.deepcopy(_built(family)), tokenizer=tiny_tokenizer(**tokenizer))


def goodness(texts: Sequence[str], prompts: Sequence[str]) -> list[float]:
    """The share of `good` among the words."""
    return [text.split().count("good") / max(1, len(text.split())) for text in texts]


def text_config(output: Path, **settings: Any) -> RunConfig:
    """Two rounds of 4 prompts x 4 samples; `settings` are merged into that."""
    plain: dict[str, Any] = {
        "name": "run",
        "output": str(output),
        "rounds": 2,
        "model": {"modality": "text", "path": "tiny"},
        "adapter": {"rank": 2},
        "prompts": {"source": PROMPTS},
        "rewards": [{"name": "goodness"}],
        "combine": "sum",
        "sampling": {"samples_per_prompt": 4, "batch_size": 8, "max_new_tokens": 6},
        "training": {"learning_rate": 0.05, "batch_size": 4, "steps": 3},
        "evaluation": {"seeds_per_prompt": 2},
        "tracker": "none",
    }
    for name, value in settings.items():
        plain[name] = plain.get(name, {}) | value if isinstance(value, Mapping) else value
    return RunConfig.model_validate(plain)


def text_run(config: RunConfig, *, model: LanguageModel | None = None, display: Display | None = None) -> Run:
    """A run of a tiny language model, on its way to saying `good`."""
    live = {"goodness": FunctionReward(goodness, "goodness")}
    return build(config, pipeline=model or tiny_language_model(), rewards=live, display=display)
