"""Plain statistics of a picture, which need no model: rewards to try things out with, and what the sentinel of a run
watches. A picture is uint8 [3, height, width]."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

_LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R BT.601, as in a JPEG
_LAPLACIAN = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]).view(1, 1, 3, 3)
_SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
_SOBELS = torch.stack([_SOBEL, _SOBEL.T])[:, None]
EDGE = 32  # levels of luma from one pixel to the next
LEAST_FREQUENCY = 0.125  # cycles a pixel: grids repeat after 8 pixels or fewer


def luma(image: torch.Tensor) -> torch.Tensor:
    """Brightness, 0 to 255, float32 [height, width]."""
    return (image * _LUMA).sum(dim=0)


def sharpness(image: torch.Tensor) -> float:
    """The variance of the Laplacian of the luma (0 to 255), 0 or more: low where a picture is blurred (Pech-Pacheco et
    al. 2000). At least 3 pixels in either direction."""
    return float(F.conv2d(luma(image)[None, None], _LAPLACIAN).var(correction=0))


def saturation(image: torch.Tensor) -> float:
    """The mean saturation of HSV, (largest - smallest channel) / largest, 0 for grays to 1 for pure colors."""
    largest, smallest = image.amax(dim=0).float(), image.amin(dim=0).float()
    return float(((largest - smallest) / largest.clamp(min=1)).mean())


def color_entropy(image: torch.Tensor) -> float:
    """The entropy in bits of the colors, each channel in 8 levels: 0 for a single color to 9 for all 512 alike."""
    red, green, blue = image.long() // 32
    share = torch.bincount((red * 64 + green * 8 + blue).flatten(), minlength=512) / image[0].numel()
    return float(torch.special.entr(share.double()).sum() / torch.log(torch.tensor(2.0)))


def edge_density(image: torch.Tensor) -> float:
    """The share of pixels, 0 to 1, at which the luma changes by more than `EDGE` a pixel (Sobel). At least 3 pixels in
    either direction."""
    gradient = F.conv2d(luma(image)[None, None], _SOBELS).square().sum(dim=1).sqrt()
    return float((gradient > EDGE).float().mean())


def grid_energy(image: torch.Tensor) -> float:
    """How much of the fine detail repeats like a grid, 0 to 1: of the energy of the luma's spectrum at frequencies from
    `LEAST_FREQUENCY` on, the share of the strongest one (and of its mirror image, which a real signal has). 0 for a
    picture without fine detail."""
    values = luma(image).double()
    rows, columns = (torch.fft.fftfreq(size, dtype=torch.float64) for size in values.shape)
    fine = (rows[:, None].square() + columns.square()).sqrt() >= LEAST_FREQUENCY
    energy = torch.fft.fft2(values).abs().square()[fine]
    total = float(energy.sum())
    return float(energy.topk(2).values.sum()) / total if total > 1e-6 * values.numel() else 0.0


STATISTICS: Mapping[str, Callable[[torch.Tensor], float]] = {
    "sharpness": sharpness,
    "saturation": saturation,
    "color-entropy": color_entropy,
    "edge-density": edge_density,
    "grid-energy": grid_energy,
}
