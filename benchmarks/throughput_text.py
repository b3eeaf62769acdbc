"""How fast language models write and are trained, beside plain transformers and peft code on the same machine.

    OMP_NUM_THREADS=1 python -m benchmarks.throughput_text                   # Llama's architecture, 100M parameters
    python -m benchmarks.throughput_text --models llama8b                    # the shape of Llama 3 8B, for a GPU

Weights are random, and the tokenizer, which ends no text, is the embedded model's. Both sides have one model with one
LoRA and the same texts; plain code is `generate` on the whole batch, and the model's own loss on rows that were encoded
once. Memory is what a call takes on top of the loaded model, each in a process of its own (on a CPU Linux tells).
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.common import arguments, table
from benchmarks.throughput import GPU, Figure, device_name, in_turn, matmul_rate, save
from raftdiff.build import build_policy, default_device
from raftdiff.config import Dtype, parse_config
from raftdiff.pipelines.llm import LanguageModel, LanguagePolicy
from raftdiff.pipelines.loading import DTYPES
from raftdiff.shapes import WEIGHTS
from raftdiff.shapes.captions import COLORS
from raftdiff.types import Prompt, Sample

Work = Literal["writing", "training"]
SIDES = ("ours", "plain")
IGNORED = -100  # the label of what the loss leaves out


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one model is given to do."""

    shape: dict[str, Any]
    """Of LlamaConfig."""
    rows: int
    """Written at once."""
    prompt: int
    """Most words of a prompt, each a token; the shortest has half."""
    written: int
    """Tokens of a completion."""
    training_rows: int
    """Of one optimizer step."""


LOADS = {
    "llama100m": Load(
        shape={
            "vocab_size": 32000,
            "hidden_size": 640,
            "intermediate_size": 1728,
            "num_hidden_layers": 12,
            "num_attention_heads": 10,
        },
        rows=32,
        prompt=64,
        written=64,
        training_rows=8,
    ),
    "llama8b": Load(
        shape={
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
        },
        rows=64,
        prompt=256,
        written=256,
        training_rows=8,
    ),
}


def main() -> None:
    options = arguments(__doc__ or "", models=["llama100m"], dtypes=["bf16"], repeats=3, json="")
    figures: list[Figure] = []
    for name in options.models:
        for dtype in options.dtypes:
            figures += measured(name, dtype, options.repeats)
            save(figures, options.json)
    rows = [[f.model, f.what, f"{f.value:.4g} {f.unit}", f.wanted] for f in figures]
    table(f"\n{device_name()}, torch {torch.__version__}", ["model", "what", "measured", "wanted"], rows)


def measured(name: str, dtype: Dtype, repeats: int) -> Iterator[Figure]:
    """The figures of one model in one arithmetic."""
    load = LOADS[name]

    def figure(what: str, value: float, unit: str, wanted: str = "") -> Figure:
        return Figure(model=f"{name}, {dtype}", what=what, value=value, unit=unit, wanted=wanted)

    peaks = {work: [peak(name, dtype, work, side) for side in SIDES] for work in ("writing", "training")}
    yield figure("matrix product, the best", matmul_rate(dtype) / 1e12, "TFLOP/s")
    policy = subject(load, dtype)
    writing = in_turn(writers(policy, load), repeats)
    steps, tokens = trainers(policy, load)
    training = in_turn(steps, repeats)
    for work, seconds, count in (("writing", writing, load.rows * load.written), ("training", training, tokens)):
        yield figure(work, count / seconds["ours"], "tokens/s")
        yield figure("... against plain code", seconds["plain"] / seconds["ours"], "x", ">= 0.95")
        ours, plain = peaks[work]
        yield figure("... memory on top of the model", ours / 1e9, "GB")
        yield figure("... against plain code", plain / ours, "x")


# -- what is measured -------------------------------------------------------------------------------------------------


def subject(load: Load, dtype: Dtype) -> LanguagePolicy:
    """The policy as a run would have it."""
    torch.manual_seed(0)
    with torch.device(default_device()):
        model = LlamaForCausalLM(LlamaConfig(**load.shape, bos_token_id=None, eos_token_id=None)).to(DTYPES[dtype])
    config = parse_config(
        {
            "model": {"modality": "text", "dtype": dtype},
            "adapter": {"rank": 16, "targets": "linear"},
            "sampling": {"batch_size": load.rows, "max_new_tokens": load.written},
            "training": {"precision": dtype},
        },
        where="benchmark",
    )
    return build_policy(config, LanguageModel(transformer=model, tokenizer=endless_tokenizer()))


