"""The embedded model: a small `StableDiffusionPipeline`, real in every part, for the world of `raftdiff.shapes`.

This file builds its parts from nothing; `shapes_training.py` trains them. The trained weights ship with the package and
load with `DiffusionPipeline.from_pretrained(raftdiff.shapes.WEIGHTS / "pipeline")`: no code of this project is in them.
"""

from __future__ import annotations

from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from raftdiff.shapes.captions import vocabulary

IMAGE_SIZE = 32
LATENT_CHANNELS = 16
MAX_TOKENS = 20
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer() -> CLIPTokenizer:
    """A byte-level BPE with CLIP's 512 base symbols, in which every word of a caption is one token."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    tokens = symbols + [s + "</w>" for s in symbols]
    merges: list[tuple[str, str]] = []
    for word in vocabulary():
        parts = _apply(merges, [*word[:-1], word[-1] + "</w>"])
        while len(parts) > 1:  # a merge added later ranks lower, so words already whole stay whole
            merges.append((parts[0], parts[1]))
            tokens.append(parts[0] + parts[1])
            parts = _apply(merges, parts)
    vocab = {token: i for i, token in enumerate([*dict.fromkeys(tokens), BOS, EOS])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def _apply(merges: list[tuple[str, str]], parts: list[str]) -> list[str]:
    """`parts` after byte-pair encoding: the pair of the lowest rank is merged first, until none is left."""
    rank = {pair: i for i, pair in enumerate(merges)}
    while len(parts) > 1:
        i = min(range(len(parts) - 1), key=lambda i: rank.get((parts[i], parts[i + 1]), len(rank)))
        if (parts[i], parts[i + 1]) not in rank:
            break
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2 :]]
    return parts


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_vae() -> AutoencoderKL:
    """32x32 pixels to 8x8x16 latents: 1,024 numbers, which is what crisp edges need (docs/embedded-model.md)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 32, 48),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,  # training ends by standardising the latents inside the VAE
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    """Text enters by cross-attention at the lower level and, pooled, by the time embedding: with cross-attention
    alone a model of this size learns to listen much more slowly."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 112),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        time_embedding_dim=192,
        resnet_time_scale_shift="scale_shift",
    )


def build_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,  # without effect for trailing steps; StableDiffusionPipeline warns about 0
    )


def build_pipeline() -> StableDiffusionPipeline:
    """The pipeline with random weights, as training starts from it."""
    tokenizer = build_tokenizer()
    return StableDiffusionPipeline(
        vae=build_vae(),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=build_unet(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
