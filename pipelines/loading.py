"""A pipeline as the configuration wants it: loaded, on its device, with the settings for memory and speed."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import attention_backend
from diffusers.models import attention_processor as processors

from raftdiff.config import ModelConfig
from raftdiff.errors import ConfigError, MissingExtraError, WeightsError
from raftdiff.registry import nearest
from raftdiff.shapes import WEIGHTS

from .lora import adapters_on, base_differs, read_adapter, remove_adapters, weight_files

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Those that diffusers has twins of for xformers. It would put a plain one in the place of any other, which then takes
# no notice of rotary embeddings and the like.
WITH_TWINS = (
    processors.AttnProcessor,
    processors.AttnProcessor2_0,
    processors.AttnAddedKVProcessor,
    processors.AttnAddedKVProcessor2_0,
    processors.JointAttnProcessor2_0,
)
GRAPHS = 64  # of one block that torch.compile makes before it gives up; its own 8 are too few


def load_pipeline(model: ModelConfig, device: str = "cpu") -> Any:
    """The pipeline that `model` names, on its device; `configure` does the rest.

    Raises:
        WeightsError: it is missing, incomplete, or not in safetensors.
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
    return pipeline.to(device if model.device == "auto" else model.device)


def configure(pipeline: Any, model: ModelConfig) -> None:
    """Apply the settings of `model` to a pipeline that is loaded and on its device, before a LoRA is attached.

    Raises:
        ConfigError: one that this pipeline or this device cannot follow.
        MissingExtraError: an attention kernel that is not installed.
    """
    denoiser = denoiser_of(pipeline)
    if denoiser is None or not hasattr(pipeline, "encode_prompt"):
        return  # DiffusionPolicy says what is wrong with such a pipeline
    _check_inputs(pipeline)
    _check_size(pipeline, denoiser, model)
    if model.scheduler:
        pipeline.scheduler = _scheduler(model.scheduler, pipeline)
    if model.attention != "sdpa":
        _set_attention(denoiser, model.attention)
    if model.vae_slicing:
        _switch_on(getattr(pipeline, "vae", None), "enable_slicing", "vae_slicing")
    if model.vae_tiling:
        _switch_on(getattr(pipeline, "vae", None), "enable_tiling", "vae_tiling")
    if model.gradient_checkpointing:
        _switch_on(denoiser, "enable_gradient_checkpointing", "gradient_checkpointing")
    if model.offload == "components":
        if denoiser.device.type == "cpu":
            raise ConfigError(
                "model.offload: this pipeline is on the CPU, which nothing can make room on; set it to none"
            )
        offload_components(pipeline)


def denoiser_of(pipeline: Any) -> Any:
    """What is trained: the denoiser of a pipeline, or the model of a `LanguageModel`."""
    return getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)


def _check_inputs(pipeline: Any) -> None:
    """Raise ConfigError where the pipeline wants a picture beside the prompt."""
    wanted = inspect.signature(type(pipeline).__call__).parameters.keys() & {"image", "control_image"}
    if not wanted:
        return
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING  # imports every pipeline there is

    optional = type(pipeline) in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()
    if not optional or "control_image" in wanted or "controlnet" in pipeline.components:
        raise ConfigError(
            f"{type(pipeline).__name__} makes pictures from pictures (`{min(wanted)}`), and raftdiff aligns "
            "text-to-image: give the text-to-image pipeline of this model"
        )