def endless_tokenizer() -> Any:
    """Without an end token: every text is as long as it may be."""
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "text", model_max_length=8192)
    tokenizer.eos_token = None
    return tokenizer


def prompts(load: Load, rows: int) -> list[Prompt]:
    """Words by chance, from half as many as the longest prompt has to all of them."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(load.prompt // 2, load.prompt, rows).astype(int)
    return [Prompt(text=" ".join(rng.choice(list(COLORS), length))) for length in lengths]


def writers(policy: LanguagePolicy, load: Load) -> dict[str, Callable[[], Any]]:
    """A batch of completions by the policy, and by `generate` itself."""
    asked = prompts(load, load.rows)
    settings = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=load.written, pad_token_id=policy.tokenizer.pad_token_id
    )

    @torch.no_grad()
    def plain() -> None:
        texts = [prompt.text for prompt in asked]
        inputs = policy.tokenizer(texts, padding=True, return_tensors="pt").to(policy.device)
        with arithmetic(policy):
            output = policy.model.generate(**inputs, generation_config=settings)
        policy.tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)

    return {"ours": lambda: policy.sample(asked, range(load.rows)), "plain": plain}


def trainers(policy: LanguagePolicy, load: Load) -> tuple[dict[str, Callable[[], Any]], int]:
    """A step on the same completions by the policy, and by the model's own loss; and their tokens with the prompts'."""
    samples = completed(policy, prompts(load, load.training_rows), load.written)
    inputs = rows(policy, samples)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)

    def updated(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def ours() -> None:
        updated(loss(policy, samples))

    def plain() -> None:
        updated(plain_loss(policy, inputs))

    return {"ours": ours, "plain": plain}, int(inputs["attention_mask"].sum())


def completed(policy: LanguagePolicy, asked: list[Prompt], length: int) -> list[Sample]:
    """The prompts with completions of one length, of words by chance."""
    rng = np.random.default_rng(1)
    return policy.encode_outputs(asked, [" ".join(rng.choice(list(COLORS), length)) for _ in asked])


def loss(policy: LanguagePolicy, samples: list[Sample]) -> torch.Tensor:
    """Of a token, as a step of SFT or RAFT has it."""
    written = sum(len(sample.completion.tokens_T) for sample in samples if sample.completion)
    return policy.error(samples, policy.draw(samples, torch.Generator())).sum() / written


def rows(policy: LanguagePolicy, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """What the model takes, int64 [B, T], padded on the right; labels are those of the completions."""
    asked = policy.tokenizer([sample.prompt.text for sample in samples]).input_ids
    written = [sample.completion.tokens_T.tolist() for sample in samples if sample.completion]
    pairs = list(zip(asked, written, strict=True))

    def together(of_pairs: list[list[int]], fill: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(row) for row in of_pairs], batch_first=True, padding_value=fill)

    made = {
        "input_ids": together([prompt + text for prompt, text in pairs], policy.tokenizer.pad_token_id),
        "attention_mask": together([[1] * len(prompt + text) for prompt, text in pairs], 0),
        "labels": together([[IGNORED] * len(prompt) + text for prompt, text in pairs], IGNORED),
    }
    return {name: tensor.to(policy.device) for name, tensor in made.items()}


def plain_loss(policy: LanguagePolicy, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's own, of a token."""
    with arithmetic(policy):
        return policy.model(**inputs, use_cache=False).loss


def arithmetic(policy: LanguagePolicy) -> AbstractContextManager[Any]:
    """What transformers' Trainer has for LoRA, whose weights are in fp32."""
    bf16 = policy.precision != torch.float32
    return torch.autocast(policy.device.type, policy.precision) if bf16 else nullcontext()


# -- memory -----------------------------------------------------------------------------------------------------------


def peak(name: str, dtype: Dtype, work: Work, side: str) -> int:
    """The most bytes that a call holds on top of the model, in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, dtype, work, side))


def _peak(name: str, dtype: Dtype, work: Work, side: str) -> int:
    load = LOADS[name]
    policy = subject(load, dtype)
    function = writers(policy, load)[side] if work == "writing" else trainers(policy, load)[0][side]
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = most_held()
    function()
    return most_held() - before


def most_held() -> int:
    """The peak in bytes: of the GPU's allocator, or of this process."""
    if GPU:
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
