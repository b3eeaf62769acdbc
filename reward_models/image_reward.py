"""ImageReward: how well people would like a picture for its prompt (Xu et al. 2023, arXiv:2304.05977).

A BLIP reads the picture with a vision transformer and the prompt with a BERT that attends to it; a head makes a number
of the first token. Here its parts are those of transformers, filled from the published checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from raftdiff.config import Dtype
from raftdiff.errors import WeightsError
from raftdiff.protocols import Modality
from raftdiff.types import Sample

from . import images
from .encoders import Preprocessing
from .pretrained import commit_of, load_tokenizer, origin, published_file, read_tensors, torch_dtype

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw reward on the authors' data
LONGEST_PROMPT = 35  # tokens, as in the authors' training; the rest is cut off
HEAD_WIDTH = 64  # numbers an attention head has in every published BLIP; the rest is read off the tensors
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks": "encoder.layers",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm": "post_layernorm",
}
_VISION_NAME = re.compile(rf"\b({'|'.join(map(re.escape, _VISION_NAMES))})\b")


class ImageRewardModel(nn.Module):
    """Pictures [B, 3, size, size] and prompts (token ids and mask, [B, T]) to raw rewards, float32 [B]."""

    def __init__(self, state: Mapping[str, torch.Tensor], source: str) -> None:
        """From the published tensors, whose shapes say how large everything is.

        Raises:
            WeightsError: tensors are missing or do not fit each other; `source` names the file in the message.
        """
        super().__init__()
        vision = {
            _VISION_NAME.sub(lambda m: _VISION_NAMES[m[0]], k): v for k, v in _under("blip.visual_encoder.", state)
        }
        text = {k: v for k, v in _under("blip.text_encoder.", state) if k != "embeddings.position_ids"}
        head = dict(_under("mlp.layers.", state))
        try:
            self.vision = BlipVisionModel(_vision_config(vision))
            self.text = BlipTextModel(_text_config(text), add_pooling_layer=False)
            self.head = nn.ModuleDict({i: _linear(head[f"{i}.weight"]) for i in _layers(head)})
            for part, tensors in ((self.vision, vision), (self.text, text)):
                part.load_state_dict(tensors)
            self.head.load_state_dict(head)
            first, last = head["0.weight"], head[f"{_layers(head)[-1]}.weight"]
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
            raise WeightsError(f"{source} is no checkpoint of ImageReward: {reason}") from error
        width = self.text.config.hidden_size
        if first.shape[1] != width or len(last) != 1:
            raise WeightsError(
                f"{source} is no checkpoint of ImageReward: its head makes {len(last)} of {first.shape[1]} numbers, and"
                f" must make 1 of the {width} of its text encoder"
            )

    @property
    def image_size(self) -> int:
        return self.vision.config.image_size

    def forward(self, pixels: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        tokens = self.text(
            input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=self.vision(pixels).last_hidden_state,
            is_decoder=False,
        ).last_hidden_state
        reward = tokens[:, 0].float()
        for layer in self.head.values():  # the published head has no activations, only dropout
            reward = layer(reward)
        return reward[:, 0]


def _linear(weight: torch.Tensor) -> nn.Linear:
    outputs, inputs = weight.shape
    return nn.Linear(inputs, outputs)


def _under(prefix: str, state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((k.removeprefix(prefix), v) for k, v in state.items() if k.startswith(prefix))


def _layers(state: Mapping[str, torch.Tensor], prefix: str = "") -> list[str]:
    """The numbers of the layers whose tensors are called `prefix` and a number, in order."""
    found = {k.removeprefix(prefix).split(".")[0] for k in state if k.startswith(prefix)}
    return sorted(found, key=int)


def _vision_config(state: Mapping[str, torch.Tensor]) -> BlipVisionConfig:
    width, patch = state["embeddings.class_embedding"].shape[-1], state["embeddings.patch_embedding.weight"].shape[-1]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=len(_layers(state, "encoder.layers.")),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch * math.isqrt(state["embeddings.position_embedding"].shape[1] - 1),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def _text_config(state: Mapping[str, torch.Tensor]) -> BlipTextConfig:
    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(state["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=len(_layers(state, "encoder.layer.")),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
        is_decoder=True,  # gives it the layers that attend to the picture
    )


class ImageReward:
    """How well people would like the picture for the prompt: ImageReward, trained on their rankings."""

    modality: Modality = "image"

    def __init__(
        self,
        checkpoint: str | Path = "THUDM/ImageReward",
        *,
        tokenizer: str | Path = "google-bert/bert-base-uncased",
        revision: str | None = None,
        device: str = "cpu",
        dtype: Dtype = "fp32",
        batch_size: int = 32,
        name: str = "image-reward",
    ) -> None:
        """`checkpoint` is the published file `ImageReward.pt`, a folder that holds it, or a hub id with its `revision`;
        `tokenizer` a folder or hub id with that of BERT, which the published repository leaves out.

        Raises:
            ConfigError: an unknown dtype.
            WeightsError: the checkpoint or the tokenizer is missing, or is another model's.
        """
        self.name = name
        self._device, self._dtype = torch.device(device), torch_dtype(dtype)
        path = published_file(checkpoint, "ImageReward.pt", revision)
        self.weights_from = origin(checkpoint, commit_of(path))
        self.model = ImageRewardModel(read_tensors(path), str(path)).to(self._device, self._dtype)
        self.model.eval().requires_grad_(False).head.float()
        self._tokenizer = load_tokenizer(str(tokenizer), embeddings=self.model.text.config.vocab_size)
        size = self.model.image_size
        self.preprocess = Preprocessing(height=size, width=size, mean=_CLIP_MEAN, std=_CLIP_STD)
        self._batch_size = batch_size

    @torch.no_grad()
    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B], about -2 to 2: mean 0 and deviation 1 on the authors' data."""
        batches = [samples[i : i + self._batch_size] for i in range(0, len(samples), self._batch_size)]
        return torch.cat([torch.empty(0), *(self._score(batch) for batch in batches)])

    def _score(self, samples: Sequence[Sample]) -> torch.Tensor:
        pixels = torch.stack([self.preprocess(images.pixels(sample)) for sample in samples])
        tokens = self._tokenizer(
            [sample.prompt.text for sample in samples],
            padding="max_length",
            truncation=True,
            max_length=LONGEST_PROMPT,
            return_tensors="pt",
        ).to(self._device)
        raw = self.model(pixels.to(self._device, self._dtype), tokens.input_ids, tokens.attention_mask)
        return ((raw - MEAN) / STD).cpu()
