"""What of a pipeline is watched and replayed: its guidance argument, prompt encodings, and scheduler steps."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

from raftdiff.errors import ConfigError
from raftdiff.sharding import is_split
from raftdiff.types import Trajectory

from .schedule import NoiseSchedule, gaussian_log_prob

Row = TypeVar("Row")


class GuidanceArgument:
    """How the pipeline's `__call__` is told of guidance.

    Where there is a `true_cfg_scale`, `guidance_scale` is an input of a distilled model and is left alone, and
    guidance needs a negative prompt. Some pipelines compute c + s (c - u), so that 0 is no guidance, not 1. Some
    models know guidance as an input alone, or not at all: then 1 is the only scale, and what the pipeline calls
    guidance is left as it is.
    """

    def __init__(self, pipeline: Any):
        parameters = inspect.signature(type(pipeline).__call__).parameters
        self.name = "true_cfg_scale" if "true_cfg_scale" in parameters else "guidance_scale"
        self._pipeline = type(pipeline).__name__
        self.exists = self.name == "true_cfg_scale" or _guides(pipeline, 2.0, otherwise=not _guidance_input(pipeline))
        self.none = 0.0 if self.exists and _guides(pipeline, 1.0, otherwise=False) else 1.0
        self.default = parameters[self.name].default + 1.0 - self.none if self.exists else 1.0

    def arguments(self, scale: float) -> dict[str, Any]:
        if not self.exists:
            if scale != 1:
                raise ConfigError(
                    f"sampling.guidance_scale {scale:g}: the model of this {self._pipeline} takes guidance as an input "
                    "or not at all; set it to 1 (the input, where there is one, is model.call: {guidance_scale: ...})"
                )
            return {}
        arguments: dict[str, Any] = {self.name: scale - 1.0 + self.none}
        if self.name == "true_cfg_scale" and scale > 1:
            arguments["negative_prompt"] = ""
        return arguments


def _guides(pipeline: Any, scale: float, *, otherwise: bool) -> bool:
    """Whether the pipeline says that it predicts without the prompt as well at this scale, if it says."""
    pipeline._guidance_scale = scale
    return getattr(pipeline, "do_classifier_free_guidance", otherwise)


def _guidance_input(pipeline: Any) -> bool:
    config = getattr(getattr(pipeline, "transformer", None), "config", {})
    return bool(config.get("guidance_embeds"))


class Ragged(Exception):
    """Prompts of one batch are encoded to different lengths. `groups` has the rows of each length."""

    def __init__(self, groups: list[list[int]]):
        super().__init__(f"rows of one length each: {groups}")
        self.groups = groups


def by_length(denoiser: torch.nn.Module, run: Callable[[list[int]], Iterable[Row]], rows: list[int]) -> list[Row]:
    """What `run` gives for `rows`, all at once or, where their prompts are encoded to different lengths, once for each
    length: padded, without a mask for it, a row would depend on the others of its batch.

    Raises:
        ConfigError: different lengths, where the denoiser is split over processes, which must make the same passes.
    """
    try:
        return list(run(rows))
    except Ragged as ragged:
        if is_split(denoiser):
            raise ConfigError(
                "the prompts of a batch are encoded to different lengths, and with split weights each process must "
                "make the same passes: set sampling.batch_size and training.micro_batch_size to 1"
            ) from None
        done: dict[int, Row] = {}
        for group in ragged.groups:
            done |= zip(group, by_length(denoiser, run, [rows[i] for i in group]), strict=True)
        return [done[i] for i in range(len(rows))]


class PromptRecord:
    """What `encode_prompt` returned for each prompt, kept on the CPU.

    Whatever else it was told (which of several text encoders, how many tokens) is part of the key.
    """

    def __init__(self, signature: inspect.Signature):
        self._signature = signature
        self._encodings: dict[tuple, _Encodings] = {}
        self.negative_by_second_call = "do_classifier_free_guidance" not in signature.parameters
        """Whether the family encodes a negative prompt by a call of its own, as it does any prompt."""

    def replay(self, encode: Callable[..., Any], device: torch.device, /, *args, **kwargs) -> Any:
        """`encode(*args, **kwargs)`, row by row from the record; only what is new is encoded. A prompt that is None
        is given the values of its negative prompt.

        Raises:
            Ragged: the rows are of different lengths.
        """
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        columns = {k: v for k, v in bound.arguments.items() if "prompt" in k and isinstance(v, list)}
        guided = bool(bound.arguments.get("do_classifier_free_guidance"))

        @torch.no_grad()
        def encode_with(row: dict[str, str | None], *, guided: bool) -> tuple:
            changed: dict[str, Any] = {name: [text] for name, text in row.items()}
            if not self.negative_by_second_call:
                changed["do_classifier_free_guidance"] = guided
            arguments = inspect.BoundArguments(self._signature, OrderedDict(bound.arguments, **changed))
            values = encode(*arguments.args, **arguments.kwargs)
            return _moved(values if isinstance(values, tuple) else (values,), torch.device("cpu"))

        settings = tuple(
            (name, value)
            for name, value in bound.arguments.items()
            if isinstance(value, (bool, int, float, str)) and "prompt" not in name and name not in NO_SETTING
        )
        encodings = self._encodings.setdefault(settings, _Encodings())
        rows = [dict(zip(columns, texts, strict=True)) for texts in zip(*columns.values(), strict=True)]
        encoded = [encodings.row(encode_with, row, guided) for row in rows]
        groups = _groups(encoded)
        if len(groups) > 1:
            raise Ragged(groups)
        stacked = _stack(encoded, device)
        return stacked if len(stacked) > 1 else stacked[0]


NO_SETTING = ("do_classifier_free_guidance", "lora_scale")


class _Encodings:
    """The encodings of prompts under one setting of `encode_prompt`.

    With guidance it returns the same values for the negative prompt as well; without, it leaves their places empty.
    So the two sides are told apart, recorded apart and put together again, whatever the family calls them. The
    negative side of all prompts is encoded once, beside the empty prompt.
    """

    def __init__(self) -> None:
        self._prompts: dict[tuple, tuple] = {}
        self._negatives: dict[tuple, tuple] = {}
        self._places: list[bool] = []
        """Which of the returned values are of the negative prompt; none are known at first."""

    def row(self, encode: Callable[..., tuple], row: dict[str, str | None], guided: bool) -> tuple:
        if row["prompt"] is None:
            negative = iter(self._negative(encode, row))
            return tuple(None if place else next(negative) for place in self._places)
        prompt = self._prompt(encode, row)
        if not guided:
            return prompt
        negative = iter(self._negative(encode, row))
        return tuple(next(negative) if place else value for value, place in zip(prompt, self._places, strict=True))

    def _prompt(self, encode: Callable[..., tuple], row: dict[str, str | None]) -> tuple:
        key = tuple(row.items())
        if key not in self._prompts:
            self._prompts[key] = encode(row, guided=False)
            self._places = [value is None or (isinstance(value, list) and not value) for value in self._prompts[key]]
        return self._prompts[key]

    def _negative(self, encode: Callable[..., tuple], row: dict[str, str | None]) -> tuple:
        key = tuple((name, text) for name, text in row.items() if name.startswith("negative"))
        if key not in self._negatives:
            empty = {name: text if name.startswith("negative") else "" for name, text in row.items()}
            if not self._places:
                self._prompt(encode, empty)
            if not any(self._places):
                raise ConfigError(
                    "encode_prompt of this pipeline does not return the negative prompt's values apart; "
                    "set sampling.guidance_scale: 1"
                )
            both = list(zip(encode(empty, guided=True), self._places, strict=True))
            self._prompts[tuple(empty.items())] = tuple(None if place else value for value, place in both)
            self._negatives[key] = tuple(value for value, place in both if place)
        return self._negatives[key]


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors, alone or in tuples and lists, on `device`."""
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, device) for item in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _groups(rows: list[tuple]) -> list[list[int]]:
    """The rows whose tensors have the same shapes, together."""
    groups: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(tuple(v.shape for v in row if isinstance(v, torch.Tensor)), []).append(i)
    return list(groups.values())


