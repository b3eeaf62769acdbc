"""Plain statistics of a picture, as rewards that need no model: to try things out, and to watch what a run changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raftdiff.errors import ConfigError
from raftdiff.picture_statistics import STATISTICS
from raftdiff.protocols import Modality
from raftdiff.registry import nearest
from raftdiff.types import Sample

from . import images


class ImageStatsReward:
    """A plain statistic of the picture: sharpness, saturation, entropy of colors, share of edges, or grid energy."""

    modality: Modality = "image"

    def __init__(self, metric: str, *, name: str | None = None) -> None:
        """Raises ConfigError for an unknown `metric`; raftdiff/picture_statistics.py says what they measure. A negative
        weight rewards the opposite."""
        if metric not in STATISTICS:
            raise ConfigError(
                f"metric of the image-stats reward is {metric!r}{nearest(metric, STATISTICS)} (there are"
                f" {', '.join(STATISTICS)})"
            )
        self.name = name or metric
        self._metric = STATISTICS[metric]

    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B], in the metric's own units."""
        return torch.tensor([self._metric(images.pixels(sample)) for sample in samples], dtype=torch.float32)
