"""The embedded language model: a small `LlamaForCausalLM` for the tasks of `raftdiff.shapes.texts`, built here and
trained from nothing by `raftdiff shapes train --stage text`.

It ships as a plain folder of transformers, `raftdiff.shapes.WEIGHTS / "text"`, which `AutoModelForCausalLM` and
`AutoTokenizer` load without code of this project.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raftdiff.shapes.texts import TASKS, Text, random_text

from .shapes_training import fit, load_as_float32

MAX_TOKENS = 128
VOCABULARY = 1536
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
TASK_SHARES = (0.45, 0.35, 0.2)  # of translation, continuation, caption in each batch
IGNORED = -100  # the label of what the loss leaves out


def build_tokenizer(seed: int = 11, count: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the corpus, in which all but its rarer words are single tokens.

    Words carry the space before them, and the first word of a text has one too, so that a prompt and its completion
    encode alike apart and together.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", left=1)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(seed)
    texts = (corpus_text(rng) for _ in range(count))
    tokenizer.train_from_iterator((f"{text.prompt} {text.completion}" for text in texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """1.1M parameters with random weights; the input and output embeddings are one matrix."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def corpus_text(rng: np.random.Generator) -> Text:
    """One text of the training corpus, its task by TASK_SHARES."""
    return random_text(str(rng.choice(TASKS, p=TASK_SHARES)), rng)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[Text]) -> dict[str, torch.Tensor]:
    """What the model takes, int64 [B, T], padded on the right; labels are those of the completion and its end."""
    prompts = tokenizer([text.prompt for text in texts]).input_ids
    completions = tokenizer([text.completion for text in texts], add_special_tokens=False).input_ids
    rows = [(p, [*c, tokenizer.eos_token_id]) for p, c in zip(prompts, completions, strict=True)]
    length = max(len(p) + len(c) for p, c in rows)
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), IGNORED)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long(), "labels": labels}


def train_text(
    folder: Path, *, steps: int = 3000, batch: int = 64, seed: int = 6
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Next-token prediction of the completions."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)

    def loss_at(step, generator):
        rng = np.random.default_rng([seed, step])
        inputs = encode(tokenizer, [corpus_text(rng) for _ in range(batch)])
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            return model(**inputs).loss

    fit("text", model, loss_at, folder=folder, steps=steps, learning_rate=3e-3, seed=seed)
    return model.eval(), tokenizer


def save_text(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model's folder with float16 weights, which load as float32."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=0,  # of the model's own distribution; by default transformers samples among 50 tokens
        max_new_tokens=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    load_as_float32(folder / "config.json")