def _check_size(pipeline: Any, denoiser: Any, model: ModelConfig) -> None:
    """Raise ConfigError for a height or width that the pipeline would refuse or round."""
    multiple = size_multiple(pipeline, denoiser)
    for name, size in (("height", model.height), ("width", model.width)):
        if size is not None and size % multiple:
            nearby = [s for s in (size // multiple * multiple, (size // multiple + 1) * multiple) if s]
            raise ConfigError(
                f"model.{name}: {type(pipeline).__name__} takes multiples of {multiple} pixels, not {size}; "
                f"set it to {' or '.join(map(str, nearby))}"
            )


def size_multiple(pipeline: Any, denoiser: Any) -> int:
    """What height and width must be multiples of, in pixels: a patch of the denoiser or a token of packed latents, and
    8, which the older pipelines have in their checks whatever their VAE."""
    patch = denoiser.config.get("patch_size")
    factor = getattr(pipeline, "vae_scale_factor", 1) * (patch if isinstance(patch, int) else 1)
    processor = getattr(pipeline, "image_processor", None)
    return math.lcm(8, factor, processor.config.vae_scale_factor if processor else 1)


def _scheduler(name: str, pipeline: Any) -> Any:
    import diffusers

    current = pipeline.scheduler

    names = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    if name not in names:
        raise ConfigError(f"model.scheduler: diffusers has no {name!r}{nearest(name, names)}")
    kind, config = getattr(diffusers, name), dict(current.config)
    # Some clip x_0 to [-1, 1] unless told otherwise, which is meant for pixels and would spoil latents; and what some
    # call the shift of flow matching is flow_shift to others.
    implied = {"clip_sample": False, "shift": config.get("flow_shift", 1.0)}
    known = inspect.signature(kind).parameters
    scheduler = kind.from_config({key: value for key, value in implied.items() if key in known} | config)
    if _matches_flows(scheduler) != _matches_flows(current):
        raise ConfigError(
            f"model.scheduler: {name} {'is' if _matches_flows(scheduler) else 'is not'} for flow matching, unlike the "
            f"{type(current).__name__} of this {type(pipeline).__name__}; leave it out, or give one of the same kind"
        )
    return scheduler


def _matches_flows(scheduler: Any) -> bool:
    kind, config = type(scheduler), scheduler.config
    able = "use_flow_sigmas" in inspect.signature(kind).parameters  # by the configuration alone it cannot be told
    told = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return kind.__name__.startswith("FlowMatch") or bool(able and told)


def _set_attention(denoiser: Any, kernels: str) -> None:
    door = attention_door(denoiser)
    where = f"model.attention: {kernels}"
    if door is None or (kernels == "flash" and door == "xformers"):
        raise ConfigError(f"{where} has no way into {type(denoiser).__name__}; set it to sdpa")
    if denoiser.device.type != "cuda":
        raise ConfigError(f"{where} needs an NVIDIA GPU, and this model is on {denoiser.device.type}; set it to sdpa")
    if kernels == "flash" and denoiser.dtype == torch.float32:
        raise ConfigError(f"{where} computes in 16 bits; set model.dtype to bf16 or fp16, or this to sdpa")
    try:
        if door == "dispatch":
            dispatch_attention(denoiser, kernels)
        else:
            denoiser.enable_xformers_memory_efficient_attention()
    except Exception as error:  # import errors, missing kernels, versions that do not fit
        package = {"xformers": "'raftdiff[xformers]'", "flash": "flash-attn"}[kernels]
        raise MissingExtraError(
            f"{where} cannot be used here ({' '.join(str(error).split())[:200]}); pip install {package}, "
            "or set it to sdpa"
        ) from error


def attention_door(denoiser: Any) -> str | None:
    """How the attention kernels of a model are chosen: `dispatch` for `set_attention_backend`, `xformers` for
    `enable_xformers_memory_efficient_attention`, None for neither. Each is silently without effect, or worse, where
    it is not meant to be used."""
    used = [p for module in denoiser.modules() if (p := getattr(module, "processor", None)) is not None]
    if used and all(hasattr(processor, "_attention_backend") for processor in used):
        return "dispatch"
    return "xformers" if used and all(type(processor) in WITH_TWINS for processor in used) else None


def dispatch_attention(denoiser: Any, backend: str) -> None:
    """Choose a backend of diffusers for this model alone: by itself, diffusers makes it every other model's too."""
    with attention_backend():  # puts back the one that others use
        denoiser.set_attention_backend(backend)


def _switch_on(component: Any, method: str, setting: str) -> None:
    try:
        getattr(component, method)()
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise ConfigError(f"model.{setting}: {type(component).__name__} does not have it; leave it out") from error


def offload_components(pipeline: Any) -> None:
    """Keep all but the denoiser on the CPU, and bring each layer to the device of the denoiser while it computes."""
    denoiser = denoiser_of(pipeline)
    [name] = [n for n, component in pipeline.components.items() if component is denoiser]
    pipeline.enable_group_offload(denoiser.device, offload_type="leaf_level", exclude_modules=name)


def compile_denoiser(denoiser: Any, **options: Any) -> None:
    """Compile in place, so that names stay as they are; after a LoRA is attached, which would change the layers.

    `options` are those of `torch.compile`.
    """
    # UNets have blocks of several widths, and each is compiled for sampling, training, the reference and batch sizes.
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    if getattr(denoiser, "_repeated_blocks", None):
        denoiser.compile_repeated_blocks(**options)
    else:
        denoiser.compile(**options)


def load_lora(pipeline: Any, path: str) -> None:
    """Fold a LoRA into the weights of a pipeline, which can then carry the LoRA of a policy as any other can.

    It warns as `attach_lora` does, and raises what that raises.
    """
    attach_lora(pipeline, Path(path), "folded")
    if hasattr(pipeline, "fuse_lora"):
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    else:
        remove_adapters(denoiser_of(pipeline), merge=True)


def attach_lora(pipeline: Any, path: Path, name: str) -> None:
    """Load the LoRA at `path`, a folder or a safetensors file, as the adapter `name` beside those that are there.

    It warns where the LoRA says that it was trained from other weights, such as those before a fine-tune.

    Raises:
        WeightsError: it is missing, damaged, or made for another model.
    """
    if not weight_files(path):
        raise WeightsError(f"{path}: there is no LoRA in safetensors; a finished run has one in its folder `lora`")
    denoiser = denoiser_of(pipeline)
    differs = base_differs(denoiser, path)
    try:
        with warnings.catch_warnings(action="ignore"):  # peft warns of every second adapter
            read_adapter(pipeline, denoiser, path, name)
    except Exception as error:  # diffusers, peft and safetensors each raise their own
        raise WeightsError(
            f"{path} does not fit {type(pipeline).__name__}: {' '.join(str(error).split())[:300]}; "
            "use the base that it was trained from"
        ) from error
    if name not in adapters_on(denoiser):
        raise WeightsError(f"{path} holds no LoRA for the {type(denoiser).__name__} of this pipeline")
    if differs:
        logger.warning("%s was trained from other weights than these: it loads, but was not measured on them", path)
