"""A pipeline as the configuration wants it: loaded, on its device, with its scheduler and attention kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raftdiff.config import ModelConfig
from raftdiff.errors import ConfigError, MissingExtraError, WeightsError
from raftdiff.registry import nearest
from raftdiff.shapes import WEIGHTS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_pipeline(model: ModelConfig, device: str = "cpu") -> Any:
    """The pipeline that `model` names, configured, on its device.

    Raises:
        WeightsError: it is missing, incomplete, or not in safetensors.
        ConfigError: a scheduler or an attention kernel that does not exist here.
    """
    from diffusers import DiffusionPipeline

    path = str(WEIGHTS / "pipeline") if model.path == "shapes" else model.path
    if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
        raise WeightsError(f"{path}: no model_index.json there; give the folder of a saved diffusers pipeline")
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            path,
            revision=model.revision,
            variant=model.variant,
            dtype=DTYPES[model.dtype],
            use_safetensors=True,
        )
    except Exception as error:  # the hub, safetensors, diffusers and transformers each raise their own
        raise WeightsError(
            f"model.path {model.path!r} cannot be loaded: {' '.join(str(error).split())[:300]}; "
            "give `shapes`, a folder saved by diffusers, or a hub id (a download that broke off resumes when repeated)"
        ) from error
    pipeline.to(device if model.device == "auto" else model.device)
    if model.scheduler:
        pipeline.scheduler = _scheduler(model.scheduler, pipeline.scheduler)
    denoiser: Any = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    if model.attention == "xformers":
        try:
            denoiser.enable_xformers_memory_efficient_attention()
        except Exception as error:
            raise MissingExtraError(
                f"model.attention: xformers cannot be used here ({error}); "
                "pip install 'raftdiff[xformers]' on a machine with a CUDA GPU, or set it to sdpa"
            ) from error
    if model.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    return pipeline


def _scheduler(name: str, current: Any) -> Any:
    import diffusers

    names = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    if name not in names:
        raise ConfigError(f"model.scheduler: diffusers has no {name!r}{nearest(name, names)}")
    return getattr(diffusers, name).from_config(current.config)


def load_lora(pipeline: Any, path: str) -> None:
    """Fold a LoRA into the weights of a pipeline, which can then carry the LoRA of a policy as any other can.

    Raises:
        WeightsError: it is missing, or was made for another model.
    """
    if not Path(path).exists():
        raise WeightsError(f"{path}: there is no LoRA; a finished run has one in its folder `lora`")
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    try:
        pipeline.load_lora_weights(path)
        loaded = any("lora_" in name for name, _ in denoiser.named_parameters())
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    except Exception as error:  # diffusers, peft and safetensors each raise their own
        raise WeightsError(
            f"{path} does not fit {type(pipeline).__name__}: {' '.join(str(error).split())[:300]}; "
            "use the base that it was trained from"
        ) from error
    if not loaded:
        raise WeightsError(f"{path} holds no LoRA for the {type(denoiser).__name__} of this pipeline")
