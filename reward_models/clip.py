"""Similarity of picture and prompt by any CLIP that open_clip can load (Radford et al. 2021, arXiv:2103.00020)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast, get_args

import open_clip
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from raftdiff.config import Dtype
from raftdiff.errors import ConfigError, WeightsError
from raftdiff.protocols import Modality
from raftdiff.registry import nearest
from raftdiff.shapes import WEIGHTS
from raftdiff.types import Sample

from . import images

REMEMBERED = 65_536  # embeddings of prompts, and of pictures, that an encoder keeps; the oldest go first
_INPUT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ClipEncoder:
    """A CLIP of open_clip: L2-normalised embeddings of pictures and prompts. Get one from `clip_encoder`, which loads
    each only once.

    Preprocessing is the same on every device: on the CPU and in uint8, the shortest side is resized to the model's
    size (bicubic with antialiasing, or what the model's own configuration asks for), the center is cropped out, then
    the pixels are normalised by the model's mean and deviation. A picture that has the model's size already is not
    resized.
    """

    def __init__(self, model: str, pretrained: str | None, *, device: str, dtype: Dtype) -> None:
        """See `ClipReward`.

        Raises:
            ConfigError: an unknown model name or dtype.
            WeightsError: weights that are missing or do not fit the model.
        """
        if dtype not in _INPUT_DTYPES:
            raise ConfigError(f"dtype of a CLIP model is {dtype!r}; use one of {', '.join(get_args(Dtype))}")
        source = _source(model, pretrained)
        try:
            self.model = open_clip.create_model(
                source, pretrained, precision=dtype, device=device, require_pretrained=True
            ).eval()
            self._tokenizer = open_clip.get_tokenizer(source)
        except Exception as error:  # open_clip, the hub and torch each raise their own
            weights = f"{model} with pretrained {pretrained!r}" if pretrained else model
            raise WeightsError(
                f"cannot load the CLIP model {weights}: {_one_line(error)}; give a model and a `pretrained` tag of"
                " open_clip.list_pretrained(), a weights file made for this model, or a folder in open_clip's format"
            ) from error
        self.model.requires_grad_(False)
        config = cast(dict[str, Any], open_clip.get_model_preprocess_cfg(self.model))
        if config["resize_mode"] not in ("shortest", "squash"):
            raise ConfigError(f"{model} wants resize_mode {config['resize_mode']!r}; known are shortest and squash")
        size = config["size"]
        self._height, self._width = (size, size) if isinstance(size, int) else tuple(size)
        self._squash = config["resize_mode"] == "squash"
        self._interpolation = InterpolationMode(config["interpolation"])
        self._mean, self._std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
        self._device, self._dtype = torch.device(device), _INPUT_DTYPES[dtype]
        self._text_embeddings: dict[str, torch.Tensor] = {}
        self._image_embeddings: dict[bytes, torch.Tensor] = {}

    @cached_property
    def width(self) -> int:
        """D, the numbers in an embedding."""
        return self.image_features([torch.zeros(3, self._height, self._width, dtype=torch.uint8)]).shape[1]

    def preprocess(self, image: torch.Tensor) -> torch.Tensor:
        """What the model sees of a picture, uint8 [3, height, width]: float32 [3, size, size]."""
        size = [self._height, self._width]
        if list(image.shape[-2:]) != size:
            if self._squash:
                target = size
            elif self._height == self._width:
                target = [self._height]  # torchvision: of the shortest side
            else:
                factor = max(self._height / image.shape[-2], self._width / image.shape[-1])
                target = [round(side * factor) for side in image.shape[-2:]]
            image = transforms.resize(image, target, self._interpolation, antialias=True)
            image = transforms.center_crop(image, size)
        return (image.float() / 255 - self._mean) / self._std

    @torch.no_grad()
    def image_features(self, pictures: Sequence[torch.Tensor] | torch.Tensor, *, batch_size: int = 32) -> torch.Tensor:
        """float32 [B, D] on the CPU, of uint8 pictures [B, 3, height, width] (in a list, of any sizes). Rewards that
        share the encoder share its work too: a picture that was just encoded is not encoded again."""

        def encode(index: Sequence[int]) -> torch.Tensor:
            x = torch.stack([self.preprocess(pictures[i]) for i in index])
            return self._normalised(self.model.encode_image(x.to(self._device, self._dtype)))

        keys = [hashlib.blake2b(f"{p.shape}".encode() + p.cpu().numpy().tobytes()).digest() for p in pictures]
        return _remembered(self._image_embeddings, keys, encode, batch_size)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str], *, batch_size: int = 32) -> torch.Tensor:
        """float32 [B, D] on the CPU. A prompt is encoded once and then remembered; what exceeds the model's context
        is cut off."""

        def encode(index: Sequence[int]) -> torch.Tensor:
            tokens = self._tokenizer([texts[i] for i in index])
            return self._normalised(self.model.encode_text(tokens.to(self._device)))

        return _remembered(self._text_embeddings, texts, encode, batch_size)

    @staticmethod
    def _normalised(features: torch.Tensor) -> torch.Tensor:
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


@cache
def clip_encoder(model: str, pretrained: str | None, *, device: str = "cpu", dtype: Dtype = "fp32") -> ClipEncoder:
    """The encoder of these weights, loaded once in a process and shared by the rewards that use it."""
    return ClipEncoder(model, pretrained, device=device, dtype=dtype)


class ClipReward:
    """How well the picture fits its prompt: 100 times the cosine of their embeddings under a CLIP of open_clip.

    HPS v2 is such a model too: `ClipReward("ViT-H-14", "HPS_v2.1_compressed.pt", scale=1.0)`.
    """

    modality: Modality = "image"
    differentiable = False

    def __init__(
        self,
        model: str | Path = "ViT-L-14-quickgelu",
        pretrained: str | Path | None = "openai",
        *,
        device: str = "cpu",
        dtype: Dtype = "fp32",
        batch_size: int = 32,
        scale: float = 100.0,
        name: str = "clip",
    ) -> None:
        """`model` is a name of open_clip, with `pretrained` one of its tags or a weights file; or `hf-hub:owner/name`,
        or a folder in open_clip's format, or `shapes`, the embedded world's: these bring their weights, and
        `pretrained` is not read.

        Raises:
            ConfigError: an unknown model name or dtype.
            WeightsError: weights that are missing or do not fit the model. Never random weights instead.
        """
        self.name = name
        self.encoder = clip_encoder(*encoder_key(model, pretrained), device=device, dtype=dtype)
        self._batch_size = batch_size
        self._scale = scale

    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B], -`scale` to `scale`."""
        if not samples:
            return torch.empty(0)
        image_BD = self.encoder.image_features([images.pixels(s) for s in samples], batch_size=self._batch_size)
        text_BD = self.encoder.text_features([s.prompt.text for s in samples], batch_size=self._batch_size)
        return self._scale * (image_BD * text_BD).sum(dim=-1)


def encoder_key(model: str | Path, pretrained: str | Path | None) -> tuple[str, str | None]:
    """Model and weights in one spelling, so that the same encoder is not loaded twice."""
    model = str(WEIGHTS / "clip") if model == "shapes" else str(model)
    if model.startswith("hf-hub:"):
        return model, None
    folder = Path(model.removeprefix("local-dir:")).expanduser()
    if model.startswith("local-dir:") or folder.is_dir():
        return f"local-dir:{folder.resolve()}", None
    if pretrained is not None and Path(pretrained).expanduser().is_file():
        return model, str(Path(pretrained).expanduser().resolve())
    return model, None if pretrained is None else str(pretrained)


def _source(model: str, pretrained: str | None) -> str:
    """`model`, after the checks whose faults open_clip words badly."""
    if model.startswith("hf-hub:"):
        return model
    if model.startswith("local-dir:"):
        folder = Path(model.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            raise WeightsError(f"no CLIP model at {folder}: there is no open_clip_config.json in it")
        return model
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
    return model


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(error).__name__
