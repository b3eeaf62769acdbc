"""CLIP encoders, of open_clip or of transformers: pictures and prompts as vectors of one space (Radford et al. 2021,
arXiv:2103.00020)."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
import torch.nn.functional as F
from PIL.Image import Resampling
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms
from transformers import AutoImageProcessor, CLIPModel

from raftdiff.config import Dtype
from raftdiff.errors import ConfigError, WeightsError
from raftdiff.registry import nearest
from raftdiff.shapes import WEIGHTS

from .pretrained import is_hub_id, load_model, load_tokenizer, one_line, origin, read, torch_dtype

REMEMBERED = 65_536  # embeddings of prompts, and of pictures, that an encoder keeps; the oldest go first


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From the pixels of a picture to what a model sees, the same on every device: on the CPU and in uint8, the
    shortest side is resized to the model's size (antialiased) and the center is cropped out, then the pixels are
    normalised by the model's mean and deviation. A picture that has the model's size already is not resized."""

    height: int
    width: int
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: InterpolationMode = InterpolationMode.BICUBIC
    squash: bool = False
    """Whether both sides are resized to the model's instead, without regard to proportions."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """float32 [3, height, width] of the model, from a picture, uint8 [3, any, any]."""
        size = [self.height, self.width]
        if list(image.shape[-2:]) != size:
            image = transforms.resize(image, self._target(image), self.interpolation, antialias=True)
            image = transforms.center_crop(image, size)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (image.float() / 255 - mean) / std

    def _target(self, image: torch.Tensor) -> list[int]:
        if self.squash:
            return [self.height, self.width]
        if self.height == self.width:
            return [self.height]  # torchvision: of the shortest side
        factor = max(self.height / image.shape[-2], self.width / image.shape[-1])
        return [round(side * factor) for side in image.shape[-2:]]


class ClipEncoder(ABC):
    """L2-normalised embeddings of pictures and prompts. Get one from `clip_encoder`, which loads each only once."""

    preprocess: Preprocessing
    origin: str
    """Where the weights come from: what `model` named, with the commit where a hub gave it."""

    def __init__(self, device: str, dtype: Dtype) -> None:
        self._device, self._dtype = torch.device(device), torch_dtype(dtype)
        self._text_embeddings: dict[str, torch.Tensor] = {}
        self._image_embeddings: dict[bytes, torch.Tensor] = {}

    @abstractmethod
    def _encode_images(self, x: torch.Tensor) -> torch.Tensor:
        """[B, D] of preprocessed pictures on the model's device and in its dtype."""

    @abstractmethod
    def _encode_texts(self, texts: list[str]) -> torch.Tensor:
        """[B, D]; what exceeds the model's context is cut off."""

    @property
    @abstractmethod
    def logit_scale(self) -> float:
        """What the model multiplies cosines with."""

    @cached_property
    def width(self) -> int:
        """D, the numbers in an embedding."""
        black = torch.zeros(3, self.preprocess.height, self.preprocess.width, dtype=torch.uint8)
        return self.image_features([black]).shape[1]

    @torch.no_grad()
    def image_features(self, pictures: Sequence[torch.Tensor] | torch.Tensor, *, batch_size: int = 32) -> torch.Tensor:
        """float32 [B, D] on the CPU, of uint8 pictures [B, 3, height, width] (in a list, of any sizes). Rewards that
        share the encoder share its work too: a picture that was just encoded is not encoded again."""

        def encode(index: Sequence[int]) -> torch.Tensor:
            x = torch.stack([self.preprocess(pictures[i]) for i in index])
            return _normalized(self._encode_images(x.to(self._device, self._dtype)))

        keys = [hashlib.blake2b(f"{p.shape}".encode() + p.cpu().numpy().tobytes()).digest() for p in pictures]
        return _remembered(self._image_embeddings, keys, encode, batch_size)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str], *, batch_size: int = 32) -> torch.Tensor:
        """float32 [B, D] on the CPU. A prompt is encoded once and then remembered; what exceeds the model's context
        is cut off."""

        def encode(index: Sequence[int]) -> torch.Tensor:
            return _normalized(self._encode_texts([texts[i] for i in index]))

        return _remembered(self._text_embeddings, texts, encode, batch_size)


