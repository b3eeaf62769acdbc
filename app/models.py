"""The models that the app draws with: one pipeline, loaded once, whose adapters are switched and mixed in place."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from diffusers.utils import set_adapter_layers, set_weights_and_activate_adapters
from PIL import Image

from raftdiff.batches import Batches
from raftdiff.config import ModelConfig
from raftdiff.errors import ConfigError, WeightsError
from raftdiff.pipelines.diffusion import flaw_of
from raftdiff.pipelines.loading import attach_lora, configure, denoiser_of, load_pipeline, size_multiple
from raftdiff.pipelines.lora import base_differs, fingerprint, weight_files
from raftdiff.pipelines.replay import GuidanceArgument
from raftdiff.protocols import Reward
from raftdiff.scoring import score_parts
from raftdiff.types import Prompt, Sample

from .turns import Cancelled, Turns

logger = logging.getLogger(__name__)

BASE = "base"
KEPT_BYTES = 512 << 20  # of drawn pictures that may be asked for again

Progress = Callable[[int, int], None]
"""Called with the denoising steps done and those in all."""


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA by the name that people see.

    LoraFile(name="demo", path=Path("runs/demo/lora"))
    """

    name: str
    path: Path


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model to draw with: the base, a LoRA, or several LoRAs by their weights.

    Contender(name="mix", weights=(("aesthetic", 0.7), ("clip", 0.5)))
    """

    name: str
    weights: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How a picture is drawn; what is None is the pipeline's own default."""

    steps: int = 25
    guidance: float | None = None
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A picture with its scores; a reward that could not judge it is absent."""

    sample: Sample
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def image(self) -> Image.Image:
        assert self.sample.image is not None
        return Image.fromarray(self.sample.image.permute(1, 2, 0).numpy())


class Models:
    """One base, the LoRAs that fit it, and the rewards that score what they draw.

    Args:
        model: the base; it is loaded at once.
        loras: each is loaded when it is first drawn with, and stays.
        batch_size: pictures of one prompt that are denoised at once.
        waiting: how many drawings may wait for the device.

    Raises:
        WeightsError: the base cannot be loaded.
    """

    def __init__(
        self,
        model: ModelConfig,
        loras: Sequence[LoraFile],
        rewards: Sequence[Reward] = (),
        *,
        device: str = "cpu",
        pipeline: Any = None,
        batch_size: int = 4,
        waiting: int = 8,
    ):
        self.model = model
        self.pipeline = load_pipeline(model, device) if pipeline is None else pipeline
        configure(self.pipeline, model)
        self.denoiser = denoiser_of(self.pipeline)
        for component in self.pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False).eval()
        self.loras = {lora.name: lora for lora in loras}
        self.rewards = list(rewards)
        self.turns = Turns(waiting)
        self.guidance = GuidanceArgument(self.pipeline)
        self.multiple = size_multiple(self.pipeline, self.denoiser)
        self.fingerprint = fingerprint(self.denoiser)
        self._batches = Batches(
            batch_size, "pictures at once", "draw smaller ones, or restart the app with a --base of 16 bits"
        )
        self._adapters: dict[str, str] = {}
        self._kept = _Kept(KEPT_BYTES)

    # -- what there is --------------------------------------------------------------------------------------------

    @property
    def reward_names(self) -> list[str]:
        return [reward.name for reward in self.rewards]

    def contenders(self) -> list[Contender]:
        """The base and each LoRA by itself."""
        return [Contender(name=BASE), *(Contender(name=name, weights=((name, 1.0),)) for name in self.loras)]

    def identity(self, contender: Contender) -> str:
        """The name with a hash of the weights, so that votes on another training of the same name are told apart."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for name, weight in contender.weights:
            digest.update(f"{weight:g}".encode())
            for file in weight_files(self.loras[name].path):
                digest.update(file.read_bytes())
        return f"{contender.name}@{digest.hexdigest()[:8]}"

    def differing(self) -> list[str]:
        """A line on each LoRA that says it was trained from other weights than these, or cannot be read."""
        lines = []
        for lora in self.loras.values():
            try:
                if base_differs(self.denoiser, lora.path):
                    lines.append(f"{lora.name} was trained from other weights than this base")
            except WeightsError as error:
                lines.append(str(error))
        return lines

    # -- drawing --------------------------------------------------------------------------------------------------

    def draw(
        self,
        contender: Contender,
        prompt: str,
        seeds: Sequence[int],
        drawing: Drawing,
        *,
        progress: Progress = lambda done, total: None,
        cancel: Event | None = None,
    ) -> list[Drawn]:
        """One scored picture for each seed; what was drawn before and is still kept is not drawn again. The caller
        holds the turn of the device.

        Raises:
            Cancelled: `cancel` was set, or the app ends.
            ConfigError: a size or guidance scale that this pipeline does not take.
            WeightsError: a LoRA that cannot be loaded.
        """
        made = {seed: drawn for seed in seeds if (drawn := self._kept.get((contender.weights, prompt, seed, drawing)))}
        missing = [seed for seed in dict.fromkeys(seeds) if seed not in made]
        if missing:
            arguments = self._arguments(drawing)
            with self._wearing(contender):
                steps = _Steps(progress, [self.turns.closed, *([cancel] if cancel else [])], pictures=len(missing))
                samples = self._batches.run(
                    len(missing), lambda rows: self._batch(prompt, missing[rows], arguments, steps)
                )
            for drawn in self._scored(samples):
                made[drawn.sample.seed] = drawn
                self._kept.add((contender.weights, prompt, drawn.sample.seed, drawing), drawn)
        return [made[seed] for seed in seeds]

    def _arguments(self, drawing: Drawing) -> dict[str, Any]:
        call = {"num_inference_steps": drawing.steps, **self.model.call}
        call |= self.guidance.arguments(self.guidance.default if drawing.guidance is None else drawing.guidance)
        if self.model.negative_prompt is not None:
            call["negative_prompt"] = self.model.negative_prompt
        for name in ("height", "width"):
            size = getattr(drawing, name) or getattr(self.model, name)
            if size is not None and size % self.multiple:
                raise ConfigError(f"{name} {size}: this model draws in multiples of {self.multiple} pixels")
            call |= {} if size is None else {name: size}
        return call

    @torch.no_grad()
    def _batch(self, prompt: str, seeds: Sequence[int], arguments: Mapping[str, Any], steps: _Steps) -> list[Sample]:
        call = dict(arguments)
        if isinstance(call.get("negative_prompt"), str):
            call["negative_prompt"] = [call["negative_prompt"]] * len(seeds)
        with steps.watching(self.pipeline, rows=len(seeds)):
            output = self.pipeline(
                prompt=[prompt] * len(seeds),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],  # the same noise on every device
                output_type="pil",
                **call,
            )
        unsafe = getattr(output, "nsfw_content_detected", None) or [False] * len(seeds)
        rows = zip(seeds, output.images, unsafe, strict=True)
        return [_sample(prompt, seed, image, unsafe=bool(flag)) for seed, image, flag in rows]

    def _scored(self, samples: Sequence[Sample]) -> list[Drawn]:
        values = {reward.name: score_parts(samples, reward, max_failed=1.0).tolist() for reward in self.rewards}
        return [
            Drawn(sample=sample, scores={name: column[i] for name, column in values.items() if column[i] == column[i]})
            for i, sample in enumerate(samples)
        ]

    # -- adapters -------------------------------------------------------------------------------------------------

    @contextmanager
    def _wearing(self, contender: Contender) -> Iterator[None]:
        """Within it the pipeline carries the contender's LoRAs at their weights; afterwards none."""
        worn = {self._adapter(name): weight for name, weight in contender.weights if weight}
        names, weights = list(worn), list(worn.values())
        if names and hasattr(self.pipeline, "set_adapters"):
            self.pipeline.enable_lora()
            self.pipeline.set_adapters(names, weights)
        elif names:
            set_adapter_layers(self.denoiser, enabled=True)
            set_weights_and_activate_adapters(self.denoiser, names, weights)
        else:
            self._take_off()
        try:
            yield
        finally:
            self._take_off()

    def _take_off(self) -> None:
        if self._adapters and hasattr(self.pipeline, "disable_lora"):
            self.pipeline.disable_lora()
        elif self._adapters:
            set_adapter_layers(self.denoiser, enabled=False)

    def _adapter(self, name: str) -> str:
        """The adapter of a LoRA on the pipeline, which is loaded now if it was not before."""
        if name not in self._adapters:
            adapter = f"lora_{len(self._adapters)}"
            attach_lora(self.pipeline, self.loras[name].path, adapter)
            self.denoiser.requires_grad_(False).eval()
            self._adapters[name] = adapter
        return self._adapters[name]


