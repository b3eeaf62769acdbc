"""How fast models are aligned, beside the bare libraries on the same machine.

    python -m benchmarks.throughput            # on a CPU the embedded model and SD 1.5 at 256 pixels, in fp32
    python -m benchmarks.throughput --models sd15 sdxl sd35-medium flux-dev --attention sdpa xformers --compile off on

The models but the embedded one are full-size architectures with random weights (benchmarks/architectures.py); on a GPU
everything is in bf16 at 512 or 1024 pixels. What is compared is run in turn, several times, after a time that is not
measured; ratios are of medians. On a CPU seconds are those of computing, which other processes change less than those
of the clock: set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.architectures import ARCHITECTURES, made_on
from benchmarks.common import arguments, configured, run, table
from raftdiff.build import build_policy, default_device
from raftdiff.config import ModelConfig, RunConfig, parse_config
from raftdiff.errors import RaftdiffError
from raftdiff.pipelines.diffusion import DiffusionPolicy
from raftdiff.pipelines.loading import DTYPES, load_pipeline
from raftdiff.pipelines.replay import GuidanceArgument
from raftdiff.types import Prompt

GPU = torch.cuda.is_available()


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one model is given to do."""

    side: int
    """Of the pictures, in pixels."""
    prompts: int
    candidates: int
    """Of each prompt: the rows of one call where the plain pipeline is called prompt by prompt."""
    steps: int
    """Of denoising."""
    training_rows: int
    """Of one optimizer step."""
    dtype: Literal["bf16", "fp32"] = "bf16"


