"""Pipelines of published architectures with random weights, built from their published configurations.

Denoisers, autoencoders and CLIP encoders have their full size. T5-XXL is an encoder of its width with two layers: it
runs once a prompt and is no part of what is timed. The tokenizer is the embedded model's with CLIP's length, so a text
has as many tokens as the denoiser would get.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from raftdiff.pipelines.shapes import build_tokenizer

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def sd15_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def sd35_medium_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )


def flux_dev_transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    )


def sd15() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae(scaling_factor=0.18215),
        text_encoder=clip_l(CLIPTextModel),
        tokenizer=tokenizer(),
        unet=sd15_unet(),
        scheduler=on_the_cpu(DDIMScheduler, clip_sample=False, set_alpha_to_one=False, **BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=vae(sample_size=1024, scaling_factor=0.13025),
        text_encoder=clip_l(CLIPTextModel),
        text_encoder_2=clip_big_g(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=sdxl_unet(),
        scheduler=on_the_cpu(EulerDiscreteScheduler, **BETAS),
        add_watermarker=False,
    )


def sd35_medium() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=sd35_medium_transformer(),
        scheduler=on_the_cpu(FlowMatchEulerDiscreteScheduler, shift=3.0),
        vae=vae_16(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip_l(CLIPTextModelWithProjection),
        tokenizer=tokenizer(),
        text_encoder_2=clip_big_g(),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5_of_two_layers(),
        tokenizer_3=tokenizer(),
    )


def flux_dev() -> FluxPipeline:
    return FluxPipeline(
        scheduler=on_the_cpu(
            FlowMatchEulerDiscreteScheduler,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            shift=3.0,
            max_image_seq_len=4096,
        ),
        vae=vae_16(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip_l(CLIPTextModel),
        tokenizer=tokenizer(),
        text_encoder_2=t5_of_two_layers(),
        tokenizer_2=tokenizer(),
        transformer=flux_dev_transformer(),
    )


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "sd35-medium": sd35_medium,
    "flux-dev": flux_dev,
}


@contextmanager
def made_on(device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """While open, weights are made where and as they are used: a large model has no room for a copy."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def on_the_cpu(scheduler: type, **settings: Any) -> Any:
    """Schedulers compute their tables with numpy."""
    with made_on("cpu", torch.float32):
        return scheduler(**settings)


def tokenizer() -> CLIPTokenizer:
    made = build_tokenizer()
    made.model_max_length = 77
    return made


def clip_l(kind: type) -> Any:
    return kind(_clip(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))


def clip_big_g() -> CLIPTextModelWithProjection:
    sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    return CLIPTextModelWithProjection(_clip(**sizes, projection_dim=1280, hidden_act="gelu"))


def _clip(*, projection_dim: int = 768, **sizes: Any) -> CLIPTextConfig:
    tokens = build_tokenizer()
    return CLIPTextConfig(
        vocab_size=49408,
        projection_dim=projection_dim,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        **sizes,
    )


def t5_of_two_layers() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=2, num_heads=64))


def vae(**changes: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        **changes,
    )


def vae_16(**changes: Any) -> AutoencoderKL:
    return vae(latent_channels=16, sample_size=1024, use_quant_conv=False, use_post_quant_conv=False, **changes)
