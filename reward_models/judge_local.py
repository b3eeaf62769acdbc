"""A judge that runs here: a causal language model, or a vision-language model, of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from raftdiff.config import Dtype
from raftdiff.errors import ConfigError, WeightsError

from .judge import Answer, ModelJudge, Question
from .pretrained import load_model, origin, read


class LocalJudge(ModelJudge):
    """A chat model of transformers on this machine; its log-probabilities of the answers are read off, not sampled."""

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        device: str = "cpu",
        dtype: Dtype = "fp32",
        batch_size: int = 8,
    ) -> None:
        """`model` is a hub id or a folder. A model that sees pictures judges pictures and texts, any other texts alone.
        Without a chat template the question is one text that ends in `Answer:`.

        Raises:
            ConfigError: an unknown dtype.
            WeightsError: the model is missing.
        """
        place = str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else str(model)
        self.sees = hasattr(read(AutoConfig, place, revision=revision), "vision_config")
        kind = AutoModelForImageTextToText if self.sees else AutoModelForCausalLM
        self.model = load_model(kind, place, revision=revision, device=device, dtype=dtype)
        self.weights_from = origin(place, getattr(self.model.config, "_commit_hash", None))
        self._processor: Any = read(AutoProcessor if self.sees else AutoTokenizer, place, revision=revision)
        self._tokenizer: Any = self._processor.tokenizer if self.sees else self._processor
        self._tokenizer.padding_side = "left"  # so that the next token of every question is predicted at the end
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._batch_size = batch_size
        self._known: dict[str, list[int]] = {}

    @torch.no_grad()
    def ask(self, questions: Sequence[Question]) -> list[Answer | None]:
        """The log-probability of each answer as the next token.

        Raises:
            ConfigError: pictures, for a model that cannot see.
        """
        found: list[Answer | None] = []
        for start in range(0, len(questions), self._batch_size):
            batch = questions[start : start + self._batch_size]
            inputs = {name: self._placed(value) for name, value in self._encode(batch).items()}
            log_prob_BV = self.model(**inputs).logits[:, -1].float().log_softmax(dim=-1).cpu()
            for question, log_prob_V in zip(batch, log_prob_BV, strict=True):
                found.append({a: log_prob_V[self._tokens(a)].logsumexp(dim=0).item() for a in question.answers})
        return found

    def _encode(self, questions: Sequence[Question]) -> Any:
        shows = any(not isinstance(part, str) for question in questions for part in question.content)
        if shows and not self.sees:
            raise ConfigError(f"the judge {self.weights_from} reads texts alone; pictures take a vision-language model")
        if not self._processor.chat_template:
            if shows:
                raise ConfigError(f"the judge {self.weights_from} has no chat template, which pictures take")
            texts = [f"{q.rule}\n\n{''.join(map(str, q.content))}\n\nAnswer:" for q in questions]
            return self._tokenizer(texts, padding=True, return_tensors="pt")
        chats = [self._chat(question) for question in questions]
        texts = self._processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        shown = [[part for part in q.content if not isinstance(part, str)] for q in questions]
        pictures = {"images": shown} if shows else {}
        return self._processor(text=texts, **pictures, add_special_tokens=False, padding=True, return_tensors="pt")

    def _placed(self, values: torch.Tensor) -> torch.Tensor:
        dtype = self.model.dtype if values.is_floating_point() else values.dtype
        return values.to(self.model.device, dtype)

    def _chat(self, question: Question) -> list[dict[str, Any]]:
        if not self.sees:
            text = "".join(map(str, question.content))
            return [{"role": "system", "content": question.rule}, {"role": "user", "content": text}]
        parts = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in question.content
        ]
        rule = [{"type": "text", "text": question.rule}]
        return [{"role": "system", "content": rule}, {"role": "user", "content": parts}]

    def _tokens(self, answer: str) -> list[int]:
        """The tokens that are the answer, with and without a space before it."""
        if answer not in self._known:
            spelled = [self._tokenizer.encode(f"{space}{answer}", add_special_tokens=False) for space in ("", " ")]
            tokens = sorted({ids[0] for ids in spelled if len(ids) == 1} - {self._tokenizer.unk_token_id})
            if not tokens:
                raise WeightsError(
                    f"the tokenizer of {self.weights_from} has no token for {answer!r}; take another judge"
                )
            self._known[answer] = tokens
        return self._known[answer]
