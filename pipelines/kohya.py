"""The names under which ComfyUI and the Stable Diffusion web UIs look for the weights of a LoRA.

None of them reads the alpha in the header of a diffusers file, so the scale is in the tensors here. diffusers loads
these files as well.

* UNets: the names of kohya-ss/sd-scripts (`lora_unet_<layer>.lora_down.weight`), with an alpha beside each layer.
* SD3 and Flux: the names of diffusers, which ComfyUI knows, with the scale multiplied into B.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from raftdiff.errors import ConfigError

UNETS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
TRANSFORMERS = ("StableDiffusion3Pipeline", "FluxPipeline")
RENAMED = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
"""Layers that diffusers knows in such files by the name of the original SDXL alone."""
BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
OUTSIDE = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2", *RENAMED)
"""Layers of a UNet outside of its blocks that have a name there."""


def kohya_state(pipeline: str, state: Mapping[str, torch.Tensor], rank: int, alpha: float) -> dict[str, torch.Tensor]:
    """The LoRA of a denoiser under the names of other programs.

    Args:
        pipeline: the name of its pipeline's class.
        state: `<layer>.lora_A.weight` and `<layer>.lora_B.weight` of every layer.
        rank, alpha: of all layers; the scale is alpha / rank.

    Raises:
        ConfigError: other programs have no names for this family, or for some of the layers.
    """
    if pipeline in UNETS:
        return _unet_state(state, alpha)
    if pipeline in TRANSFORMERS:
        scale = alpha / rank
        return {
            f"transformer.{name}": tensor * scale if ".lora_B." in name else tensor for name, tensor in state.items()
        }
    raise ConfigError(
        f"there is no kohya format for {pipeline}, only for {', '.join((*UNETS, *TRANSFORMERS))}: use the folder "
        "`lora` of the run, which diffusers loads"
    )


def _unet_state(state: Mapping[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    layers = dict.fromkeys(name.split(".lora_")[0] for name in state)
    if nameless := [layer for layer in layers if not layer.startswith(BLOCKS) and layer not in OUTSIDE]:
        raise ConfigError(
            f"these layers have no kohya name: {', '.join(nameless)}; train with adapter.targets: attention, or use "
            "the folder `lora` of the run, which diffusers loads"
        )
    renamed = {}
    for name, tensor in state.items():
        layer, part = name.split(".lora_")
        key = f"lora_unet_{RENAMED.get(layer, layer).replace('.', '_')}"
        renamed[f"{key}.lora_{'down' if part == 'A.weight' else 'up'}.weight"] = tensor
        renamed[f"{key}.alpha"] = torch.tensor(float(alpha))
    return renamed
