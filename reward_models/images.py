"""The picture of a sample, in the forms that scorers take."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from raftdiff.errors import DataError
from raftdiff.types import Sample


def pixels(sample: Sample) -> torch.Tensor:
    """uint8 [3, height, width].

    Raises:
        DataError: the sample holds no image.
    """
    if sample.image is None:
        raise DataError(f"sample {sample.id} holds no image; this reward judges images")
    return sample.image


def array(sample: Sample) -> np.ndarray:
    """uint8 [height, width, 3]."""
    return pixels(sample).permute(1, 2, 0).contiguous().numpy()


def pil(sample: Sample) -> Image.Image:
    """In mode RGB."""
    return Image.fromarray(array(sample))
