"""More stock diffusers pipelines, tiny and with random weights, built in memory: Sana, PixArt-Sigma, HunyuanDiT,
Lumina 2, CogView4, Chroma, AuraFlow, Kolors and ERNIE-Image.

Latents are 8x8; pictures are 16x16, or as large as `CALLS` says where the family wants a larger multiple. The weights
are a function of the builder alone.
"""

from __future__ import annotations

import atexit
import shutil
import string
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    KolorsPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from diffusers.pipelines.kolors import ChatGLMTokenizer
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from sentencepiece import SentencePieceTrainer
from tiny_families_b import flux2_vae, lively
from tiny_models import WIDTH, unet, vae
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    GlmConfig,
    GlmModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

LETTERS = string.ascii_letters + string.digits + string.punctuation

# -- tokenizers and text encoders: a token for each character ----------------------------------------------------------


@cache
def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -2.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


@cache
def gemma_tokenizer() -> GemmaTokenizer:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *LETTERS]
    return GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


@cache
def bert_tokenizer() -> BertTokenizer:
    letters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=77)


@cache
def glm_tokenizer() -> PreTrainedTokenizerFast:
    """As GLM-4's: byte-level, padded on the left, every text after `[gMASK] <sop>`."""
    special = ["<|endoftext|>", "[gMASK]", "<sop>"]
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    ids = {token: i for i, token in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[(token, ids[token]) for token in special[1:]]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=special[0],
        eos_token=special[0],
        additional_special_tokens=special[1:],
        padding_side="left",
        model_max_length=1024,
    )


def t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer()), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )


def gemma2() -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(gemma_tokenizer()),
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            pad_token_id=gemma_tokenizer().pad_token_id,
            bos_token_id=gemma_tokenizer().bos_token_id,
            eos_token_id=gemma_tokenizer().eos_token_id,
        )
    )


# -- parts -------------------------------------------------------------------------------------------------------------


def vae_of_8(**changes: Any) -> AutoencoderKL:
    """One that makes pictures eight times as large as latents, for pipelines that count on it."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
        **changes,
    )


# -- pipelines ---------------------------------------------------------------------------------------------------------


def sana() -> SanaPipeline:
    """Its linear attention has a ReLU, its autoencoder no posterior; an instruction stands before every prompt."""
    torch.manual_seed(0)
    return lively(
        SanaPipeline(
            tokenizer=gemma_tokenizer(),
            text_encoder=gemma2(),
            vae=AutoencoderDC(
                latent_channels=4,
                attention_head_dim=4,
                encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
                decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
                encoder_block_out_channels=(8, 8, 8),
                decoder_block_out_channels=(8, 8, 8),
                encoder_qkv_multiscales=((), (), (5,)),
                decoder_qkv_multiscales=((), (), (5,)),
                encoder_layers_per_block=(1, 1, 1),
                decoder_layers_per_block=(1, 1, 1),
                scaling_factor=0.41407,
            ),
            transformer=SanaTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=8,
                num_layers=1,
                num_cross_attention_heads=2,
                cross_attention_head_dim=8,
                cross_attention_dim=16,
                caption_channels=WIDTH,
                sample_size=8,
            ),
            scheduler=DPMSolverMultistepScheduler(
                beta_schedule="linear", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        )
    )


def pixart_sigma() -> PixArtSigmaPipeline:
    """It predicts the variance as well, which the pipeline cuts off."""
    torch.manual_seed(0)
    return lively(
        PixArtSigmaPipeline(
            tokenizer=t5_tokenizer(),
            text_encoder=t5(),
            vae=vae(scaling_factor=0.13025),
            transformer=PixArtTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=4,
                out_channels=8,
                num_layers=1,
                cross_attention_dim=16,
                sample_size=8,
                caption_channels=WIDTH,
                use_additional_conditions=False,
            ),
            scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
        )
    )


def hunyuan_dit() -> HunyuanDiTPipeline:
    """It calls `encode_prompt` once for each of its two text encoders, and predicts the variance as well."""
    torch.manual_seed(0)
    return lively(
        HunyuanDiTPipeline(
            vae=vae_of_8(scaling_factor=0.13025),
            text_encoder=BertModel(
                BertConfig(
                    vocab_size=len(bert_tokenizer()),
                    hidden_size=WIDTH,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    intermediate_size=32,
                    max_position_embeddings=77,
                )
            ),
            tokenizer=bert_tokenizer(),
            text_encoder_2=t5(),
            tokenizer_2=t5_tokenizer(),
            transformer=HunyuanDiT2DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=4,
                patch_size=2,
                sample_size=8,
                hidden_size=16,
                num_layers=4,
                mlp_ratio=2.0,
                cross_attention_dim=WIDTH,
                cross_attention_dim_t5=WIDTH,
                pooled_projection_dim=8,
            ),
            scheduler=DDPMScheduler(
                beta_start=0.00085,
                beta_end=0.02,
                beta_schedule="scaled_linear",
                prediction_type="v_prediction",
                clip_sample=False,
                steps_offset=1,
                timestep_spacing="leading",
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def lumina2() -> Lumina2Pipeline:
    """Time runs backwards in its transformer, and what goes to the scheduler is the negative of its output."""
    torch.manual_seed(0)
    return lively(
        Lumina2Pipeline(
            transformer=Lumina2Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                hidden_size=24,
                num_layers=1,
                num_refiner_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=2,
                axes_dim_rope=(4, 4, 4),
                axes_lens=(300, 16, 16),
                cap_feat_dim=WIDTH,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=vae_of_8(scaling_factor=0.36, shift_factor=0.11),
            text_encoder=gemma2(),
            tokenizer=gemma_tokenizer(),
        )
    )


def cogview4() -> CogView4Pipeline:
    """Prompts are padded on the left to a multiple of 16 tokens, and no mask says where they begin."""
    torch.manual_seed(0)
    return lively(
        CogView4Pipeline(
            tokenizer=glm_tokenizer(),
            text_encoder=GlmModel(
                GlmConfig(
                    vocab_size=len(glm_tokenizer()),
                    hidden_size=WIDTH,
                    intermediate_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=8,
                    pad_token_id=glm_tokenizer().pad_token_id,
                    eos_token_id=glm_tokenizer().eos_token_id,
                )
            ),
            vae=vae(),
            transformer=CogView4Transformer2DModel(
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                text_embed_dim=WIDTH,
                time_embed_dim=8,
                condition_dim=4,
                sample_size=8,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
            ),
        )
    )


def chroma() -> ChromaPipeline:
    """Its latents are packed as Flux's are, but its guidance is real."""
    torch.manual_seed(0)
    return lively(
        ChromaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True),
            vae=vae(scaling_factor=0.36, shift_factor=0.11),
            text_encoder=t5(),
            tokenizer=t5_tokenizer(),
            transformer=ChromaTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                axes_dims_rope=(4, 4, 8),
                approximator_num_channels=8,
                approximator_hidden_dim=32,
                approximator_layers=1,
            ),
        )
    )


