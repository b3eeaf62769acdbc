"""What the settings for memory and speed do, each against the defaults, in a process of its own.

    python -m benchmarks.memory                        # an SD1.5-shaped random model at 128 pixels, batches of 2
    python -m benchmarks.memory --models shapes --settings bf16 compile

Memory is that of the weights and the optimizer's state, and the peak on top of them while sampling and training. On a
GPU the peak is the allocator's; on the CPU (Linux) it is that of resident memory, and seconds are those of computing,
which other processes on the machine change less than those of the clock.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from benchmarks.common import arguments, table
from raftdiff.algorithms.raft import Raft
from raftdiff.build import build_accelerator, build_policy
from raftdiff.config import RunConfig, parse_config
from raftdiff.errors import RaftdiffError
from raftdiff.pipelines.loading import load_pipeline
from raftdiff.training import Trainer
from raftdiff.types import Example, Prompt

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "defaults": {},
    "bf16": {"model": {"dtype": "bf16"}, "training": {"precision": "bf16"}},
    "gradient_checkpointing": {"model": {"gradient_checkpointing": True}},
    "micro_batch_size-1": {"training": {"micro_batch_size": 1}},
    "sampling-batch_size-1": {"sampling": {"batch_size": 1}},
    "vae_slicing": {"model": {"vae_slicing": True}},
    "adamw8bit": {"training": {"optimizer": "adamw8bit"}},
    "offload": {"model": {"offload": "components"}},
    "xformers": {"model": {"attention": "xformers", "dtype": "bf16"}, "training": {"precision": "bf16"}},
    "flash": {"model": {"attention": "flash", "dtype": "bf16"}, "training": {"precision": "bf16"}},
    "compile": {"model": {"compile": True}},
}
GB = 1e9
# Without these, the C library keeps what is freed, and a peak does not show.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}


def main() -> None:
    os.environ.update(GIVE_BACK)  # for the processes that measure
    default = [name for name in SETTINGS if name != "compile"]
    options = arguments(__doc__ or "", models=["sd15"], settings=default, size=128, batch=2, repeats=1)
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            path = saved(model, folder)
            values = {"path": path} | ({} if model == "shapes" else {"height": options.size, "width": options.size})
            found = {
                name: apart(measure, values, SETTINGS[name], options.batch, options.repeats)
                for name in dict.fromkeys(["defaults", *options.settings])
            }
        show(model, found)


def saved(model: str, folder: str) -> str:
    """Where the pipeline is loaded from; the random one is made in a process of its own, whose memory ends with it."""
    return model if model == "shapes" else apart(save_sd15, folder)


def save_sd15(folder: str) -> str:
    from benchmarks.architectures import sd15

    sd15().save_pretrained(folder)
    return folder


def apart(function: Callable[..., Any], *values: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *values).result()


def measure(model: dict[str, Any], settings: dict[str, dict[str, Any]], batch: int, repeats: int) -> list[float] | str:
    """GB that last, seconds and GB of sampling a batch in one step and of a training step; or why not."""
    plain: dict[str, dict[str, Any]] = {
        "model": model,
        "adapter": {"rank": 16},
        "sampling": {"batch_size": batch, "num_inference_steps": 1, "guidance_scale": 1.0},
        "training": {"batch_size": batch, "steps": 1, "learning_rate": 1e-5},
    }
    merged = {section: values | settings.get(section, {}) for section, values in plain.items()}
    try:
        return measured(parse_config(merged, where="benchmark"), batch, repeats)
    except RaftdiffError as error:
        return str(error)


def measured(config: RunConfig, batch: int, repeats: int) -> list[float]:
    accelerator = build_accelerator(config)
    policy = build_policy(config, load_pipeline(config.model, str(accelerator.device)))
    trainer = Trainer(policy, Raft(), config.training, seed=0, rounds=repeats + 2, accelerator=accelerator)
    prompts, seeds = [Prompt(text="a red circle")] * batch, list(range(batch))
    examples = [Example(sample=sample) for sample in policy.sample(prompts, seeds)]
    trainer.train(examples, round=1)  # as the samples above, a first time that is not measured
    sampling = timed(lambda round: policy.sample(prompts, seeds), repeats)
    training = timed(lambda round: trainer.train(examples, round=round), repeats)
    return [lasting(policy.pipeline, trainer) / GB, *sampling, *training]


def lasting(pipeline: Any, trainer: Trainer) -> int:
    """Bytes of the weights that are on the device all the time, and of the optimizer's state."""
    device = trainer.parameters[0].device
    modules = [m for m in pipeline.components.values() if isinstance(m, torch.nn.Module)]
    tensors = [p for module in modules for p in module.parameters() if p.device == device]
    tensors += [t for state in trainer.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def timed(work: Callable[[int], Any], repeats: int) -> tuple[float, float]:
    """The shortest of `repeats` seconds, and the peak of memory in GB on top of what there was before."""
    before = memory()
    forget_peak()
    seconds = []
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    for i in range(repeats):
        began = clock()
        work(i + 2)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(clock() - began)
    return min(seconds), (memory(peak=True) - before) / GB


def memory(peak: bool = False) -> float:
    """Bytes of the GPU's allocator or, without a GPU, of resident memory: now, or at most since `forget_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    name = "VmHWM" if peak else "VmRSS"
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return float(line.split()[1]) * 1024


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def show(model: str, found: dict[str, list[float] | str]) -> None:
    base = found["defaults"]
    if isinstance(base, str):
        raise SystemExit(base)
    rows = []
    for name, values in found.items():
        if isinstance(values, str):
            rows.append([name, escape(values)])
            continue
        kept, drawing, training = (f"{gigabytes:.3f}" for gigabytes in values[::2])
        times = [f"{seconds / first:.2f}x" for seconds, first in zip(values[1::2], base[1::2], strict=True)]
        rows.append([name, kept, times[0], drawing, times[1], training])
    columns = ["setting", "lasting GB", "sampling", "+ GB", "training", "+ GB"]
    title = f"\n{model}: memory, and time against the defaults' ({base[1]:.3g} s and {base[3]:.3g} s)"
    table(title, columns, [row for row in rows if len(row) > 2])
    if any(len(row) == 2 for row in rows):
        table("\nNot possible here", ["setting", "why"], [row for row in rows if len(row) == 2])


if __name__ == "__main__":
    main()
