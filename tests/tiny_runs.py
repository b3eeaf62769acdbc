"""Real runs that take a moment each: of a tiny diffusers pipeline, or of a policy with three weights."""

from __future__ import annotations

import copy
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from tiny_models import stable_diffusion

from raftdiff.build import build, build_algorithm
from raftdiff.config import RunConfig
from raftdiff.errors import WeightsError
from raftdiff.interrupts import Interrupted
from raftdiff.protocols import Algorithm
from raftdiff.reward_models.function import FunctionReward
from raftdiff.rounds import Display, Quiet, Run
from raftdiff.scoring import WeightedReward
from raftdiff.types import Draw, Example, Prompt, Sample

PROMPTS = ["a red circle", "a blue square", "a green triangle", "a yellow star"]
ADAPTER_FILE = "pytorch_lora_weights.safetensors"


def redness(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """The red less the blue of each picture, 0 to 255."""
    means = [image.resize((1, 1), 4).getpixel((0, 0)) for image in images]
    return [float(red - blue) for red, _, blue in means]


class PointPolicy:
    """A model with one parameter, its mean; the error of a sample is the mean squared distance of its latents."""

    def __init__(self) -> None:
        self.mean = torch.nn.Parameter(torch.tensor(1.0))

    def error(self, samples: Sequence[Sample], draw: Draw) -> torch.Tensor:
        latents = torch.stack([s.latents for s in samples if s.latents is not None]) + draw.noise
        return (latents - self.mean).square().flatten(1).mean(1)


class ThreeWeights:
    """A whole policy in three weights: a picture is noise with one color added to it, and the color is trained."""

    modality: Literal["image"] = "image"
    guidance_scale = 1.0

    def __init__(self, base: float = 0.0, flawed: Sequence[str] = ()) -> None:
        """`base` tells one base model from another; pictures of the prompts `flawed` are black."""
        self.color = torch.nn.Parameter(torch.zeros(3))
        self.passes = 0
        self._base = base
        self._flawed = set(flawed)

    def sample(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        *,
        guidance_scale: float | None = None,
        noise_level: float | None = None,
    ) -> list[Sample]:
        self.passes += len(prompts)
        return [self._one(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def _one(self, prompt: Prompt, seed: int) -> Sample:
        noise = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(seed))
        latents = self._base + noise + self.color.detach()[:, None, None]
        image = (torch.sigmoid(latents) * 255).to(torch.uint8).repeat_interleave(4, 1).repeat_interleave(4, 2)
        flaw = "black image" if prompt.text in self._flawed else None
        return Sample(id="", prompt=prompt, seed=seed, image=image, latents=latents, flaw=flaw)

    def draw(self, samples: Sequence[Sample], generator: torch.Generator) -> Draw:
        return Draw(
            noise=torch.randn(len(samples), 3, 2, 2, generator=generator),
            quantile_B=torch.rand(len(samples), generator=generator),
            dropped_B=torch.zeros(len(samples), dtype=torch.bool),
        )

    def error(self, samples: Sequence[Sample], draw: Draw) -> torch.Tensor:
        self.passes += len(samples) * (3 if torch.is_grad_enabled() else 1)
        x_0 = torch.stack([s.latents for s in samples if s.latents is not None])
        x_t = x_0 + draw.quantile_B[:, None, None, None] * draw.noise
        return (x_t - self._base - self.color[:, None, None]).square().mean((1, 2, 3))

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.color]

    @contextmanager
    def reference(self) -> Iterator[None]:
        color, self.color.data = self.color.data, torch.zeros(3)
        try:
            yield
        finally:
            self.color.data = color

    def adapter_state(self) -> dict[str, torch.Tensor]:
        return {"color": self.color.detach().clone()}

    def load_adapter(self, state: Mapping[str, torch.Tensor]) -> None:
        if state.keys() != {"color"}:
            raise WeightsError("not this adapter")
        with torch.no_grad():
            self.color.copy_(state["color"])

    def export(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        save_file(self.adapter_state(), path / ADAPTER_FILE)

    def fingerprint(self) -> str:
        return f"three-{self._base}"


@cache
def _built() -> Any:
    with torch.random.fork_rng(devices=[]):
        return stable_diffusion()


def tiny_pipeline() -> Any:
    """A StableDiffusionPipeline of 8x8 latents and 16x16 pictures, the same each time."""
    return copy.deepcopy(_built())


def tiny_config(output: Path, **settings: Any) -> RunConfig:
    """Two rounds of 4 prompts x 2 samples in batches of 4, and 3 steps each; `settings` are merged into that."""
    plain: dict[str, Any] = {
        "name": "run",
        "output": str(output),
        "rounds": 2,
        "adapter": {"rank": 2},
        "prompts": {"source": PROMPTS},
        "rewards": [{"name": "redness"}],
        "sampling": {"samples_per_prompt": 2, "batch_size": 4, "num_inference_steps": 2, "guidance_scale": 1.0},
        "training": {"learning_rate": 0.1, "batch_size": 2, "steps": 3},
        "evaluation": {"seeds_per_prompt": 1},
        "tracker": "none",
    }
    for name, value in settings.items():
        plain[name] = plain.get(name, {}) | value if isinstance(value, dict) else value
    return RunConfig.model_validate(plain)


def pipeline_run(config: RunConfig, *, display: Display | None = None, pipeline: Any = None) -> Run:
    """A run of the tiny pipeline, on its way to red."""
    live = {"redness": FunctionReward(redness, "redness")}
    return build(config, pipeline=pipeline or tiny_pipeline(), rewards=live, display=display)


def three_weights_run(
    config: RunConfig,
    *,
    reward: Callable = redness,
    watched: Sequence[Any] = (),
    policy: ThreeWeights | None = None,
    algorithm: Algorithm | None = None,
    display: Display | None = None,
    data: Sequence[Example] = (),
    teacher: ThreeWeights | None = None,
) -> Run:
    """A run of `ThreeWeights`, on its way to red."""
    prompts = [Prompt(text=text) for text in config.prompts.source]
    return Run(
        config=config,
        policy=policy or ThreeWeights(),
        algorithm=algorithm or build_algorithm(config),
        rewards=[WeightedReward(reward=FunctionReward(reward, "redness"))],
        watched=[WeightedReward(reward=reward) for reward in watched],
        prompts=prompts,
        held_out=prompts,
        data=data,
        teacher=teacher,
        accelerator=Accelerator(),
        display=display or Quiet(),
    )


class Told(Quiet):
    """A display that keeps what it is told, and calls `at` at each stage."""

    def __init__(self, at: Callable[[int, str], None] = lambda round, stage: None) -> None:
        self.messages: list[str] = []
        self._at = at
        self._where = (0, "")

    def stage(self, round: int, name: str, total: int) -> None:
        self._where = (round, name)
        self._at(round, name)

    def say(self, message: str) -> None:
        self.messages.append(message)

    @property
    def text(self) -> str:
        return "\n".join(self.messages)


def exported(folder: Path) -> bytes:
    """The bytes of the adapter that a run left."""
    return (folder / "lora" / ADAPTER_FILE).read_bytes()


def in_child(function: Callable[[], Any], *, on_write: Callable[[], None] | None = None, of: Path | None = None) -> int:
    """Call `function` in a forked process, which has paid for its imports; its exit code, negative for a signal.

    `on_write` is called before each opening for writing, renaming and removing of anything in the folder `of`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if on_write is not None:
                assert of is not None
                sys.addaudithook(_writing(str(of), on_write))
            function()
            code = 0
        except Interrupted as interrupted:
            code = interrupted.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _writing(folder: str, on_write: Callable[[], None]) -> Callable[[str, tuple], None]:
    changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def hook(event: str, arguments: tuple) -> None:
        writes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
        if event == "open" and isinstance(arguments[2], int):
            writes = bool(arguments[2] & changing)
        if writes and str(arguments[0]).startswith(folder):
            on_write()

    return hook
