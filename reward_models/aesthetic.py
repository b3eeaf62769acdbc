"""Aesthetic predictors on CLIP embeddings: LAION's first (linear) and second ("improved", an MLP without activations).

https://github.com/LAION-AI/aesthetic-predictor, https://github.com/christophschuhmann/improved-aesthetic-predictor
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from raftdiff.config import Dtype
from raftdiff.errors import WeightsError
from raftdiff.protocols import Modality
from raftdiff.shapes import WEIGHTS
from raftdiff.types import Sample

from . import images
from .encoders import clip_encoder
from .pretrained import read_tensors

_V1 = {"weight", "bias"}
_V2_LAYERS = (0, 2, 4, 6, 7)  # between them the published module has only dropout
_V2 = {f"layers.{layer}.{part}" for layer in _V2_LAYERS for part in ("weight", "bias")}


@dataclass(frozen=True, kw_only=True)
class AestheticHead:
    """A rating as a linear function of an L2-normalised CLIP embedding."""

    weight_D: torch.Tensor
    bias: torch.Tensor

    def __call__(self, embedding_BD: torch.Tensor) -> torch.Tensor:
        """float32 [B] from float32 [B, D]."""
        return embedding_BD @ self.weight_D + self.bias

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor], source: str) -> AestheticHead:
        """From the published tensors of either version. The second has no activations between its layers, so their
        product is one linear function too; it is taken in float64.

        Raises:
            WeightsError: other names or shapes than either version has; `source` names the file in the message.
        """
        if set(state) == _V1:
            layers = [(state["weight"], state["bias"])]
        elif set(state) == _V2:
            layers = [(state[f"layers.{layer}.weight"], state[f"layers.{layer}.bias"]) for layer in _V2_LAYERS]
        else:
            raise WeightsError(
                f"{source} is no aesthetic head: it holds {', '.join(sorted(state)[:12]) or 'nothing'}; expected weight"
                " and bias (LAION v1) or layers.0 to layers.7 (v2)"
            )
        weight, bias = layers[0][0].double(), layers[0][1].double()
        try:
            for next_weight, next_bias in layers[1:]:
                weight, bias = next_weight.double() @ weight, next_weight.double() @ bias + next_bias.double()
            (weight_D,), (bias_one,) = weight, bias
        except (RuntimeError, ValueError, TypeError) as error:
            shapes = ", ".join(f"{list(w.shape)}+{list(b.shape)}" for w, b in layers)
            raise WeightsError(f"{source} is no aesthetic head: its layers {shapes} do not give one number") from error
        return cls(weight_D=weight_D.float(), bias=bias_one.float())


def load_head(path: Path) -> AestheticHead:
    """Read a head, .safetensors or a published pickle (.pth, .pt, .bin).

    A pickle is opened once, restricted to tensors, and kept as `NAME.safetensors` beside it or, where that folder is
    read-only, in the user's cache folder; later loads read that as long as the pickle is unchanged.

    Raises:
        WeightsError: the file is missing, unreadable, or holds no aesthetic head.
    """
    if not path.is_file():
        raise WeightsError(f"no aesthetic head at {path}; download LAION's weights there, or set `head` to the file")
    state = read_tensors(path, "aesthetic head") if path.suffix == ".safetensors" else _read_pickle(path)
    return AestheticHead.from_state(state, str(path))


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise WeightsError(f"cannot read the aesthetic head {path}: {error.strerror}") from error
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raftdiff" / "heads"
    copies = [path.with_name(f"{path.name}.safetensors"), cache / f"{digest[:16]}.safetensors"]
    for copy in copies:
        state = _converted(copy, digest)
        if state is not None:
            return state
    state = {name: tensor.contiguous() for name, tensor in read_tensors(path, "aesthetic head").items()}
    data = save(state, metadata={"source_sha256": digest})
    for copy in copies:
        try:
            _write(copy, data)
            break
        except OSError:  # a read-only folder: try the next; without any the pickle is read again next time
            continue
    return state


def _converted(copy: Path, digest: str) -> dict[str, torch.Tensor] | None:
    """The tensors of an earlier conversion of the pickle with this digest, or None."""
    if not copy.is_file():
        return None
    try:
        with safe_open(copy, "pt") as file:
            if (file.metadata() or {}).get("source_sha256") != digest:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return None


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as staged:
        try:
            staged.write(data)
            staged.flush()
            os.fsync(staged.fileno())
            os.replace(staged.name, path)
        except OSError:
            os.unlink(staged.name)
            raise


class AestheticReward:
    """How well the picture would be rated, about 1 to 10, by an aesthetic head of LAION's on a CLIP embedding.

    The prompt is not read. A head fits only the CLIP that it was trained on: the second version, and the first for
    ViT-L/14, on OpenAI's ViT-L/14.
    """

    modality: Modality = "image"

    def __init__(
        self,
        head: str | Path,
        model: str | Path = "ViT-L-14-quickgelu",
        pretrained: str | Path | None = "openai",
        *,
        revision: str | None = None,
        device: str = "cpu",
        dtype: Dtype = "fp32",
        batch_size: int = 32,
        name: str = "aesthetic",
    ) -> None:
        """`head` is a file (see `load_head`), or `shapes`, the embedded world's; the rest is as for `ClipReward`, with
        which the encoder is shared.

        Raises:
            ConfigError: an unknown model name or dtype.
            WeightsError: the head or the CLIP cannot be loaded, or they do not fit each other.
        """
        self.name = name
        path = WEIGHTS / "aesthetic" / "aesthetic.safetensors" if head == "shapes" else Path(head).expanduser()
        self._head = load_head(path)
        self.encoder = clip_encoder(model, pretrained, revision=revision, device=device, dtype=dtype)
        self.weights_from = f"{path} on {self.encoder.origin}"
        width = len(self._head.weight_D)
        if width != self.encoder.width:
            raise WeightsError(
                f"the aesthetic head {path} reads embeddings of {width} numbers, {model} gives {self.encoder.width};"
                " use the CLIP that the head was trained on"
            )
        self._batch_size = batch_size

    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B]."""
        if not samples:
            return torch.empty(0)
        return self._head(self.encoder.image_features([images.pixels(s) for s in samples], batch_size=self._batch_size))