SHAPES = Load(side=32, prompts=8, candidates=8, steps=10, training_rows=32)  # as in the demo
ON_CPU = Load(side=256, prompts=2, candidates=1, steps=2, training_rows=2, dtype="fp32")
ON_GPU = {
    "sd15": Load(side=512, prompts=4, candidates=8, steps=10, training_rows=16),
    "sdxl": Load(side=1024, prompts=4, candidates=2, steps=10, training_rows=4),
    "sd35-medium": Load(side=1024, prompts=4, candidates=2, steps=10, training_rows=4),
    "flux-dev": Load(side=1024, prompts=2, candidates=2, steps=10, training_rows=1),
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table."""

    model: str
    what: str
    value: float
    unit: str
    wanted: str = ""


def main() -> None:
    options = arguments(
        __doc__ or "",
        models=["shapes", "sd15"],
        attention=["sdpa"],
        compile=["off"],
        side=0,
        steps=0,
        repeats=3,
        json="",
    )
    figures: list[Figure] = []
    for name in options.models:
        load = SHAPES if name == "shapes" else ON_GPU[name] if GPU else ON_CPU
        changes = {"side": options.side, "steps": options.steps}
        load = Load(**asdict(load) | {key: value for key, value in changes.items() if value and name != "shapes"})
        rate = matmul_rate(load.dtype)
        figures.append(
            Figure(model=name, what=f"{load.dtype} matrix product, the best", value=rate / 1e12, unit="TFLOP/s")
        )
        counted: dict[str, float] = {}
        for attention, compiled in itertools.product(options.attention, options.compile):
            model = ModelConfig(attention=attention, compile=compiled == "on")
            title = f"{name}, {load.side} px, {attention}" + (", compiled" if model.compile else "")
            try:
                figures += measured(title, name, model, load, rate, counted, options.repeats)
            except (RaftdiffError, torch.OutOfMemoryError) as error:
                print(f"{title}: {' '.join(str(error).split())[:300]}")
            save(figures, options.json)
        if name == "shapes":
            cost = overhead(tempfile.mkdtemp())
            figures.append(
                Figure(
                    model="shapes", what="a run's overhead over its stages", value=100 * cost, unit="%", wanted="< 5"
                )
            )
    rows = [[f.model, f.what, f"{f.value:.4g} {f.unit}", f.wanted] for f in figures]
    table(f"\n{device_name()}, torch {torch.__version__}", ["model", "what", "measured", "wanted"], rows)
    save(figures, options.json)


def save(figures: list[Figure], path: str) -> None:
    if path:
        Path(path).write_text(json.dumps([asdict(f) for f in figures], indent=1))


def measured(
    title: str, name: str, model: ModelConfig, load: Load, rate: float, counted: dict[str, float], repeats: int
) -> Iterator[Figure]:
    """The figures of one model with one setting. `counted` keeps its operations a row between settings."""
    policy = subject(name, model, load)
    rows = load.prompts * load.candidates
    with policy.reference():  # the bare pipeline has no adapter either
        sampling, sampling_peak = with_peak(lambda: in_turn(samplers(policy, load), repeats))
    steps, bare = training(policy, load.training_rows)
    replay = in_turn(replayed(bare), repeats)
    if not counted and model.attention == "sdpa":  # the kernels of others are not counted
        counted |= operations(bare.row())
    trained, training_peak = with_peak(lambda: in_turn(steps, repeats))

    def figure(what: str, value: float, unit: str, wanted: str = "") -> Figure:
        return Figure(model=title, what=what, value=value, unit=unit, wanted=wanted)

    yield figure("sampling", rows / sampling["ours"], "images/s")
    wanted = ">= 1.5" if name == "shapes" else ""
    yield figure("... against the pipeline prompt by prompt", sampling["plain"] / sampling["ours"], "x", wanted)
    yield figure("... against the pipeline batched by hand", sampling["batched"] / sampling["ours"], "x", ">= 0.95")
    if counted:
        work = counted["forward"] * rows * load.steps
        yield figure("... share of the matrix product", 100 * work / sampling["ours"] / rate, "%")
    yield figure("training", load.training_rows / trained["ours"], "samples/s")
    yield figure("... against a LoRA step by hand", trained["hand"] / trained["ours"], "x", ">= 1")
    if counted:
        work = counted["step"] * load.training_rows
        yield figure("... share of the matrix product", 100 * work / trained["ours"] / rate, "%")
    yield figure("replay, on top of the denoiser", 1000 * (replay["ours"] - replay["bare"]), "ms/call")
    yield figure("... as a part of it", 100 * (replay["ours"] / replay["bare"] - 1), "%")
    if GPU:
        yield figure("peak of memory, sampling", sampling_peak / 1e9, "GB")
        yield figure("peak of memory, training", training_peak / 1e9, "GB")


# -- what is timed ----------------------------------------------------------------------------------------------------


def subject(name: str, model: ModelConfig, load: Load) -> DiffusionPolicy:
    """The policy as a run would have it."""
    device = default_device()
    sizes = {} if name == "shapes" else {"height": load.side, "width": load.side}
    config: RunConfig = parse_config(
        {
            "model": model.model_dump() | {"dtype": load.dtype} | sizes,
            "adapter": {"rank": 8},
            "sampling": {
                "num_inference_steps": load.steps,
                "guidance_scale": 1.0,
                "batch_size": load.prompts * load.candidates,
            },
            "training": {"precision": load.dtype, "caption_dropout": 0.0},
        },
        where="benchmark",
    )
    if name == "shapes":
        return build_policy(config, load_pipeline(config.model, device))
    with made_on(device, DTYPES[load.dtype]):
        pipeline = ARCHITECTURES[name]()
    return build_policy(config, pipeline)


def samplers(policy: DiffusionPolicy, load: Load) -> dict[str, Callable[[], Any]]:
    """The same pictures by the policy, by the pipeline prompt by prompt, and by the pipeline in one call. Each call has
    prompts that were never encoded before."""
    pipeline = policy.pipeline
    seeds = list(range(load.prompts * load.candidates))
    fixed = GuidanceArgument(pipeline).arguments(1.0) | policy.call

    def rows() -> list[Prompt]:
        return [prompt for prompt in fresh_prompts(load.prompts) for _ in range(load.candidates)]

    def bare(batch: int) -> Callable[[], None]:
        def call() -> None:
            prompts = rows()
            for start in range(0, len(prompts), batch):
                pipeline(
                    [p.text for p in prompts[start : start + batch]],
                    num_inference_steps=policy.num_inference_steps,
                    generator=[torch.Generator().manual_seed(s) for s in seeds[start : start + batch]],
                    output_type="pt",
                    **fixed,
                )

        return call

    return {
        "ours": lambda: policy.sample(rows(), seeds),
        "plain": bare(load.candidates),
        "batched": bare(len(seeds)),
    }


def training(policy: DiffusionPolicy, rows: int) -> tuple[dict[str, Callable[[], Any]], Bare]:
    """A step of the policy, and the LoRA step as one writes it by hand, with the same LoRA, latents and prompts."""
    samples = policy.sample(fresh_prompts(1) * rows, list(range(rows)))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)
    device = policy.denoiser.device
    x0 = torch.stack([s.latents for s in samples if s.latents is not None]).to(device)
    bare = Bare(policy, x0, torch.full((rows,), 500, device=device), [s.prompt.text for s in samples])

    def updated(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def ours() -> None:
        draw = policy.draw(samples, torch.Generator().manual_seed(0))
        updated(policy.error(samples, draw).mean())

    def hand() -> None:
        updated(bare.loss(x0))

    return {"ours": ours, "hand": hand}, bare


def replayed(bare: Bare) -> dict[str, Callable[[], Any]]:
    """One prediction through the pipeline, and by the denoiser alone."""

    @torch.no_grad()
    def ours() -> None:
        bare.policy.predict(bare.x, bare.t_B, bare.texts)

    @torch.no_grad()
    def denoiser() -> None:
        bare(bare.x, bare.t_B)

    return {"ours": ours, "bare": denoiser}


class Bare:
    """The denoiser called with what the pipeline gives it, without the pipeline: the arguments of one call, kept."""

    def __init__(self, policy: DiffusionPolicy, x: torch.Tensor, t_B: torch.Tensor, texts: list[str]):
        self.policy, self.denoiser = policy, policy.denoiser
        self.x, self.t_B, self.texts = x, t_B, texts
        calls: list[tuple[tuple, dict[str, Any]]] = []
        hook = self.denoiser.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        with torch.no_grad():
            policy.predict(x, t_B, texts)
        hook.remove()
        [(self.args, self.kwargs)] = calls
        given = self.args[1] if self.args else self.kwargs["timestep"]
        self.scale = float(given.flatten()[0] / t_B[0])

    def __call__(self, x: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        precision = self.policy.precision
        x = x.to(self.denoiser.dtype)
        t_B = t_B if self.scale == 1 else t_B * self.scale
        with torch.autocast(x.device.type, precision, enabled=precision != torch.float32):
            if self.args:
                return self.denoiser(x, t_B, *self.args[2:], **self.kwargs)[0]
            return self.denoiser(**self.kwargs | {"hidden_states": x, "timestep": t_B})[0]

    def loss(self, x0: torch.Tensor) -> torch.Tensor:
        """The denoising error on noise and timesteps of chance; which schedule they are of takes no other time."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        t_B = torch.randint(0, 1000, (len(x0),), generator=generator).to(x0.device)
        part = (t_B / 1000).view(-1, *[1] * (x0.dim() - 1))
        self.denoiser.train()
        prediction = self((1 - part) * x0 + part * noise, t_B)
        self.denoiser.eval()
        return (prediction.float() - (noise - x0)).square().mean()

    def row(self) -> Bare:
        """The same for a single row."""
        return Bare(self.policy, self.x[:1], self.t_B[:1], self.texts[:1])


_numbers = itertools.count()


def fresh_prompts(count: int) -> list[Prompt]:
    """Prompts that no call had before."""
    return [Prompt(text=f"a red circle on a cyan background {next(_numbers)}") for _ in range(count)]


# -- measuring --------------------------------------------------------------------------------------------------------


def in_turn(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median seconds of each, one after the other in every repeat; the first time does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(1 + repeats):
        for name, function in functions.items():
            began = clock()
            function()
            seconds[name].append(clock() - began)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def clock() -> float:
    if not GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def with_peak(work: Callable[[], dict[str, float]]) -> tuple[dict[str, float], int]:
    """What `work` returns, and the most bytes that the GPU held meanwhile."""
    if not GPU:
        return work(), 0
    torch.cuda.reset_peak_memory_stats()
    return work(), torch.cuda.max_memory_allocated()


def operations(row: Bare) -> dict[str, float]:
    """Floating-point operations of the denoiser on one row: of a forward pass, and of a training step."""
    with torch.no_grad():
        forward = flops_of(lambda: row(row.x, row.t_B))
    return {"forward": forward, "step": flops_of(lambda: row.loss(row.x).backward())}


def flops_of(function: Callable[[], Any]) -> int:
    # The counter does not know the CPU's fused attention, nor what is inside compiled code.
    kernels = nullcontext() if GPU else sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, kernels, torch.compiler.set_stance("force_eager"):
        function()
    return counter.get_total_flops()


def matmul_rate(dtype: str) -> float:
    """The best of ten products of large square matrices, in operations a second."""
    size = 8192 if GPU else 1024
    device = "cuda" if GPU else "cpu"
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    seconds = []
    for _ in range(11):
        began = clock()
        a @ b
        seconds.append(clock() - began)
    return 2 * size**3 / min(seconds[1:])


def overhead(output: str) -> float:
    """Seconds of a whole round over the sum of its stages, less one."""
    config = configured("demo", output, "throughput-round", {"rounds": 1, "evaluation.seeds_per_prompt": 1})
    began = time.perf_counter()
    result = run(config)
    whole = time.perf_counter() - began
    loading = time.perf_counter()
    load_pipeline(ModelConfig(path="shapes"))
    loading = time.perf_counter() - loading
    stages = sum(cost.seconds for report in result.reports for cost in report.ledger)
    return max(0.0, whole - loading - stages) / stages


def device_name() -> str:
    return torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} thread(s)"


if __name__ == "__main__":
    main()