def aura_flow() -> AuraFlowPipeline:
    torch.manual_seed(0)
    return lively(
        AuraFlowPipeline(
            tokenizer=t5_tokenizer(),
            text_encoder=UMT5EncoderModel(
                UMT5Config(vocab_size=len(t5_tokenizer()), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
            ),
            vae=vae(scaling_factor=0.13025),
            transformer=AuraFlowTransformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_mmdit_layers=1,
                num_single_dit_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                caption_projection_dim=16,
                pos_embed_max_size=64,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        )
    )


@cache
def chatglm_tokenizer() -> ChatGLMTokenizer:
    """A sentencepiece model, which diffusers' ChatGLMTokenizer reads from a file and copies when it is saved."""
    folder = Path(tempfile.mkdtemp(prefix="chatglm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    SentencePieceTrainer.train(
        sentence_iterator=iter(list(LETTERS)),
        model_prefix=str(folder / "tokenizer"),
        model_type="char",
        vocab_size=len(LETTERS) + 4,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return ChatGLMTokenizer(str(folder / "tokenizer.model"))


def kolors() -> KolorsPipeline:
    """SDXL's UNet on the hidden states of ChatGLM, whose weights the constructor leaves uninitialised."""
    tokenizer = chatglm_tokenizer()
    torch.manual_seed(0)
    text_encoder = ChatGLMModel(
        ChatGLMConfig(
            num_layers=2,
            padded_vocab_size=tokenizer.vocab_size,
            hidden_size=WIDTH,
            ffn_hidden_size=32,
            kv_channels=8,
            num_attention_heads=2,
            seq_length=256,
            multi_query_attention=True,
            multi_query_group_num=1,
            add_qkv_bias=True,
            original_rope=True,
        )
    )
    for name, parameter in text_encoder.named_parameters():
        parameter.data.fill_(1.0 if "norm" in name else 0.0)
    return lively(
        KolorsPipeline(
            vae=vae(scaling_factor=0.13025),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet(
                cross_attention_dim=2 * WIDTH,
                encoder_hid_dim=WIDTH,
                encoder_hid_dim_type="text_proj",
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=6 * 4 + WIDTH,
            ),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.014,
                beta_schedule="scaled_linear",
                num_train_timesteps=1100,
                steps_offset=1,
                timestep_spacing="leading",
            ),
        )
    )


def ernie_image() -> ErnieImagePipeline:
    """It prepares no latents, and makes a number of its timestep."""
    torch.manual_seed(0)
    return lively(
        ErnieImagePipeline(
            transformer=ErnieImageTransformer2DModel(
                hidden_size=32,
                num_attention_heads=2,
                num_layers=1,
                ffn_hidden_size=32,
                in_channels=16,
                out_channels=16,
                text_in_dim=WIDTH,
                rope_axes_dim=(4, 6, 6),
            ),
            vae=flux2_vae(),
            text_encoder=gemma2(),
            tokenizer=gemma_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "sana": sana,
    "pixart-sigma": pixart_sigma,
    "hunyuan-dit": hunyuan_dit,
    "lumina2": lumina2,
    "cogview4": cogview4,
    "chroma": chroma,
    "aura-flow": aura_flow,
    "kolors": kolors,
    "ernie-image": ernie_image,
}

CALLS: dict[str, dict[str, Any]] = {name: {"height": 16, "width": 16} for name in FAMILIES} | {
    "sana": {"height": 32, "width": 32, "use_resolution_binning": False},
    "pixart-sigma": {"height": 16, "width": 16, "use_resolution_binning": False},
    "hunyuan-dit": {"height": 64, "width": 64, "use_resolution_binning": False},
    "lumina2": {"height": 64, "width": 64, "cfg_normalization": False},  # else guidance is not u + g (c - u)
}
"""The arguments of `__call__` that a picture of each family needs here."""