def _normalized(features: torch.Tensor) -> torch.Tensor:
    return F.normalize(features.float(), dim=-1).cpu()


def _remembered(
    memory: dict[Any, torch.Tensor], keys: Sequence[Any], encode: Callable[[Sequence[int]], torch.Tensor], size: int
) -> torch.Tensor:
    """Rows [B, D] by key, from `memory` or from `encode`, which gets the places of up to `size` new keys at once."""
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    found = {key: memory[key] for key in first if key in memory}
    new = [key for key in dict.fromkeys(keys) if key not in found]
    for start in range(0, len(new), size):
        part = new[start : start + size]
        found.update(zip(part, encode([first[key] for key in part]), strict=True))
    memory |= found
    while len(memory) > REMEMBERED:
        del memory[next(iter(memory))]
    return torch.stack([found[key] for key in keys])


class OpenClipEncoder(ClipEncoder):
    """A CLIP of open_clip, preprocessed as its own configuration asks for."""

    def __init__(self, model: str, pretrained: str | None, *, device: str, dtype: Dtype) -> None:
        super().__init__(device, dtype)
        _check_open_clip(model, pretrained)
        self.origin = f"{model} ({pretrained})" if pretrained else model
        try:
            self.model = open_clip.create_model(
                model, pretrained, precision=dtype, device=device, require_pretrained=True
            ).eval()
            self._tokenizer = open_clip.get_tokenizer(model)
        except Exception as error:  # open_clip, the hub and torch each raise their own
            weights = f"{model} with pretrained {pretrained!r}" if pretrained else model
            raise WeightsError(
                f"cannot load the CLIP model {weights}: {one_line(error)}; give a model and a `pretrained` tag of"
                " open_clip.list_pretrained(), a weights file made for this model, a folder in open_clip's or"
                " transformers' format, or a hub id"
            ) from error
        self.model.requires_grad_(False)
        config = cast(dict[str, Any], open_clip.get_model_preprocess_cfg(self.model))
        if config["resize_mode"] not in ("shortest", "squash"):
            raise ConfigError(f"{model} wants resize_mode {config['resize_mode']!r}; known are shortest and squash")
        size = config["size"]
        height, width = (size, size) if isinstance(size, int) else size
        self.preprocess = Preprocessing(
            height=height,
            width=width,
            mean=config["mean"],
            std=config["std"],
            interpolation=InterpolationMode(config["interpolation"]),
            squash=config["resize_mode"] == "squash",
        )

    @property
    def logit_scale(self) -> float:
        return self.model.logit_scale.exp().item()

    def _encode_images(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(x)

    def _encode_texts(self, texts: list[str]) -> torch.Tensor:
        return self.model.encode_text(self._tokenizer(texts).to(self._device))


class TransformersClipEncoder(ClipEncoder):
    """A CLIP in the format of transformers, preprocessed as the configuration of its image processor asks for."""

    def __init__(self, model: str, *, processor: str | None, revision: str | None, device: str, dtype: Dtype) -> None:
        super().__init__(device, dtype)
        self.model = load_model(CLIPModel, model, revision=revision, device=device, dtype=dtype)
        self.origin = origin(model, getattr(self.model.config, "_commit_hash", None))
        place = processor or model
        own_revision = None if processor else revision
        words = self.model.config.text_config.vocab_size
        self._tokenizer = load_tokenizer(place, embeddings=words, revision=own_revision)
        self.preprocess = _of_processor(read(AutoImageProcessor, place, revision=own_revision), place)
        seen = self.model.config.vision_config.image_size
        if self.preprocess.height != seen or self.preprocess.width != seen:
            raise WeightsError(
                f"the image processor of {place} gives {self.preprocess.height}x{self.preprocess.width} pixels, and"
                f" {model} reads {seen}x{seen}; name the processor that belongs to it"
            )

    @property
    def logit_scale(self) -> float:
        return self.model.logit_scale.exp().item()

    def _encode_images(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(x).pooler_output

    def _encode_texts(self, texts: list[str]) -> torch.Tensor:
        context = self.model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=context, return_tensors="pt")
        tokens = {name: tokens[name].to(self._device) for name in ("input_ids", "attention_mask")}
        return self.model.get_text_features(**tokens).pooler_output


def _of_processor(processor: Any, place: str) -> Preprocessing:
    """What an image processor of transformers is set to, as ours; its own implementations differ from each other."""
    shortest, cropped = processor.size.get("shortest_edge"), processor.crop_size
    if not shortest or not cropped or {cropped["height"], cropped["width"]} != {shortest}:
        raise ConfigError(
            f"the image processor of {place} resizes to {dict(processor.size)} and crops to {cropped}; known is the"
            " shortest side to the size of a square that is then cropped out"
        )
    return Preprocessing(
        height=shortest,
        width=shortest,
        mean=processor.image_mean,
        std=processor.image_std,
        interpolation=InterpolationMode[Resampling(processor.resample).name],
    )


def clip_encoder(
    model: str | Path,
    pretrained: str | Path | None = None,
    *,
    processor: str | Path | None = None,
    revision: str | None = None,
    device: str = "cpu",
    dtype: Dtype = "fp32",
) -> ClipEncoder:
    """The encoder of these weights, loaded once in a process and shared by the rewards that use it.

    Args:
        model: a name of open_clip; a hub id or a folder in the format of transformers; `hf-hub:owner/name` or a folder
            in the format of open_clip; or `shapes`, the embedded world's.
        pretrained: for a name of open_clip, one of its tags or a weights file; not read otherwise.
        processor: for the format of transformers, the hub id or folder of tokenizer and image processor where they do
            not lie beside the weights.
        revision: branch, tag or commit, for a hub id in the format of transformers.

    Raises:
        ConfigError: an unknown model name or dtype.
        WeightsError: weights that are missing or do not fit the model. Never random weights instead.
    """
    torch_dtype(dtype)
    name = str(WEIGHTS / "clip") if model == "shapes" else str(model)
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if name.startswith("hf-hub:"):
        return _open_clip(name, None, device, dtype)
    if name.startswith("local-dir:") or (folder / "open_clip_config.json").is_file():
        return _open_clip(f"local-dir:{folder.resolve()}", None, device, dtype)
    if folder.is_dir() or is_hub_id(name):
        place = str(folder.resolve()) if folder.is_dir() else name
        return _transformers(place, None if processor is None else str(processor), revision, device, dtype)
    weights = None if pretrained is None else Path(pretrained).expanduser()
    return _open_clip(
        name, str(weights.resolve() if weights and weights.is_file() else pretrained or ""), device, dtype
    )


@cache
def _open_clip(model: str, pretrained: str | None, device: str, dtype: Dtype) -> ClipEncoder:
    return OpenClipEncoder(model, pretrained, device=device, dtype=dtype)


@cache
def _transformers(model: str, processor: str | None, revision: str | None, device: str, dtype: Dtype) -> ClipEncoder:
    return TransformersClipEncoder(model, processor=processor, revision=revision, device=device, dtype=dtype)


def _check_open_clip(model: str, pretrained: str | None) -> None:
    """The faults that open_clip words badly."""
    if model.startswith("hf-hub:"):
        return
    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            raise WeightsError(f"no CLIP model at {folder}: there is no open_clip_config.json in it")
        return
    names = open_clip.list_models()
    if model not in names:
        if os.sep in model:
            raise WeightsError(f"no CLIP model at {model}: the folder does not exist")
        raise ConfigError(f"open_clip has no model {model!r}{nearest(model, names)} (open_clip.list_models() has all)")
    if not pretrained:
        raise WeightsError(f"the CLIP model {model} needs weights: set `pretrained` to a tag of open_clip or to a file")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained not in tags and not Path(pretrained).is_file():
        known = ", ".join(tags) or "none"
        raise WeightsError(f"no weights {pretrained!r} for {model}: it is neither a file nor a tag (known: {known})")
