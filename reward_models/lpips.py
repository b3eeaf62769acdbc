"""LPIPS: how far apart two pictures are to people, by the features of AlexNet (Zhang et al. 2018, arXiv:1801.03924).

    d(x, y) = sum over layers l of mean over positions p of sum over channels c of w_lc (x_lpc - y_lpc)^2

with the features x_lp after each ReLU scaled to length 1 over the channels, and weights w fitted to people's judgments.
As w is not negative, it is the squared distance of the vectors sqrt(w_lc / positions) x_lpc, which are made once for
each picture. It is version 0.1, at the pictures' own size. The published code adds 1e-10 to the lengths it divides by.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.models import alexnet

from raftdiff.errors import ConfigError, WeightsError
from raftdiff.types import Sample

from . import images
from .pretrained import one_line, published_file, read_tensors

BACKBONE = "alexnet-owt-7be5be79.pth"
HEADS = "alex.pth"
LEAST_SIDE = 32  # pixels; the features of smaller pictures have no positions left
BATCH = 8
_SHIFT = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
_SCALE = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)


class Lpips:
    """Pictures to vectors whose squared distance is LPIPS."""

    metric = "squared"

    def __init__(self, folder: str | Path, *, device: str = "cpu") -> None:
        """`folder` holds `BACKBONE` (torchvision's) and `HEADS` (of the package lpips, weights/v0.1), as published.

        Raises:
            WeightsError: one of them is missing, or another file.
        """
        backbone, heads = published_file(folder, BACKBONE), published_file(folder, HEADS)
        self.weights_from = " and ".join(f"{path} (sha256 {_sha256(path)[:16]})" for path in (backbone, heads))
        with torch.device("meta"):
            self._features = alexnet(weights=None).features[:-1]  # without the pooling behind the last ReLU
        state = {k.removeprefix("features."): v for k, v in read_tensors(backbone).items() if "features." in k}
        try:
            self._features.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise WeightsError(f"{backbone} is not torchvision's AlexNet: {one_line(error)}") from error
        self._features.to(device).eval().requires_grad_(False)
        widths = [layer.out_channels for layer in self._features if isinstance(layer, torch.nn.Conv2d)]
        self._weights = [weight.to(device) for weight in _heads(read_tensors(heads), heads, widths)]
        self._device = device

    def __call__(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B, D] on the CPU, of pictures of one size.

        Raises:
            ConfigError: they are too small.
        """
        pixels_B = torch.stack([images.pixels(sample) for sample in samples])
        if min(pixels_B.shape[-2:]) < LEAST_SIDE:
            raise ConfigError(f"LPIPS takes pictures of at least {LEAST_SIDE} pixels: leave out evaluation.lpips")
        return torch.cat([torch.cat(list(self._layers(batch)), dim=1).cpu() for batch in pixels_B.split(BATCH)])

    def _layers(self, pixels_B: torch.Tensor) -> Iterator[torch.Tensor]:
        """The part of each layer, float32 [B, D_l]."""
        x, weights = (pixels_B / 127.5 - 1 - _SHIFT) / _SCALE, iter(self._weights)
        x = x.to(self._device)
        for layer in self._features:
            x = layer(x)
            if isinstance(layer, torch.nn.ReLU):
                positions = x.shape[-2] * x.shape[-1]
                yield (F.normalize(x, dim=1, eps=1e-10) * (next(weights) / positions).sqrt()).flatten(1)


def _heads(state: Mapping[str, torch.Tensor], path: Path, widths: Sequence[int]) -> list[torch.Tensor]:
    """The weights of each layer's channels, [C, 1, 1]."""
    found = [state.get(f"lin{layer}.model.1.weight", torch.empty(0)) for layer in range(len(widths))]
    if [list(weight.shape) for weight in found] != [[1, width, 1, 1] for width in widths]:
        raise WeightsError(
            f"{path} holds other weights than those of LPIPS for AlexNet; take weights/v0.1/alex.pth of lpips"
        )
    if any(weight.min() < 0 for weight in found):
        raise WeightsError(f"{path} holds negative weights, and those of LPIPS are 0 or more")
    return [weight[0] for weight in found]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
