"""The frozen weights of a denoiser split over the processes, for models that are too large for one device.

FSDP2 of torch splits what is frozen. What is trained, a LoRA, is small: every process has all of it, so gradients,
optimizer, moving average, checkpoints and export are what they are without. Each pass through the denoiser gathers
its blocks one after the other from all processes, which therefore have to make the same passes: `idle_turns` says
who joins in without work of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from .errors import ConfigError


def sharded(accelerator: Accelerator) -> bool:
    """Whether the weights are to be split: several processes, and `accelerate launch --use_fsdp`."""
    return accelerator.num_processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")


def is_split(model: torch.nn.Module) -> bool:
    """Whether `shard` has split the weights of this denoiser."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def shard(policy: Any, accelerator: Accelerator) -> None:
    """Split the frozen weights of a diffusion policy over the processes, in place and block by block, and bring the
    rest of its pipeline to the device. The weights may be on the CPU before.

    Raises:
        ConfigError: full fine-tuning, which leaves nothing frozen; a model that does not name its blocks.
    """
    if policy.modality == "text":
        raise ConfigError("--use_fsdp is for diffusion models: texts end at other places in each process; leave it out")
    denoiser, trained = policy.denoiser, set(policy.parameters())
    if policy.adapter.method == "full":
        raise ConfigError("adapter.method: full trains every weight, and only frozen ones can be split; set it to lora")
    blocks = getattr(denoiser, "_no_split_modules", None)
    if not blocks:
        raise ConfigError(f"{type(denoiser).__name__} names no blocks to split; launch without --use_fsdp")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in reversed(list(denoiser.modules())):  # inner blocks before those that hold them
        if module is denoiser or type(module).__name__ in blocks:
            # Also the root is split again after each pass: saving, by the main process alone, would split it there.
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    for parameter in trained:
        parameter.data = parameter.data.to(accelerator.device)
    for component in policy.pipeline.components.values():
        if isinstance(component, torch.nn.Module) and component is not denoiser:
            component.to(accelerator.device)


def idle_turns(work: int, accelerator: Accelerator) -> int:
    """How many passes this process has to join in beyond its own share, where `work` is shared out in turn: 1 if
    others have one unit more, else 0; and 0 where no weights are split."""
    last = work % accelerator.num_processes
    return int(bool(last) and accelerator.process_index >= last and sharded(accelerator))
