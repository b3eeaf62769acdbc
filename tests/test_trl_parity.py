"""DPO and GRPO of a language model have the losses and gradients of trl on the same model, LoRA and batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raftdiff.algorithms.dpo import Dpo
from raftdiff.algorithms.policy_gradient import PolicyGradient
from raftdiff.config import AdapterConfig
from raftdiff.pipelines.llm import LanguageModel, LanguagePolicy
from raftdiff.protocols import Algorithm
from raftdiff.types import Batch, Example, Prompt, Sample

trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'raftdiff[dev]'")

WORDS = ["<pad>", "</s>", "a", "the", "red", "blue", "round", "square", "shape", "is"]
PROMPTS = ["a red", "the blue square is", "the round shape", "a"]
ADVANTAGES = [1.0, -1.0, 0.5, -2.0]
TOLERANCE = 1e-5  # of the loss, and of the largest gradient


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", padding_side="left")


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def policy(temperature: float = 1.0) -> LanguagePolicy:
    made = LanguagePolicy(
        LanguageModel(transformer=tiny_llama(), tokenizer=tokenizer()),
        AdapterConfig(rank=2),
        max_new_tokens=6,
        temperature=temperature,
    )
    move(made, seed=1, by=0.3)
    return made


@torch.no_grad()
def move(policy: LanguagePolicy, *, seed: int, by: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in policy.parameters():
        p += by * torch.randn(p.shape, generator=generator)


def trained(policy: LanguagePolicy) -> dict[str, torch.nn.Parameter]:
    """The weights of the LoRA under the names that trl's model has for them."""
    [adapter] = policy.model.peft_config
    return {
        f"base_model.model.{name}".replace(f".{adapter}.", ".default."): p
        for name, p in policy.model.named_parameters()
        if p.requires_grad
    }


def of_trl(trainer: type, policy: LanguagePolicy, arguments: Any, **others: Any) -> Any:
    """A trainer of trl on a copy of the base model, with the policy's LoRA."""
    [adapter] = policy.model.peft_config.values()
    made = trainer(
        model=tiny_llama(),
        args=arguments,
        processing_class=tokenizer(),
        peft_config=copy.deepcopy(adapter),
        **others,
    )
    weights = {name: p.detach() for name, p in trained(policy).items()}
    assert not made.model.load_state_dict(weights, strict=False).unexpected_keys
    made.model.eval()
    return made


def quiet(folder: Path, **settings: Any) -> dict[str, Any]:
    plain = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    return plain | {"activation_checkpointing": False} | settings


def dataset(**columns: Sequence[str]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({name: list(values) for name, values in columns.items()})


def sampled(policy: LanguagePolicy, first_seed: int) -> list[Sample]:
    return policy.sample([Prompt(text=text) for text in PROMPTS], range(first_seed, first_seed + len(PROMPTS)))


def loss_of(algorithm: Algorithm, policy: LanguagePolicy, examples: Sequence[Example]) -> tuple[torch.Tensor, dict]:
    draw = policy.draw([example.sample for example in examples], torch.Generator())
    weight_B = torch.tensor([example.weight for example in examples])
    loss_B, metrics = algorithm.loss(policy, Batch(examples=examples, weight_B=weight_B, draw=draw, updates=1))
    return loss_B.mean(), metrics


def assert_same(loss: torch.Tensor, policy: LanguagePolicy, of_trl: torch.Tensor, trainer: Any) -> None:
    assert loss.item() == pytest.approx(of_trl.item(), rel=TOLERANCE)
    loss.backward()
    of_trl.backward()
    weights = dict(trainer.model.named_parameters())
    pairs = [(p.grad, weights[name].grad) for name, p in trained(policy).items()]
    ours, theirs = (torch.cat([grad.flatten() for grad in grads]) for grads in zip(*pairs, strict=True))
    assert theirs.abs().median() > 1e-3 and (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def test_dpo(tmp_path: Path):
    own = policy()
    chosen, rejected = sampled(own, 0), sampled(own, 100)
    assert len({len(s.completion.tokens_T) for s in (*chosen, *rejected) if s.completion}) > 2  # padding is at stake
    examples = [Example(sample=a, rejected=b) for a, b in zip(chosen, rejected, strict=True)]
    loss, metrics = loss_of(Dpo(beta=0.3), own, examples)

    trainer = of_trl(
        trl.DPOTrainer,
        own,
        trl.DPOConfig(**quiet(tmp_path, beta=0.3)),
        train_dataset=dataset(prompt=["a"], chosen=["red"], rejected=["blue"]),
    )
    encode = tokenizer()
    rows = [
        {
            "prompt_ids": encode(a.prompt.text).input_ids,
            "chosen_ids": a.completion.tokens_T.tolist(),
            "rejected_ids": b.completion.tokens_T.tolist(),
        }
        for a, b in zip(chosen, rejected, strict=True)
        if a.completion and b.completion
    ]
    assert_same(loss, own, trainer.compute_loss(trainer.model, trainer.data_collator(rows)), trainer)
    assert trainer._metrics["eval"]["rewards/margins"][-1] == pytest.approx(metrics["margin"].mean().item(), abs=1e-5)


@pytest.mark.parametrize("kl_beta", [0.0, 0.4])
def test_grpo(tmp_path: Path, kl_beta: float):
    own = policy(temperature=0.7)
    samples = sampled(own, 0)
    move(own, seed=2, by=0.1)
    examples = [Example(sample=s, weight=a) for s, a in zip(samples, ADVANTAGES, strict=True)]
    loss, metrics = loss_of(PolicyGradient(clip=0.2, kl_beta=kl_beta), own, examples)
    assert 0 < metrics["clipped"].mean() < 1

    settings = {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 6}
    settings |= {"loss_type": "grpo", "beta": kl_beta, "epsilon": 0.2, "temperature": 0.7}
    trainer = of_trl(
        trl.GRPOTrainer,
        own,
        # The paper's penalty: trl multiplies it by the ratio if not told otherwise.
        trl.GRPOConfig(**quiet(tmp_path, **settings), use_bias_correction_kl=False),
        reward_funcs=lambda completions, **others: [0.0] * len(completions),
        train_dataset=dataset(prompt=PROMPTS),
    )
    inputs = rollouts(samples)
    with torch.no_grad(), trainer.model.disable_adapter():
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        width = inputs["completion_ids"].shape[1]
        inputs["ref_per_token_logps"] = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)[0]
    assert_same(loss, own, trainer.compute_loss(trainer.model, inputs), trainer)
    if kl_beta:
        lengths = inputs["completion_mask"].sum(1)  # trl's metric is over tokens, ours over texts
        by_token = (metrics["kl"] * lengths).sum() / lengths.sum()
        assert trainer._metrics["eval"]["kl"][-1] == pytest.approx(by_token.item(), rel=1e-4)


def rollouts(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """What trl's GRPO trains on: prompts padded on the left, completions on the right."""
    prompts = tokenizer()([s.prompt.text for s in samples], padding=True, return_tensors="pt")
    completions = [s.completion for s in samples if s.completion]

    def right(rows: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)

    return {
        "prompt_ids": prompts.input_ids,
        "prompt_mask": prompts.attention_mask,
        "completion_ids": right([c.tokens_T for c in completions]),
        "completion_mask": right([torch.ones_like(c.tokens_T) for c in completions]),
        "old_per_token_logps": right([c.log_prob_T for c in completions]),
        "advantages": torch.tensor(ADVANTAGES),
    }