def _stack(rows: list[tuple], device: torch.device) -> tuple:
    """Rows of encodings as one batch: what has a batch axis is concatenated, what has none is the same in all."""
    stacked: list[Any] = []
    for values in zip(*rows, strict=True):
        first = values[0]
        if isinstance(first, torch.Tensor) and first.dim() > 0 and first.shape[0] == 1:
            stacked.append(torch.cat(values))
        elif isinstance(first, list):
            stacked.append([item for value in values for item in value])
        else:
            stacked.append(first)
    return _moved(tuple(stacked), device)


class Stepped(NamedTuple):
    """What `step` of a scheduler returns, whichever way a pipeline reads it."""

    prev_sample: torch.Tensor
    denoised: torch.Tensor


class OneStep:
    """A scheduler with one step, at a timestep for each row, that keeps the model output."""

    order = 1
    init_noise_sigma = 1.0
    num_inference_steps = 1

    def __init__(self, scheduler, t_B: torch.Tensor):
        self._scheduler, self._t_B, self.config = scheduler, t_B, scheduler.config
        self.model_output: torch.Tensor | None = None

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None, **_):
        # The pipeline's loop runs once: with a whole batch of timesteps, or with one as any scheduler gives it.
        self.timesteps = self._t_B[None] if len(self._t_B) > 1 else self._t_B
        self.sigmas = torch.ones(2)

    def set_begin_index(self, *_):
        pass

    def scale_model_input(self, sample, timestep=None):
        return sample

    def step(self, model_output, timestep, sample, **_):
        self.model_output = model_output
        return Stepped(sample, sample)

    def __getattr__(self, name):
        return getattr(self._scheduler, name)


