"""Reward models for text: any model for sequence classification of transformers, most of them trained on preferences
(Bradley and Terry), with a single output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForSequenceClassification

from raftdiff.config import Dtype
from raftdiff.errors import ConfigError
from raftdiff.protocols import Modality
from raftdiff.registry import check_choice, nearest
from raftdiff.types import Sample

from .pretrained import load_model, load_tokenizer, origin
from .texts import completion

Layout = Literal["chat", "pair", "joined", "completion"]


class RewardModel:
    """What a reward model of transformers says of the text: any model for sequence classification, by hub id or folder.

    The prompt and the completion go through the tokenizer's chat template where it has one, as a pair where the
    tokenizer separates two texts (BERT's do), and else as one text, the completion right behind the prompt.
    """

    modality: Modality = "text"

    def __init__(
        self,
        model: str | Path,
        *,
        label: str | None = None,
        layout: Layout | None = None,
        max_length: int | None = None,
        revision: str | None = None,
        device: str = "cpu",
        dtype: Dtype = "fp32",
        batch_size: int = 16,
        name: str = "reward-model",
    ) -> None:
        """A model with one label gives its output. One with several needs `label`, whose probability is the reward.

        Args:
            layout: how prompt and completion are put together, where the default (above) is not what the model was
                trained on; `completion` leaves the prompt out.
            max_length: tokens of both; what is longer loses its beginning. The model's own limit if absent.

        Raises:
            ConfigError: an unknown layout, label or dtype, or several labels and no `label`.
            WeightsError: the model is missing or has no trained head.
        """
        place = str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else str(model)
        self.name = name
        self.model = load_model(
            AutoModelForSequenceClassification, place, revision=revision, device=device, dtype=dtype
        )
        self.weights_from = origin(place, getattr(self.model.config, "_commit_hash", None))
        self._label = _output(self.model.config.id2label, label, place)
        text_config = self.model.config.get_text_config()
        self._tokenizer = load_tokenizer(
            place,
            embeddings=text_config.vocab_size,
            revision=revision,
            padding_side="right",
            truncation_side="left",
        )
        self._layout = self._checked(layout, place)
        if self._tokenizer.pad_token_id is None:
            own = text_config.pad_token_id
            self._tokenizer.pad_token_id = self._tokenizer.eos_token_id if own is None else own
        text_config.pad_token_id = self._tokenizer.pad_token_id  # decoders read the last token that is not this one
        positions = getattr(text_config, "max_position_embeddings", None) or self._tokenizer.model_max_length
        self._max_length = max_length or min(self._tokenizer.model_max_length, positions)
        self._batch_size = batch_size

    def _checked(self, layout: Layout | None, place: str) -> Layout:
        if layout is None:
            return "chat" if self._tokenizer.chat_template else "pair" if self._tokenizer.sep_token else "joined"
        check_choice("layout of the reward model", layout, Layout)
        if layout == "chat" and not self._tokenizer.chat_template:
            raise ConfigError(
                f"layout of the reward model is 'chat', and the tokenizer of {place} has no chat template"
            )
        return layout

    @torch.no_grad()
    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B], the model's own scale, or with `label` 0 to 1."""
        return self.values(samples).cpu() if samples else torch.empty(0)

    def values(self, samples: Sequence[Sample]) -> torch.Tensor:
        """What `score` gives of one sample or more, on the model's device and with gradients to its parameters."""
        encoded = [self._encode(sample) for sample in samples]
        by_length = sorted(range(len(samples)), key=lambda i: len(encoded[i]["input_ids"]))
        parts = []
        for start in range(0, len(samples), self._batch_size):  # of like lengths, so that little is padding
            batch = [encoded[i] for i in by_length[start : start + self._batch_size]]
            inputs = self._tokenizer.pad(batch, return_tensors="pt").to(self.model.device)
            parts.append(self._value(self.model(**inputs).logits.float()))
        return torch.cat(parts)[torch.tensor(by_length).argsort()]

    def _value(self, logit_BL: torch.Tensor) -> torch.Tensor:
        if self._label is None:
            return logit_BL[:, 0]
        several = self.model.config.problem_type == "multi_label_classification"
        return (logit_BL.sigmoid() if several else logit_BL.softmax(dim=-1))[:, self._label]

    def _encode(self, sample: Sample) -> dict[str, list[int]]:
        prompt, text = sample.prompt.text, completion(sample)
        limits = {"truncation": True, "max_length": self._max_length}
        match self._layout:
            case "chat":
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
                chat = self._tokenizer.apply_chat_template(turns, tokenize=False)
                return dict(self._tokenizer(chat, add_special_tokens=False, **limits))  # the template has written them
            case "pair":
                return dict(self._tokenizer(prompt, text, **limits))
            case "joined":
                return dict(self._tokenizer(prompt + text, **limits))
            case "completion":
                return dict(self._tokenizer(text, **limits))


def _output(names: dict[int, str], label: str | None, place: str) -> int | None:
    """The place of `label` among the outputs, or None where there is one output alone."""
    listing = ", ".join(names.values())
    if label is None and len(names) > 1:
        raise ConfigError(
            f"{place} has {len(names)} labels ({listing}), and a reward is one number: set `label` to the one whose"
            " probability it shall be, or take a model with one label"
        )
    if label is None:
        return None
    if len(names) == 1:
        raise ConfigError(f"{place} has one output, which is the reward: leave `label` out")
    found = [i for i, name in names.items() if name == label]
    if not found:
        raise ConfigError(f"{place} has no label {label!r}{nearest(label, names.values())} (it has {listing})")
    return found[0]
