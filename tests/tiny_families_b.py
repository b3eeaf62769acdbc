"""More stock diffusers pipelines, tiny and with random weights, built in memory: newer flow-matching families whose
text encoders are language models (Flux 2, Qwen-Image, Z-Image), SD 3.5, and models distilled to a few steps.

Pictures are 16x16 pixels and latents 8x8, before packing. The weights are a function of the builder alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tiny_models import WIDTH, t5, text_config, tokenizer, unet, vae
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from raftdiff.shapes.captions import vocabulary

# -- tokenizers: every word of a caption or of a pipeline's template is one token --------------------------------------

QWEN_TEMPLATE = (
    "system user assistant Describe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:"
)
QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking|default(true) %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL_CHAT = (
    "<s>{% for message in messages %}{% set name = {'system': 'SYSTEM_PROMPT', 'user': 'INST'}[message.role] %}"
    "[{{ name }}]{% for part in message.content %}{{ part.text }}{% endfor %}[/{{ name }}]{% endfor %}"
)


def byte_pairs(text: str, special: list[str]) -> Tokenizer:
    """A byte-level BPE that cuts texts up as Qwen's does, in which each word of a caption or of `text` is one token."""
    backend = Tokenizer(models.BPE())
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, show_progress=False, special_tokens=special, initial_alphabet=alphabet
    )
    backend.train_from_iterator(
        (form for word in [*vocabulary(), *text.split()] for form in (word, f" {word}")), trainer
    )
    return backend


@cache
def qwen_tokenizer() -> Qwen2Tokenizer:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    model = json.loads(byte_pairs(QWEN_TEMPLATE, special).to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        additional_special_tokens=special[1:],
        chat_template=QWEN_CHAT,
        model_max_length=2048,
    )


@cache
def pixtral_processor() -> PixtralProcessor:
    special = ["<unk>", "<s>", "</s>", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    special += ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"]
    words = PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs(SYSTEM_MESSAGE, special),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=special[4:],
        padding_side="left",
        model_max_length=2048,
    )
    images = PixtralImageProcessor(size={"longest_edge": 16}, patch_size={"height": 8, "width": 8})
    return PixtralProcessor(image_processor=images, tokenizer=words, patch_size=8, chat_template=MISTRAL_CHAT)


# -- text encoders -----------------------------------------------------------------------------------------------------


def language_model(layers: int, vocabulary_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary_size,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 0,
    }


def qwen3(layers: int) -> Qwen3Config:
    return Qwen3Config(**language_model(layers, len(qwen_tokenizer())), tie_word_embeddings=True, use_cache=False)


def qwen2_vl() -> Qwen2_5_VLForConditionalGeneration:
    ids = qwen_tokenizer().convert_tokens_to_ids
    text = language_model(2, len(qwen_tokenizer()))
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": 8,
        "fullatt_block_indexes": [0],
    }
    special = {"image_token_id": ids("<think>"), "video_token_id": ids("</think>")}  # of which there are none in texts
    special |= {"vision_start_token_id": ids("<|im_start|>"), "vision_end_token_id": ids("<|im_end|>")}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **special)
    )


def mistral3(layers: int) -> Mistral3ForConditionalGeneration:
    tokens = pixtral_processor().tokenizer
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 16,
        "patch_size": 8,
    }
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            vision_config=vision,
            text_config={"model_type": "mistral"} | language_model(layers, len(tokens)),
            image_token_index=tokens.convert_tokens_to_ids("[IMG]"),
            spatial_merge_size=1,
            tie_word_embeddings=True,
        )
    )


# -- parts -------------------------------------------------------------------------------------------------------------


def lively(pipeline: Any) -> Any:
    """The pipeline with all its matrices but the VAE's drawn anew, so large that no signal dies away on its way.

    As the libraries draw them, small ones leave pictures that hardly know their prompt, and some begin at zero.
    """
    generator = torch.Generator().manual_seed(0)
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module) and name != "vae":
            gain = 1.5 if name in ("unet", "transformer") else 1.0
            for weight in component.parameters():
                if weight.dim() > 1:
                    fan_in = weight[0].numel()
                    weight.data = gain * fan_in**-0.5 * torch.randn(weight.shape, generator=generator)
    return pipeline