class Stopped(Exception):
    """What was wanted of the pipeline's call is there."""


def on_device(pipeline: Any) -> Any:
    """The pipeline itself, but that it has looked up where it computes: its own property looks for hooks of offloading
    in every module of every part, at each call, which is a good part of a small model's step."""
    kind = type(pipeline)
    same: Any = object.__new__(type(kind.__name__, (kind,), {"_execution_device": pipeline._execution_device}))
    same.__dict__ = pipeline.__dict__
    return same


@contextmanager
def planning(pipeline: Any) -> Iterator[Any]:
    """While open, a call of the pipeline ends where the timesteps of sampling are set: on the copy of the scheduler
    that this gives."""
    scheduler = pipeline.scheduler
    pipeline.scheduler = stand_in = copy.deepcopy(scheduler)

    @functools.wraps(stand_in.set_timesteps)  # pipelines read its signature
    def set_timesteps(*args, **kwargs):
        type(stand_in).set_timesteps(stand_in, *args, **kwargs)
        raise Stopped

    stand_in.set_timesteps = set_timesteps
    try:
        yield stand_in
    except Stopped:
        pass
    finally:
        pipeline.scheduler = scheduler


class LatentLayout:
    """How what a family denoises is laid out in what its VAE decodes, where each value is one of the denoised ones,
    scaled and shifted: packed, standardised by channel, with a time axis, or as it is.

    The pipeline shows it by decoding numbered latents: zeros, ones, and the digits of each value's position.
    """

    BASE, DIGITS = 64, 4  # few enough for 8 bits of precision, many enough for 16 million positions
    ROWS = 2 + DIGITS

    @classmethod
    def numbered(cls, shape: torch.Size) -> torch.Tensor:
        """[ROWS, *shape]"""
        positions = torch.arange(shape.numel())
        digits = [positions // cls.BASE**i % cls.BASE for i in range(cls.DIGITS)]
        return torch.stack([torch.zeros_like(positions), torch.ones_like(positions), *digits]).float().view(-1, *shape)

    def __init__(self, shape: torch.Size, decoded: torch.Tensor):
        """`decoded` is what the VAE is given, [ROWS, ...], for numbered latents of `shape`."""
        zeros, ones, *digits = decoded.float().cpu()
        self.shape, self.decoded_shape = shape, zeros.shape
        self.dtype = decoded.dtype
        """In which the pipeline has its VAE work; some are not to be trusted with fp16."""
        self._shift, self._scale = zeros, ones - zeros
        self._positions = sum(
            (((row - self._shift) / self._scale).round().long() * self.BASE**i for i, row in enumerate(digits)),
            start=torch.zeros(zeros.shape, dtype=torch.long),
        ).flatten()
        if not torch.equal(self._positions.sort().values, torch.arange(shape.numel())):
            raise ConfigError(
                "your own images cannot be used: this pipeline does not decode its latents value by value"
            )

    def denoised(self, encoded: torch.Tensor) -> torch.Tensor:
        """What the VAE made of a picture, as the family denoises it, float32 on the CPU."""
        latents = torch.empty(self.shape.numel())
        latents[self._positions] = ((encoded.float().cpu() - self._shift) / self._scale).flatten()
        return latents.view(self.shape)


class Numbering(OneStep):
    """Its one step gives numbered latents, whatever the model said."""

    def step(self, model_output, timestep, sample, **_):
        self.shape = sample.shape[1:]
        numbered = LatentLayout.numbered(self.shape).to(sample)
        return Stepped(numbered, numbered)


@contextmanager
def decoding(pipeline: Any, scheduler: OneStep) -> Iterator[list[torch.Tensor]]:
    """While open, a call of the pipeline denoises with `scheduler`, and ends where something is given to the VAE to
    decode, which is then in the list."""
    given: list[torch.Tensor] = []
    dtype = pipeline.vae.dtype

    def decode(latents: torch.Tensor, *_, **__) -> None:
        given.append(latents)
        raise Stopped

    pipeline.vae.decode = decode
    own, pipeline.scheduler = pipeline.scheduler, scheduler
    try:
        yield given
    except Stopped:
        pass
    finally:
        pipeline.scheduler = own
        del pipeline.vae.decode
        pipeline.vae.to(dtype)  # as the pipeline does after decoding


class TrajectoryRecorder:
    """Takes the steps of sampling in place of the scheduler, each Gaussian around the model's prediction, and keeps
    them."""

    def __init__(
        self, schedule: NoiseSchedule, scheduler: Any, noise_level: float, generators: Sequence[torch.Generator]
    ):
        self._schedule, self._scheduler = schedule, scheduler
        self._noise_level, self._generators = noise_level, generators
        self._states: list[torch.Tensor] = []
        self._log_probs: list[torch.Tensor] = []
        self._times: list[float] = []

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *_, **__) -> Stepped:
        if not self._times:
            self._times = [*self._scheduler.timesteps.tolist(), 0.0 if self._schedule.flow else -1.0]
            self._states.append(sample.float())
        i = len(self._log_probs)
        t_B, next_B = (
            torch.full((len(sample),), time, device=sample.device).to(self._scheduler.timesteps.dtype)
            for time in self._times[i : i + 2]
        )
        mean, deviation = self._schedule.step(model_output, self._states[i], t_B, next_B, self._noise_level)
        noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in self._generators]).to(mean.device)
        after = mean + deviation * noise
        self._states.append(after)
        self._log_probs.append(gaussian_log_prob(after, mean, deviation))
        return Stepped(after.to(sample.dtype), after.to(sample.dtype))

    def trajectories(self, guidance_scale: float) -> list[Trajectory]:
        """The trajectory of each row."""
        states, log_probs = torch.stack(self._states, 1).cpu(), torch.stack(self._log_probs, 1).cpu()
        return [
            Trajectory(
                states=states_T,
                times=torch.tensor(self._times),
                log_prob_T=log_prob_T,
                noise_level=self._noise_level,
                guidance_scale=guidance_scale,
            )
            for states_T, log_prob_T in zip(states, log_probs, strict=True)
        ]
