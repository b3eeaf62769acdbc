"""What of a pipeline is watched and replayed: its guidance argument, prompt encodings, and scheduler steps."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from raftdiff.errors import ConfigError
from raftdiff.types import Trajectory

from .schedule import NoiseSchedule, gaussian_log_prob


class GuidanceArgument:
    """How the pipeline's `__call__` is told of guidance.

    Where there is a `true_cfg_scale`, `guidance_scale` is an input of a distilled model and is left alone, and
    guidance needs a negative prompt. Some pipelines compute c + s (c - u), so that 0 is no guidance, not 1.
    """

    def __init__(self, pipeline: Any):
        parameters = inspect.signature(type(pipeline).__call__).parameters
        self.name = "true_cfg_scale" if "true_cfg_scale" in parameters else "guidance_scale"
        pipeline._guidance_scale = 1.0
        self.none = 0.0 if getattr(pipeline, "do_classifier_free_guidance", False) else 1.0
        self.default = parameters[self.name].default + 1.0 - self.none

    def arguments(self, scale: float) -> dict[str, Any]:
        arguments: dict[str, Any] = {self.name: scale - 1.0 + self.none}
        if self.name == "true_cfg_scale" and scale > 1:
            arguments["negative_prompt"] = ""
        return arguments


class PromptRecord:
    """What `encode_prompt` returned for each prompt, kept on the CPU.

    With guidance it returns the same values for the negative prompt as well; without, it leaves their places empty.
    So the two sides are told apart, recorded apart and put together again, whatever the family calls them. The
    negative side of all prompts is encoded once, beside the empty prompt.
    """

    def __init__(self, signature: inspect.Signature):
        self._signature = signature
        self._prompts: dict[tuple, tuple] = {}
        self._negatives: dict[tuple, tuple] = {}
        self._places: list[bool] = []
        """Which of the returned values are of the negative prompt; none are known at first."""
        self.negative_by_second_call = "do_classifier_free_guidance" not in signature.parameters
        """Whether the family encodes a negative prompt by a call of its own, as it does any prompt."""

    def replay(self, encode: Callable[..., Any], device: torch.device, /, *args, **kwargs) -> Any:
        """`encode(*args, **kwargs)`, row by row from the record; only what is new is encoded. A prompt that is None
        is given the values of its negative prompt."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        columns = {k: v for k, v in bound.arguments.items() if "prompt" in k and isinstance(v, list)}
        guided = bool(bound.arguments.get("do_classifier_free_guidance"))

        @torch.no_grad()
        def encode_with(**changed: Any) -> Any:
            arguments = inspect.BoundArguments(self._signature, OrderedDict(bound.arguments, **changed))
            return encode(*arguments.args, **arguments.kwargs)

        rows = [dict(zip(columns, texts, strict=True)) for texts in zip(*columns.values(), strict=True)]
        encodings = [self._row(encode_with, row, guided) for row in rows]
        if _ragged(encodings):  # of different lengths: only the pipeline knows how it pads them
            texts = [row.get("negative_prompt") or "" if row["prompt"] is None else row["prompt"] for row in rows]
            return encode_with(prompt=texts)
        stacked = _stack(encodings, device)
        return stacked if len(stacked) > 1 else stacked[0]

    def _row(self, encode: Callable[..., Any], row: dict[str, str | None], guided: bool) -> tuple:
        if row["prompt"] is None:
            negative = iter(self._negative(encode, row))
            return tuple(None if place else next(negative) for place in self._places)
        prompt = self._prompt(encode, row)
        if not guided:
            return prompt
        negative = iter(self._negative(encode, row))
        return tuple(next(negative) if place else value for value, place in zip(prompt, self._places, strict=True))

    def _prompt(self, encode: Callable[..., Any], row: dict[str, str | None]) -> tuple:
        key = tuple(row.items())
        if key not in self._prompts:
            self._prompts[key] = self._encode(encode, row, guided=False)
            self._places = [value is None or (isinstance(value, list) and not value) for value in self._prompts[key]]
        return self._prompts[key]

    def _negative(self, encode: Callable[..., Any], row: dict[str, str | None]) -> tuple:
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
            both = list(zip(self._encode(encode, empty, guided=True), self._places, strict=True))
            self._prompts[tuple(empty.items())] = tuple(None if place else value for value, place in both)
            self._negatives[key] = tuple(value for value, place in both if place)
        return self._negatives[key]

    def _encode(self, encode: Callable[..., Any], row: dict[str, str | None], *, guided: bool) -> tuple:
        guidance = {} if self.negative_by_second_call else {"do_classifier_free_guidance": guided}
        values = encode(**{name: [text] for name, text in row.items()}, **guidance)
        return _moved(values if isinstance(values, tuple) else (values,), torch.device("cpu"))


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors, alone or in tuples and lists, on `device`."""
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, device) for item in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _ragged(rows: list[tuple]) -> bool:
    return any(len({v.shape for v in values if isinstance(v, torch.Tensor)}) > 1 for values in zip(*rows, strict=True))


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


class OneStep:
    """A scheduler with one step, at a timestep for each row, that keeps the model output."""

    order = 1
    init_noise_sigma = 1.0
    num_inference_steps = 1

    def __init__(self, scheduler, t_B: torch.Tensor):
        self._scheduler, self._t_B, self.config = scheduler, t_B, scheduler.config
        self.model_output: torch.Tensor | None = None

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None, **_):
        self.timesteps = self._t_B[None]  # the pipeline's loop runs once, with a whole batch of timesteps
        self.sigmas = torch.ones(2)

    def set_begin_index(self, *_):
        pass

    def scale_model_input(self, sample, timestep=None):
        return sample

    def step(self, model_output, timestep, sample, **_):
        self.model_output = model_output
        return (sample,)

    def __getattr__(self, name):
        return getattr(self._scheduler, name)


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

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *_, **__) -> tuple[torch.Tensor]:
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
        return (after.to(sample.dtype),)

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
