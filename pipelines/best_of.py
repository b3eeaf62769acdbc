"""The best of n pictures in place of one: a reward at work without training."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from raftdiff.errors import ConfigError
from raftdiff.protocols import Reward
from raftdiff.types import Prompt, Sample

from .diffusion import BLACK

logger = logging.getLogger(__name__)


class BestOf:
    """A diffusers pipeline that makes n pictures for each one it is asked for and gives the one with the highest
    reward. It is called like the pipeline and gives the pipeline's own output, which also has `rewards`: the reward of
    each picture. Everything else is the pipeline's: `best.scheduler`, `best.load_lora_weights(...)`.

        best = BestOf(pipe, ClipReward(), n=8)
        output = best("a red circle", num_inference_steps=25, generator=torch.Generator().manual_seed(0))
        output.images[0], output.rewards[0]

    `raftdiff.best_of` makes one from the names of rewards and from functions.

    Args:
        pipeline: any text-to-image pipeline.
        reward: sees the pictures that are not flawed (black, or blacked out by a safety checker). A picture none of
            whose candidates has a finite reward is the first candidate, with the reward NaN and a warning.
        n: candidates for each picture, 2 or more.
        batch_size: candidates of a picture in one call of the pipeline: more are faster and take more memory. A list
            of generators takes 1.

    Raises:
        ConfigError: n or batch_size out of range; something that is no reward.
    """

    def __init__(self, pipeline: Any, reward: Reward, n: int, *, batch_size: int = 1):
        check_n(n)
        if batch_size < 1:
            raise ConfigError(f"batch_size of best-of-n is {batch_size}; give 1 or more")
        if not isinstance(reward, Reward):
            raise ConfigError(f"{reward!r} is no Reward; raftdiff.best_of takes names and functions too")
        vars(self).update(pipeline=pipeline, reward=reward, n=n, batch_size=batch_size)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's output, each picture of it the best of n.

        Raises:
            ConfigError: arguments without a prompt or pictures to judge, or with which all n would be the same.
        """
        call = dict(zip(inspect.signature(self.pipeline.__call__).parameters, args, strict=False)) | kwargs
        _check_call(call)
        as_output = call.pop("return_dict", True)
        each = call.pop("num_images_per_prompt", None) or 1
        sizes = [min(self.batch_size, self.n - start) for start in range(0, self.n, self.batch_size)]
        outputs = [self.pipeline(**call | ({"num_images_per_prompt": each * k} if each * k > 1 else {})) for k in sizes]
        prompts = [call["prompt"]] if isinstance(call["prompt"], str) else call["prompt"]
        places = [
            [(output, i * k + j) for output, k in zip(outputs, sizes, strict=True) for j in range(k)]
            for i in range(len(prompts) * each)
        ]
        rewards = self._judge([_sample(prompts[i // each], *drawn) for i, place in enumerate(places) for drawn in place])
        best = [max(range(i * self.n, (i + 1) * self.n), key=lambda k: _rank(rewards[k])) for i in range(len(places))]
        output = _joined([places[k // self.n][k % self.n] for k in best])
        output.rewards = [rewards[k] for k in best]
        if missing := sum(map(math.isnan, output.rewards)):
            logger.warning("%d of %d pictures have no reward; they are the first candidates", missing, len(best))
        return output if as_output else output.to_tuple()

    def to(self, *args: Any, **kwargs: Any) -> BestOf:
        """The pipeline's own `to`; still the best of n."""
        self.pipeline.to(*args, **kwargs)
        return self

    def _judge(self, samples: Sequence[Sample]) -> list[float]:
        """The samples' rewards, NaN for those that are flawed or failed."""
        judged = [i for i, sample in enumerate(samples) if sample.flaw is None]
        rewards = [math.nan] * len(samples)
        values = self.reward.score([samples[i] for i in judged]).tolist() if judged else []
        for i, value in zip(judged, values, strict=True):
            rewards[i] = value if math.isfinite(value) else math.nan
        return rewards

    def __getattr__(self, name: str) -> Any:
        if "pipeline" not in vars(self):  # while it is being copied
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            vars(self)[name] = value
        else:
            setattr(self.pipeline, name, value)


def check_n(n: int) -> None:
    """Raise ConfigError where n is less than 2."""
    if n < 2:
        raise ConfigError(f"the best of {n} is no choice; give 2 candidates or more")


def _check_call(call: dict[str, Any]) -> None:
    if call.get("prompt") is None:
        raise ConfigError("best-of-n judges pictures by their prompts: give `prompt`, not its embeddings")
    if call.get("latents") is not None:
        raise ConfigError("from the same `latents` all candidates would be alike; give a `generator` instead")
    if call.get("output_type") == "latent":
        raise ConfigError("best-of-n judges pictures, not latents: give output_type 'pil', 'np' or 'pt'")


def _rank(reward: float) -> float:
    return -math.inf if math.isnan(reward) else reward


def _sample(prompt: str, output: Any, index: int) -> Sample:
    """One picture of a pipeline's output, as a reward sees it."""
    image = _pixels(output.images[index])
    flaw = "black image" if int(image.max()) <= BLACK else None
    if (getattr(output, "nsfw_content_detected", None) or {index: False})[index]:
        flaw = "blacked out by the safety checker"
    return Sample(id=f"{index}", prompt=Prompt(text=prompt), seed=0, image=image, flaw=flaw)


def _pixels(image: Any) -> torch.Tensor:
    """A PIL image, an array [height, width, 3] or a tensor [3, height, width] of 0 to 1, as uint8 [3, height, width]."""
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    values = image if isinstance(image, torch.Tensor) else torch.from_numpy(image).permute(2, 0, 1)
    return (values.float().nan_to_num() * 255).round().clamp(0, 255).to("cpu", torch.uint8)


def _joined(rows: Sequence[tuple[Any, int]]) -> Any:
    """One output of some rows of others; what has no row for each picture is the first one's."""
    first = rows[0][0]

    def joined(name: str) -> Any:
        value = getattr(first, name)
        if not hasattr(value, "__len__") or len(value) != len(first.images):
            return value
        picked = [getattr(output, name)[index] for output, index in rows]
        stack = torch.stack if isinstance(value, torch.Tensor) else np.stack if isinstance(value, np.ndarray) else list
        return stack(picked)

    return type(first)(**{field.name: joined(field.name) for field in dataclasses.fields(first)})