def flux2_vae() -> AutoencoderKLFlux2:
    """Its latents are packed 2x2 and standardised by the running statistics of a batch norm."""
    built = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    built.bn.running_mean.normal_(0, 0.3)
    built.bn.running_var.uniform_(0.5, 2.0)
    return built


def qwen_vae() -> AutoencoderKLQwenImage:
    """A video autoencoder of one frame; its latents have a mean and a deviation of their own for each channel."""
    built = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.5, 0.2, 0.0, 0.7],
        latents_std=[1.5, 0.8, 2.0, 1.0],
    )
    built.decoder.conv_out.weight.data *= 4  # pale otherwise
    return built


def flux2_transformer(text_width: int, guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=text_width,
        timestep_guidance_channels=16,
        mlp_ratio=2.0,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def dynamic_shifting() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def turbo(scheduler: type) -> Any:
    """The scheduler of a model distilled to 1 to 4 steps, which begin at the very end of the noise schedule."""
    return scheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        steps_offset=1,
        timestep_spacing="trailing",
    )


# -- pipelines: flow matching ------------------------------------------------------------------------------------------


def flux_schnell() -> FluxPipeline:
    """Distilled to 1 to 4 steps: no guidance input, and a schedule that is not shifted."""
    torch.manual_seed(0)
    return lively(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
            vae=vae(scaling_factor=0.36, shift_factor=0.11),
            text_encoder=CLIPTextModel(text_config()),
            tokenizer=tokenizer(),
            text_encoder_2=t5(WIDTH),
            tokenizer_2=tokenizer(),
            transformer=FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH,
                axes_dims_rope=(4, 4, 8),
                guidance_embeds=False,
            ),
        )
    )


def flux2() -> Flux2Pipeline:
    """Three hidden layers of Mistral 3 condition it, after a system message; its guidance is an input of the model."""
    torch.manual_seed(0)
    return lively(
        Flux2Pipeline(
            scheduler=dynamic_shifting(),
            vae=flux2_vae(),
            text_encoder=mistral3(layers=30),
            tokenizer=pixtral_processor(),
            transformer=flux2_transformer(3 * WIDTH, guidance_embeds=True),
        )
    )


def flux2_klein(is_distilled: bool = False) -> Flux2KleinPipeline:
    """Guided against the empty prompt, which cannot be another one."""
    torch.manual_seed(0)
    return lively(
        Flux2KleinPipeline(
            scheduler=dynamic_shifting(),
            vae=flux2_vae(),
            text_encoder=Qwen3ForCausalLM(qwen3(layers=27)),
            tokenizer=qwen_tokenizer(),
            transformer=flux2_transformer(3 * WIDTH, guidance_embeds=False),
            is_distilled=is_distilled,
        )
    )


def flux2_klein_distilled() -> Flux2KleinPipeline:
    """Distilled to 4 steps, which its `model_index.json` says; it ignores guidance."""
    return flux2_klein(is_distilled=True)


def qwen_image() -> QwenImagePipeline:
    """Prompts are as long as they are, beside a mask that is there only where they differ. What it makes of guidance
    has the length of the prediction with the prompt."""
    torch.manual_seed(0)
    return lively(
        QwenImagePipeline(
            scheduler=dynamic_shifting(),
            vae=qwen_vae(),
            text_encoder=qwen2_vl(),
            tokenizer=qwen_tokenizer(),
            transformer=QwenImageTransformer2DModel(
                patch_size=2,
                in_channels=16,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                axes_dims_rope=(4, 6, 6),
            ),
        )
    )


