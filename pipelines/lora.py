"""Which layers of a denoiser carry the LoRA."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raftdiff.errors import ConfigError

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def lora_targets(denoiser: torch.nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of the layers of `denoiser` that carry the LoRA.

    Raises:
        ConfigError: no layer has such a name.
    """
    if targets == "attention":
        endings = ATTENTION
    elif isinstance(targets, str):
        kinds = (torch.nn.Linear,) if targets == "linear" else (torch.nn.Linear, torch.nn.Conv2d)
        return [name for name, module in denoiser.named_modules() if isinstance(module, kinds)]
    else:
        endings = list(targets)
    found = [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        and any(name == ending or name.endswith(f".{ending}") for ending in endings)
    ]
    if not found:
        layers = sorted({n.rsplit(".", 1)[-1] for n, m in denoiser.named_modules() if isinstance(m, torch.nn.Linear)})
        raise ConfigError(f"adapter.targets: no layer is called {endings}; linear layers here: {', '.join(layers)}")
    return found