class _Steps:
    """Stands in for the pipeline's progress bar: every denoising step is told, and is a place to stop at."""

    def __init__(self, progress: Progress, stops: Sequence[Event], *, pictures: int):
        self._progress, self._stops, self._pictures = progress, stops, pictures
        self._before, self._rows, self._done, self._total = 0, 0, 0, 1

    @contextmanager
    def watching(self, pipeline: Any, *, rows: int) -> Iterator[None]:
        """While open, the pipeline reports here; it draws `rows` pictures at once."""
        self._rows = rows
        pipeline.progress_bar = self._begin
        try:
            yield
        finally:
            del pipeline.progress_bar
        self._before += rows

    def _begin(self, iterable: Any = None, total: int | None = None) -> _Steps:
        self._iterable, self._done = iterable, 0
        self._total = total or len(iterable)
        self.update(0)
        return self

    def update(self, n: int = 1) -> None:
        if any(stop.is_set() for stop in self._stops):
            raise Cancelled("cancelled")
        self._done += n
        self._progress(self._before * self._total + self._done * self._rows, self._pictures * self._total)

    def __enter__(self) -> _Steps:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.update()


class _Kept:
    """The pictures last drawn, up to a number of bytes."""

    def __init__(self, most: int):
        self._most, self._bytes = most, 0
        self._drawn: OrderedDict[Any, Drawn] = OrderedDict()

    def get(self, key: Any) -> Drawn | None:
        if key in self._drawn:
            self._drawn.move_to_end(key)
        return self._drawn.get(key)

    def add(self, key: Any, drawn: Drawn) -> None:
        self._drawn[key] = drawn
        self._bytes += _bytes(drawn)
        while self._bytes > self._most and len(self._drawn) > 1:
            self._bytes -= _bytes(self._drawn.popitem(last=False)[1])


def _bytes(drawn: Drawn) -> int:
    assert drawn.sample.image is not None
    return drawn.sample.image.numel()


def _sample(prompt: str, seed: int, image: Image.Image, *, unsafe: bool) -> Sample:
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    flaw = flaw_of(pixels, unsafe=unsafe)
    return Sample(id=f"{seed:016x}", prompt=Prompt(text=prompt), seed=seed, image=pixels, flaw=flaw)