def z_image() -> ZImagePipeline:
    """A list of embeddings, each as long as its prompt. Time runs backwards, and so does what it predicts; guidance g
    is g - 1 here."""
    torch.manual_seed(0)
    return lively(
        ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(scaling_factor=0.36, shift_factor=0.11),
            text_encoder=Qwen3Model(qwen3(layers=2)),
            tokenizer=qwen_tokenizer(),
            transformer=ZImageTransformer2DModel(
                in_channels=4,
                dim=32,
                n_layers=1,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=WIDTH,
                axes_dims=[4, 6, 6],
                axes_lens=[1024, 16, 16],
            ),
        )
    )


def sd35() -> StableDiffusion3Pipeline:
    """As SD 3.5 medium: queries and keys are normalised, and the first block attends to the picture twice."""
    torch.manual_seed(0)
    return lively(
        StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=2 * WIDTH,
                caption_projection_dim=16,
                pooled_projection_dim=2 * WIDTH,
                pos_embed_max_size=16,
                qk_norm="rms_norm",
                dual_attention_layers=(0,),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(scaling_factor=1.5, shift_factor=0.06),
            text_encoder=CLIPTextModelWithProjection(text_config()),
            tokenizer=tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(text_config()),
            tokenizer_2=tokenizer(),
            text_encoder_3=t5(2 * WIDTH),
            tokenizer_3=tokenizer(),
        )
    )


# -- pipelines: distilled to a few steps -------------------------------------------------------------------------------


def consistency_model(pipeline: type) -> Any:
    """The guidance scale is an input of the UNet; each step predicts x_0 and adds noise to it anew."""
    torch.manual_seed(0)
    return lively(
        pipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(text_config()),
            tokenizer=tokenizer(),
            unet=unet(cross_attention_dim=WIDTH, time_cond_proj_dim=8),
            scheduler=LCMScheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def lcm() -> LatentConsistencyModelPipeline:
    """Its last `step` gives x_0 as `denoised`, which is decoded."""
    return consistency_model(LatentConsistencyModelPipeline)


def sd_lcm() -> StableDiffusionPipeline:
    return consistency_model(StableDiffusionPipeline)


def sd_turbo() -> StableDiffusionPipeline:
    """SD 2.1 distilled to 1 to 4 steps."""
    torch.manual_seed(0)
    return lively(
        StableDiffusionPipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(text_config()),
            tokenizer=tokenizer(),
            unet=unet(cross_attention_dim=WIDTH, use_linear_projection=True),
            scheduler=turbo(EulerDiscreteScheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def sdxl_turbo() -> StableDiffusionXLPipeline:
    """SDXL distilled to 1 to 4 steps, between which noise is added."""
    torch.manual_seed(0)
    return lively(
        StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(text_config()),
            text_encoder_2=CLIPTextModelWithProjection(text_config()),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=unet(
                cross_attention_dim=2 * WIDTH,
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=6 * 4 + WIDTH,
                use_linear_projection=True,
            ),
            scheduler=turbo(EulerAncestralDiscreteScheduler),
            add_watermarker=False,
        )
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "flux-schnell": flux_schnell,
    "flux2": flux2,
    "flux2-klein": flux2_klein,
    "flux2-klein-distilled": flux2_klein_distilled,
    "qwen-image": qwen_image,
    "z-image": z_image,
    "sd35": sd35,
    "lcm": lcm,
    "sd-lcm": sd_lcm,
    "sd-turbo": sd_turbo,
    "sdxl-turbo": sdxl_turbo,
}

CALLS: dict[str, dict[str, Any]] = {name: {"height": 16, "width": 16} for name in FAMILIES} | {
    "flux2": {"height": 16, "width": 16, "max_sequence_length": 64},  # a system message of some 40 tokens included
    "flux2-klein": {"height": 16, "width": 16, "max_sequence_length": 32},
    "flux2-klein-distilled": {"height": 16, "width": 16, "max_sequence_length": 32},
}
"""The arguments of `__call__` that a picture of each family needs here; without sequence lengths it takes longer."""
