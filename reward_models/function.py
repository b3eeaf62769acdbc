"""Any Python function as a reward, of pictures or of texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from raftdiff.errors import ConfigError
from raftdiff.protocols import Modality
from raftdiff.types import Sample

from . import images


class FunctionReward:
    """Whatever a Python function `f(outputs, prompts)` returns, one number a sample.

    The function gets what the model made, a list of PIL images in mode RGB or of completions, and the list of their
    prompts, both of the same length, and returns as many numbers: a sequence, a NumPy array or a tensor of one axis.
    None and NaN mean that a sample could not be judged.

    >>> red = FunctionReward(lambda images, prompts: [image.getpixel((0, 0))[0] for image in images], "redness")
    >>> brief = FunctionReward(lambda texts, prompts: [-len(text) for text in texts], "brief")
    """

    modality: Modality | None = None

    def __init__(self, function: Callable[[list[Any], list[str]], Any], name: str):
        self.name = name
        self._function = function

    def score(self, samples: Sequence[Sample]) -> torch.Tensor:
        """float32 [B].

        Raises:
            ConfigError: the function returned something else than one number a sample.
        """
        outputs = [images.pil(s) if s.text is None else s.text for s in samples]
        returned = self._function(outputs, [s.prompt.text for s in samples])
        values = self._numbers(returned)
        if values.shape != (len(samples),):
            shape = "x".join(map(str, values.shape)) or "a single number"
            raise ConfigError(
                f"reward {self.name!r}: its function returned {shape} for {len(samples)} samples;"
                " it must return one number for each"
            )
        return values

    def _numbers(self, returned: Any) -> torch.Tensor:
        try:
            if isinstance(returned, torch.Tensor):
                return returned.detach().to("cpu", torch.float32)
            if isinstance(returned, (list, tuple)):
                returned = [math.nan if value is None else float(value) for value in returned]
            return torch.as_tensor(returned, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"reward {self.name!r}: its function returned {type(returned).__name__} that does not read as numbers"
                f" ({error}); it must return one number for each sample"
            ) from error
