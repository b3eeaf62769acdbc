"""The best of n pictures in place of one: a reward at work without training."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image

from raftdiff.errors import ConfigError
from raftdiff.protocols import Reward
from raftdiff.types import Prompt, Sample

from .diffusion import flaw_of

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
        rows = self._draw(call)
        rewards = self._judge(rows)
        best = [_best(reward_K) for reward_K in rewards]
        output = _joined([row[k] for row, k in zip(rows, best, strict=True)])
        output.rewards = [reward_K[k] for reward_K, k in zip(rewards, best, strict=True)]
        if missing := sum(map(math.isnan, output.rewards)):
            logger.warning("%d of %d pictures have no reward; they are the first candidates", missing, len(best))
        return output if as_output else tuple(getattr(output, field.name) for field in fields(output))

    def to(self, *args: Any, **kwargs: Any) -> BestOf:
        """The pipeline's own `to`; still the best of n."""
        self.pipeline.to(*args, **kwargs)
        return self

    def _draw(self, call: dict[str, Any]) -> list[list[_Candidate]]:
        """The n candidates for each picture of the output."""
        prompts = [call["prompt"]] if isinstance(call["prompt"], str) else call["prompt"]
        each = call.pop("num_images_per_prompt", None) or 1
        rows: list[list[_Candidate]] = [[] for _ in range(len(prompts) * each)]
        while len(rows[0]) < self.n:
            at_once = min(self.batch_size, self.n - len(rows[0]))
            if each * self.batch_size > 1:  # not every pipeline has this argument
                call["num_images_per_prompt"] = each * at_once
            output = self.pipeline(**call)
            for i, row in enumerate(rows):
                row += [_Candidate(prompts[i // each], output, i * at_once + k) for k in range(at_once)]
        return rows

    def _judge(self, rows: Sequence[Sequence[_Candidate]]) -> list[list[float]]:
        """The candidates' rewards, NaN for those that are flawed or failed."""
        samples = [candidate.sample() for row in rows for candidate in row]
        judged = [sample for sample in samples if sample.flaw is None]
        values = iter(_finite(self.reward.score(judged).tolist()) if judged else [])
        rewards = [next(values) if sample.flaw is None else math.nan for sample in samples]
        return [rewards[start : start + self.n] for start in range(0, len(rewards), self.n)]

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


def _finite(values: Sequence[float]) -> list[float]:
    return [value if math.isfinite(value) else math.nan for value in values]


def _best(reward_K: Sequence[float]) -> int:
    """The index of the highest reward, the first of equal ones; NaN is lower than any."""
    return max(range(len(reward_K)), key=lambda k: -math.inf if math.isnan(reward_K[k]) else reward_K[k])


@dataclass(frozen=True)
class _Candidate:
    """One picture of an output of the pipeline."""

    prompt: str
    output: Any
    index: int

    def sample(self) -> Sample:
        """As a reward sees it."""
        image = _pixels(self.output.images[self.index])
        unsafe = getattr(self.output, "nsfw_content_detected", None)
        flaw = flaw_of(image, unsafe=bool(unsafe and unsafe[self.index]))
        return Sample(id=str(self.index), prompt=Prompt(text=self.prompt), seed=0, image=image, flaw=flaw)


def _pixels(image: Any) -> torch.Tensor:
    """uint8 [3, height, width] from a PIL image, or from an array [height, width, 3] or tensor [3, height, width] of
    0 to 1."""
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    values = image if isinstance(image, torch.Tensor) else torch.from_numpy(image).permute(2, 0, 1)
    return (values.float().nan_to_num() * 255).round().clamp(0, 255).to("cpu", torch.uint8)


def _joined(chosen: Sequence[_Candidate]) -> Any:
    """The chosen pictures in one output; what is not a value for each picture is that of the first."""
    first = chosen[0].output

    def joined(name: str) -> Any:
        value = getattr(first, name)
        if not hasattr(value, "__len__") or len(value) != len(first.images):
            return value
        picked = [getattr(candidate.output, name)[candidate.index] for candidate in chosen]
        stack = torch.stack if isinstance(value, torch.Tensor) else np.stack if isinstance(value, np.ndarray) else list
        return stack(picked)

    return type(first)(**{field.name: joined(field.name) for field in fields(first)})
