"""The policy around a pipeline: guidance, negative prompts, adapters, schedulers, flaws, refusals, and the training
error. What holds for every family of pipelines is in test_families.py."""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from peft import LoraConfig
from tiny_runs import exported, redness
from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig

import raftdiff
from raftdiff.config import AdapterConfig
from raftdiff.errors import ConfigError, DataError, WeightsError
from raftdiff.pipelines.diffusion import DiffusionPolicy
from raftdiff.pipelines.lora import lora_targets, take_off
from raftdiff.pipelines.replay import LatentLayout, PromptRecord, Ragged, by_length
from raftdiff.pipelines.schedule import NoiseSchedule
from raftdiff.types import Draw, Prompt, Sample

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers

PROMPTS = [Prompt(text="a red circle"), Prompt(text="a blue square"), Prompt(text="two green triangles")]
SEEDS = [11, 12, 13]
SIZE = {"height": 16, "width": 16}

# eps-prediction with a UNet; a transformer with flow matching; packed latents, and guidance by a second encoding.
each_kind = pytest.mark.parametrize("family", ["sd-eps", "sd3", "flux"])
a_unet_and_a_transformer = pytest.mark.parametrize("family", ["sd-eps", "sd3"])


def build(family: str) -> Any:
    pipeline = tiny_models.FAMILIES[family]()
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()  # as from_pretrained leaves them
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def policy_of(family: str, adapter: AdapterConfig | None = None, call: dict[str, Any] | None = None, **settings):
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "caption_dropout": 0.0} | settings
    adapter = adapter or AdapterConfig(rank=2)
    return DiffusionPolicy(build(family), adapter, call=SIZE | (call or {}), **settings)


def move(policy: DiffusionPolicy, scale: float = 0.1) -> None:
    """Away from the base model, as training would."""
    generator = torch.Generator().manual_seed(5)
    for p in policy.parameters():
        p.data += scale * torch.randn(p.shape, generator=generator)


def batch_of(policy: DiffusionPolicy) -> tuple[list[Sample], Draw]:
    samples = policy.sample(PROMPTS, SEEDS)
    return samples, policy.draw(samples, torch.Generator().manual_seed(0))


def scheduler_inputs(pipeline: Any, **call: Any) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(model output, timestep, scaled model input) of each step of the pipeline itself."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    texts = [prompt.text for prompt in PROMPTS]
    with tiny_models.watched_steps(pipeline) as seen:
        pipeline(texts, num_inference_steps=3, generator=generators, output_type="latent", **SIZE, **call)
    return seen


def decode(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the family denoises them to a picture in [0, 1], by hand."""
    x0, config = latents[None], pipeline.vae.config
    if x0.dim() == 3:
        x0 = pipeline._unpack_latents(x0, 16, 16, pipeline.vae_scale_factor)
    with torch.no_grad():
        pixels = pipeline.vae.decode(x0 / config.scaling_factor + (config.shift_factor or 0.0)).sample
    return (pixels[0] / 2 + 0.5).clamp(0, 1)


def guidance(family: str, scale: float) -> dict[str, float]:
    """How each family's own documentation spells guidance."""
    return {"true_cfg_scale" if family == "flux" else "guidance_scale": scale}


# -- replaying ---------------------------------------------------------------------------------------------------------


@each_kind
def test_guidance_leads_away_from_a_negative_prompt_as_the_pipelines_own_does(family: str):
    policy = policy_of(family, call={"negative_prompt": "a blue circle"})
    call = {"negative_prompt": ["a blue circle"] * 3}
    texts = [prompt.text for prompt in PROMPTS]
    for model_output, t, x_t in scheduler_inputs(build(family), **guidance(family, 4.0), **call):
        with_prompt = policy.predict(x_t, t.expand(3), texts)
        without = policy.predict(x_t, t.expand(3), [None] * 3)
        guided = without + 4.0 * (with_prompt - without)
        torch.testing.assert_close(guided, model_output, atol=2e-5, rtol=0)


@each_kind
def test_the_scheduler_and_encode_prompt_are_the_pipelines_own_again_after_a_failure(family: str):
    policy = policy_of(family)
    scheduler = policy.pipeline.scheduler
    with pytest.raises((RuntimeError, ValueError)):
        policy.predict(torch.zeros(1, 3, 5, 7), torch.tensor([1]), ["a red circle"])
    assert policy.pipeline.scheduler is scheduler and "step" not in vars(scheduler)
    assert "encode_prompt" not in vars(policy.pipeline)


# -- gradients and the adapter -----------------------------------------------------------------------------------------


@a_unet_and_a_transformer
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_reference_is_the_untouched_base_also_after_training(family: str, method):
    policy = policy_of(family, AdapterConfig(method=method, rank=2))
    samples, draw = batch_of(policy)
    with torch.no_grad():
        base_B = policy.error(samples, draw)
        move(policy)
        moved_B = policy.error(samples, draw)
        with policy.reference():
            torch.testing.assert_close(policy.error(samples, draw), base_B, atol=1e-6, rtol=0)
        assert torch.equal(policy.error(samples, draw), moved_B)
    assert (moved_B - base_B).abs().max() > 1e-3


@a_unet_and_a_transformer
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_visit_to_the_reference_between_forward_and_backward_leaves_the_gradients_alone(family: str, method):
    policy = policy_of(family, AdapterConfig(method=method, rank=2))
    samples, draw = batch_of(policy)
    move(policy)
    expected = torch.autograd.grad(policy.error(samples, draw).sum(), policy.parameters(), allow_unused=True)
    error_B = policy.error(samples, draw)
    with torch.no_grad(), policy.reference():
        policy.error(samples, draw)
    error_B.sum().backward()
    assert all(p.requires_grad for p in policy.parameters())
    for p, gradient in zip(policy.parameters(), expected, strict=True):
        assert (p.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(p.grad, gradient)


def test_lora_dropout_acts_in_training_alone():
    policy = policy_of("sd-eps", AdapterConfig(rank=2, dropout=0.5))
    move(policy)
    samples, draw = batch_of(policy)
    assert torch.equal(policy.sample(PROMPTS, SEEDS)[0].latents, samples[0].latents)
    assert not torch.equal(policy.error(samples, draw), policy.error(samples, draw))
    with torch.no_grad():
        assert torch.equal(policy.error(samples, draw), policy.error(samples, draw))


@pytest.mark.parametrize(("family", "method"), [("sd-eps", "lora"), ("sd3", "lora"), ("sd-eps", "full")])
def test_an_adapter_taken_from_one_policy_makes_another_the_same(family: str, method):
    adapter = AdapterConfig(method=method, rank=2)
    trained, fresh = policy_of(family, adapter), policy_of(family, adapter)
    move(trained)
    samples, draw = batch_of(trained)
    state = trained.adapter_state()
    fresh.load_adapter(state)
    with torch.no_grad():
        assert torch.equal(fresh.error(samples, draw), trained.error(samples, draw))
    assert {n: t.shape for n, t in fresh.adapter_state().items()} == {n: t.shape for n, t in state.items()}
    assert all(torch.equal(t, state[n]) for n, t in fresh.adapter_state().items())
    move(trained)
    assert any(not torch.equal(t, state[n]) for n, t in trained.adapter_state().items())  # it was a copy


def test_the_first_weights_of_a_lora_are_the_same_in_every_process():
    first, second = policy_of("sd-eps").adapter_state(), policy_of("sd-eps").adapter_state()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_an_adapter_of_another_model_is_refused_in_one_line():
    policy = policy_of("sd-eps")
    state = policy.adapter_state()
    name = sorted(state)[0]
    before = policy.adapter_state()
    wrong = {
        "0 of": {f"other.{n}": t for n, t in state.items()},
        repr(name): {n: t for n, t in state.items() if n != name},
        "another rank": policy_of("sd-eps", AdapterConfig(rank=3)).adapter_state(),
    }
    for message, adapter in wrong.items():
        with pytest.raises(WeightsError) as error:
            policy.load_adapter(adapter)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(t, before[n]) for n, t in policy.adapter_state().items())


@pytest.mark.parametrize(
    ("family", "targets"),
    [("sd-eps", "all"), ("sdxl", "linear"), ("sdxl", "all"), ("sd3", "linear"), ("flux", "linear")],
)
def test_an_exported_lora_draws_the_same_pictures_in_a_fresh_stock_pipeline(
    family: str, targets, tmp_path: Path, caplog, recwarn
):
    policy = policy_of(family, AdapterConfig(rank=2, alpha=4, targets=targets))
    move(policy, 0.3)
    expected = policy.sample(PROMPTS[:2], SEEDS[:2])
    policy.export(tmp_path / "lora")

    build(family).save_pretrained(tmp_path / "base")
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        fresh = DiffusionPipeline.from_pretrained(tmp_path / "base")
        fresh.set_progress_bar_config(disable=True)
        draw = functools.partial(
            fresh,
            [prompt.text for prompt in PROMPTS[:2]],
            num_inference_steps=2,
            output_type="pt",
            **SIZE,
            **guidance(family, 1.0),
        )
        plain = draw(generator=[torch.Generator().manual_seed(s) for s in SEEDS[:2]]).images
        fresh.load_lora_weights(tmp_path / "lora")
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    images = draw(generator=[torch.Generator().manual_seed(s) for s in SEEDS[:2]]).images
    for sample, image, base in zip(expected, images, plain, strict=True):
        assert (sample.image / 255 - image).abs().max() <= 1 / 255
        assert (sample.image / 255 - base).abs().max() > 2 / 255
    messages = [r.getMessage() for r in caplog.records] + [str(w.message) for w in recwarn]
    assert not [m for m in messages if "unexpected key" in m.lower() or "missing" in m.lower()]


def test_full_fine_tuning_exports_the_denoiser_as_a_folder(tmp_path: Path):
    policy = policy_of("sd-eps", AdapterConfig(method="full"))
    move(policy)
    policy.export(tmp_path)
    pipeline = build("sd-eps")
    pipeline.unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    again = DiffusionPolicy(pipeline, num_inference_steps=2, guidance_scale=1.0)
    assert torch.equal(again.sample(PROMPTS, SEEDS)[2].image, policy.sample(PROMPTS, SEEDS)[2].image)


def test_the_fingerprint_is_of_the_base_model():
    policy = policy_of("sd-eps")
    fingerprint = policy.fingerprint()
    move(policy)
    assert policy.fingerprint() == fingerprint == policy_of("sd-eps", AdapterConfig(method="full")).fingerprint()
    other = build("sd-eps")
    other.unet.conv_out.weight.data += 1e-3
    assert DiffusionPolicy(other).fingerprint() != fingerprint


# -- sampling ----------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("negative", [None, "a blue circle"])
def test_neither_prompts_nor_negative_prompts_are_encoded_twice(family: str, negative: str | None):
    policy = policy_of(family, guidance_scale=3.0, call={} if negative is None else {"negative_prompt": negative})
    encoders = [m for n, m in policy.pipeline.components.items() if n.startswith("text_encoder") and m is not None]
    encoded: list[Counter] = [Counter() for _ in encoders]
    for encoder, counter in zip(encoders, encoded, strict=True):
        encoder.register_forward_pre_hook(
            lambda _, args, counter=counter: counter.update(
                tiny_models.tokenizer().batch_decode(args[0], skip_special_tokens=True)
            )
        )
    policy.sample(PROMPTS[:2], SEEDS[:2])
    samples = policy.sample([*PROMPTS, PROMPTS[0]], [*SEEDS, 14], guidance_scale=1.0)
    draw = policy.draw(samples, torch.Generator().manual_seed(0))
    dropped_B = torch.tensor([True, False, False, True])
    policy.error(samples, Draw(noise=draw.noise, quantile_B=draw.quantile_B, dropped_B=dropped_B))
    policy.sample(PROMPTS, SEEDS)
    for counter in encoded:
        texts = {text.strip(): count for text, count in counter.items()}
        empty = texts.pop("")
        assert texts == dict.fromkeys([p.text for p in PROMPTS] + ([negative] if negative else []), 1)
        assert empty <= (1 if negative else 2)  # as a prompt and, beside it, as the default negative prompt


def test_a_negative_prompt_and_guidance_change_the_picture():
    plain = policy_of("sd-eps", guidance_scale=5.0).sample(PROMPTS, SEEDS)
    policy = policy_of("sd-eps", guidance_scale=5.0, call={"negative_prompt": "a blue circle"})
    negative, unguided = policy.sample(PROMPTS, SEEDS), policy.sample(PROMPTS, SEEDS, guidance_scale=1.0)
    assert not torch.equal(plain[0].latents, negative[0].latents)
    assert not torch.equal(unguided[0].latents, negative[0].latents)


def test_prompts_of_different_lengths_are_kept_apart_and_encoded_once():
    encoded = []

    def encode_prompt(prompt: list[str], device=None):
        """As many rows as letters."""
        encoded.extend(prompt)
        return torch.ones(1, len(prompt[0]), 1), None

    replay = functools.partial(PromptRecord(inspect.signature(encode_prompt)).replay, encode_prompt)
    with pytest.raises(Ragged) as error:
        replay(torch.device("cpu"), ["abc", "a", "xyz"])
    assert error.value.groups == [[0, 2], [1]]
    embeds, mask = replay(torch.device("cpu"), prompt=["abc", "xyz"])
    assert embeds.shape == (2, 3, 1) and mask is None
    assert encoded == ["abc", "a", "xyz"]


def test_rows_of_each_length_come_back_in_their_order():
    runs = []

    def run(rows: list[int]) -> list[str]:
        odd = [i for i, row in enumerate(rows) if row % 2]
        if 0 < len(odd) < len(rows):
            raise Ragged([[i for i in range(len(rows)) if i not in odd], odd])
        runs.append(rows)
        return [f"row {row}" for row in rows]

    assert by_length(torch.nn.Identity(), run, [3, 0, 1]) == ["row 3", "row 0", "row 1"]
    assert runs == [[0], [3, 1]]


def test_another_setting_of_the_same_encoder_is_another_encoding():
    def encode_prompt(prompt: list[str], text_encoder_index: int = 0, lora_scale: float | None = None):
        return torch.tensor([[float(text_encoder_index)]])

    replay = functools.partial(PromptRecord(inspect.signature(encode_prompt)).replay, encode_prompt)
    assert [replay(torch.device("cpu"), ["a"], index).item() for index in (0, 1, 0, 1)] == [0, 1, 0, 1]


def test_a_pipeline_whose_guidance_cannot_be_recorded_is_refused():
    def encode_prompt(prompt: list[str], do_classifier_free_guidance: bool):
        return torch.ones(1 + do_classifier_free_guidance, 2)

    record = PromptRecord(inspect.signature(encode_prompt))
    assert record.replay(encode_prompt, torch.device("cpu"), ["a", "b"], False).shape == (2, 2)
    with pytest.raises(ConfigError, match="guidance_scale: 1"):
        record.replay(encode_prompt, torch.device("cpu"), ["a", "b"], True)


def test_guidance_given_to_a_distilled_model_is_left_as_it_is_in_sampling_and_training():
    own, other = policy_of("flux"), policy_of("flux", call={"guidance_scale": 1.0})
    x_t, t_B = torch.randn(1, 16, 16), torch.tensor([500.0])
    [(model_output, t, scaled), *_] = scheduler_inputs(build("flux"), guidance_scale=1.0)
    predicted = other.predict(scaled, t.expand(3), [p.text for p in PROMPTS])
    torch.testing.assert_close(predicted, model_output, atol=1e-5, rtol=0)
    assert not torch.equal(own.predict(x_t, t_B, ["a"]), other.predict(x_t, t_B, ["a"]))


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        DDPMScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        DPMSolverMultistepScheduler,
    ],
)
def test_any_scheduler_keeps_its_latents_its_seed_and_the_training_error(scheduler):
    policy = policy_of("sd-eps")
    pipeline = build("sd-eps")
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    other = DiffusionPolicy(pipeline, AdapterConfig(rank=2), num_inference_steps=3, guidance_scale=1.0)
    samples = other.sample(PROMPTS, SEEDS)
    for sample in samples:
        assert (decode(pipeline, sample.latents) - sample.image / 255).abs().max() <= 1 / 255
    torch.manual_seed(0)  # noise within the steps comes from the sample's seed as well
    [alone] = other.sample(PROMPTS[1:2], SEEDS[1:2])
    torch.testing.assert_close(alone.latents, samples[1].latents, atol=1e-4, rtol=1e-4)

    draw = other.draw(samples, torch.Generator().manual_seed(0))
    torch.testing.assert_close(other.error(samples, draw), policy.error(samples, draw), atol=1e-5, rtol=1e-5)


def test_the_replayed_prediction_fits_a_scheduler_that_scales_the_models_input():
    pipelines = [build("sd-eps"), build("sd-eps")]
    for pipeline in pipelines:
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    policy = DiffusionPolicy(pipelines[0], guidance_scale=1.0)
    for model_output, t, x_t in scheduler_inputs(pipelines[1], guidance_scale=1.0):
        predicted = policy.predict(x_t, t.expand(3), [p.text for p in PROMPTS])
        torch.testing.assert_close(predicted, model_output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["sd-eps", "sdxl", "sd3"])
def test_pictures_of_another_size_are_sampled_and_trained_on(family: str):
    policy = policy_of(family, call={"height": 16, "width": 32})
    assert policy.picture_size == (16, 32)
    samples, draw = batch_of(policy)
    assert samples[0].image.shape == (3, 16, 32) and samples[0].latents.shape == (4, 8, 16)
    assert torch.isfinite(policy.error(samples, draw)).all()


@each_kind
def test_passes_count_the_rows_through_the_denoiser(family: str):
    policy = policy_of(family)
    samples, draw = batch_of(policy)
    assert policy.passes == 3 * 2  # prompts x steps
    policy.error(samples, draw)
    assert policy.passes == 3 * 2 + 3 * 3  # there and back
    with torch.no_grad():
        policy.error(samples, draw)
    assert policy.passes == 3 * 2 + 3 * 3 + 3
    policy.sample(PROMPTS, SEEDS, guidance_scale=3.0)
    assert policy.passes == 3 * 2 + 3 * 3 + 3 + 3 * 2 * 2


@pytest.mark.parametrize("family", ["sd-eps", "sdxl", "sd3"])
def test_a_bf16_base_trains_an_fp32_lora(family: str):
    pipeline = build(family).to(torch.bfloat16)
    policy = DiffusionPolicy(pipeline, AdapterConfig(rank=2), num_inference_steps=2, precision="bf16")
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    samples, draw = batch_of(policy)
    error_B = policy.error(samples, draw)
    error_B.sum().backward()
    assert error_B.dtype == torch.float32 and torch.isfinite(error_B).all()
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters())


# -- flaws and refusals ------------------------------------------------------------------------------------------------


def test_a_black_picture_is_flagged():
    policy = policy_of("sd-eps")
    policy.pipeline.vae.decoder.conv_out.weight.data.zero_()
    policy.pipeline.vae.decoder.conv_out.bias.data.fill_(-1.0)
    assert [sample.flaw for sample in policy.sample(PROMPTS, SEEDS)] == ["black image"] * 3


def test_latents_that_are_not_finite_are_flagged():
    policy = policy_of("sd-eps")
    policy.pipeline.unet.conv_out.bias.data[0] = math.nan
    assert policy.sample(PROMPTS[:1], SEEDS[:1])[0].flaw == "latents that are not finite"


def test_guidance_that_is_not_linear_is_refused_where_its_formula_is_needed():
    policy = policy_of("sd-eps", call={"guidance_rescale": 0.7}, training_guidance_scale=4.0)
    with pytest.raises(ConfigError, match="guidance_rescale: 0"):
        policy.error(*batch_of(policy))
    plain = policy_of("sd-eps", training_guidance_scale=4.0)
    samples, draw = batch_of(plain)
    passes = plain.passes
    plain.error(samples, draw)
    assert plain.passes == passes + 3 * (3 + 1)  # the check is not counted


def test_a_pipeline_that_carries_a_lora_is_refused():
    policy = policy_of("sd-eps")
    with pytest.raises(ConfigError, match="already carries the LoRA 'raftdiff'.*unload_lora_weights"):
        DiffusionPolicy(policy.pipeline)
    pipeline = build("sd-eps")
    pipeline.unet.add_adapter(LoraConfig(target_modules=["to_q"]), adapter_name="style")
    assert not take_off(pipeline)
    with pytest.raises(ConfigError, match="already carries the LoRA 'style'"):
        DiffusionPolicy(pipeline)


def test_a_pipeline_is_aligned_again_from_its_base(tmp_path: Path, caplog):
    pipe = build("sd-eps")
    base = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    settings = {
        "output": str(tmp_path),
        "rounds": 1,
        "sampling": {"samples_per_prompt": 2, "num_inference_steps": 1, "guidance_scale": 1.0},
        "training": {"steps": 1, "learning_rate": 0.1},
        "adapter": {"rank": 2},
        "tracker": "none",
    }
    for name in ("first", "second"):
        raftdiff.align(pipe, ["a red circle"], redness, name=name, **settings)
    assert exported(tmp_path / "first") == exported(tmp_path / "second")
    pipe.unload_lora_weights()
    assert all(torch.equal(p, base[name]) for name, p in pipe.unet.named_parameters())


def test_a_picture_that_the_safety_checker_blacks_out_is_flagged():
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
        projection_dim=8,
    )
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision.to_dict(), projection_dim=8))
    checker.concept_embeds_weights.data.fill_(-2.0)  # any likeness to an unsafe concept is enough
    pipeline = build("sd-eps")
    pipeline.register_modules(
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    )
    policy = DiffusionPolicy(pipeline, num_inference_steps=1, guidance_scale=1.0)
    assert [s.flaw for s in policy.sample(PROMPTS, SEEDS)] == ["blacked out by the safety checker"] * 3


def test_a_pipeline_that_is_not_text_to_image_is_refused():
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    with pytest.raises(ConfigError, match="DDPMPipeline is not a text-to-image"):
        DiffusionPolicy(DDPMPipeline(unet=unet, scheduler=DDPMScheduler()))


def test_an_unknown_lora_target_is_refused_with_the_layers_that_there_are():
    with pytest.raises(ConfigError, match=r"no layer is called \['to_quack'\].*to_q"):
        policy_of("sd-eps", AdapterConfig(targets=["to_quack"]))


def test_lora_targets_are_whole_layer_names():
    unet = build("sd-eps").unet
    attention, linear, everything = (set(lora_targets(unet, t)) for t in ("attention", "linear", "all"))
    assert attention < linear < everything
    assert {name.rsplit(".", 1)[-1] for name in attention} == {"to_q", "to_k", "to_v", "0"}
    assert "conv_in" in everything and "conv_in" not in linear and "time_embedding.linear_1" in linear
    assert set(lora_targets(unet, ["attn2.to_k"])) == {name for name in attention if name.endswith("attn2.to_k")}


def test_a_sample_without_latents_is_refused():
    policy = policy_of("sd-eps")
    with pytest.raises(DataError, match="sample x has no latents"):
        policy.draw([Sample(id="x", prompt=PROMPTS[0], seed=0)], torch.Generator())


# -- your own pictures -------------------------------------------------------------------------------------------------


def test_a_users_picture_of_another_size_is_refused():
    with pytest.raises(ConfigError, match="32x16 pixels is not of the size"):
        policy_of("sd-eps").encode_outputs(PROMPTS[:1], [torch.zeros(3, 16, 32, dtype=torch.uint8)])


def test_a_users_picture_is_encoded_in_the_precision_that_the_pipeline_decodes_in():
    image = (torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    policy = DiffusionPolicy(build("sdxl").to(torch.float16), call=SIZE)  # whose VAE overflows in fp16
    given = []
    policy.pipeline.vae.encoder.register_forward_pre_hook(lambda _, args: given.append(args[0].dtype))
    [sample] = policy.encode_outputs(PROMPTS[:1], [image])
    assert given == [torch.float32] and policy.pipeline.vae.dtype == torch.float16
    [expected] = policy_of("sdxl").encode_outputs(PROMPTS[:1], [image])
    torch.testing.assert_close(sample.latents, expected.latents, atol=1e-2, rtol=0)


def test_pictures_encoded_at_once_are_as_those_encoded_alone_and_go_by_the_batch():
    policy, sizes = policy_of("sd-eps", batch_size=2), []
    policy.pipeline.vae.encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    images = [torch.full((3, 16, 16), shade, dtype=torch.uint8) for shade in (0, 90, 255)]
    together = policy.encode_outputs(PROMPTS[:3], images)
    assert sizes == [2, 1]
    for prompt, image, sample in zip(PROMPTS, images, together, strict=False):
        [alone] = policy.encode_outputs([prompt], [image])
        assert sample.id == alone.id and sample.prompt == prompt and torch.equal(sample.image, image)
        torch.testing.assert_close(sample.latents, alone.latents, atol=1e-5, rtol=0)


def test_numbered_latents_show_how_they_are_laid_out():
    numbered = LatentLayout.numbered(torch.Size([2, 3]))
    decoded = 2.0 * numbered.flip(-1).transpose(1, 2) + 5.0  # turned, transposed, scaled and shifted
    layout = LatentLayout(torch.Size([2, 3]), decoded)
    latents = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert torch.equal(layout.denoised(2.0 * latents.flip(-1).T + 5.0), latents)
    with pytest.raises(ConfigError, match="value by value"):
        LatentLayout(torch.Size([2, 3]), decoded.roll(1, 2) + decoded)


# -- the training error ------------------------------------------------------------------------------------------------


def alphas_cumprod(t: int) -> float:
    """Of the tiny models' schedule: the square roots of beta grow linearly from .00085 to .012 (each squared)."""
    low, high = 0.00085**0.5, 0.012**0.5
    return math.prod(1 - (low + (high - low) * i / 999) ** 2 for i in range(t + 1))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_noised_latents_and_targets_follow_their_closed_formulas(prediction: str):
    schedule = NoiseSchedule(tiny_models.betas(prediction))
    x0, noise = torch.tensor([[2.0, -1.0], [0.5, 3.0]]), torch.tensor([[0.3, 1.0], [-2.0, 0.1]])
    x_t, target = schedule.noised(x0, noise, torch.tensor([10, 700]))
    for i, t in enumerate((10, 700)):
        signal, spread = math.sqrt(alphas_cumprod(t)), math.sqrt(1 - alphas_cumprod(t))
        expected = {"epsilon": noise[i], "v_prediction": signal * noise[i] - spread * x0[i], "sample": x0[i]}
        torch.testing.assert_close(x_t[i], signal * x0[i] + spread * noise[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(target[i], expected[prediction], atol=1e-5, rtol=0)


def test_flow_matching_goes_straight_from_latents_to_noise():
    schedule = NoiseSchedule(FlowMatchEulerDiscreteScheduler(shift=3.0))
    x_t, target = schedule.noised(
        torch.tensor([[4.0], [4.0]]), torch.tensor([[-2.0], [-2.0]]), torch.tensor([250, 1e3])
    )
    assert x_t.tolist() == [[2.5], [-2.0]] and target.tolist() == [[-6.0], [-6.0]]
    assert schedule.weight(torch.tensor([250.0]), 5.0) == 1.0


def test_another_prediction_type_is_refused():
    pipeline = build("sd-eps")
    pipeline.scheduler.register_to_config(prediction_type="thin_air")
    with pytest.raises(ConfigError, match="'thin_air' cannot be trained"):
        DiffusionPolicy(pipeline)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_caps_the_weight_of_easy_timesteps(prediction: str):
    schedule = NoiseSchedule(tiny_models.betas(prediction))
    weights = schedule.weight(torch.tensor([10, 700]), 5.0)
    for weight, t in zip(weights.tolist(), (10, 700), strict=True):
        snr = alphas_cumprod(t) / (1 - alphas_cumprod(t))
        assert weight == pytest.approx(min(snr, 5.0) / (snr if prediction == "epsilon" else snr + 1), rel=1e-4)
    assert schedule.weight(torch.tensor([10]), None) == 1.0


def test_uniform_timesteps_cover_the_whole_schedule():
    quantile_B = torch.tensor([0.0, 0.25, 0.9999])
    discrete = NoiseSchedule(tiny_models.betas("epsilon")).timesteps(quantile_B, "uniform")
    assert discrete.tolist() == [0, 250, 999]
    flow = NoiseSchedule(FlowMatchEulerDiscreteScheduler()).timesteps(quantile_B, "uniform")
    assert flow.tolist() == pytest.approx([1.0, 250.0, 999.9])


def test_logit_normal_timesteps_have_the_quantiles_of_their_distribution():
    quantile_B = torch.tensor([0.158655, 0.5, 0.841345])  # of a normal: -1, 0 and 1 deviations
    flow = NoiseSchedule(FlowMatchEulerDiscreteScheduler()).timesteps(quantile_B, "logit-normal")
    assert flow.tolist() == pytest.approx([268.94, 500.0, 731.06], abs=0.01)
    discrete = NoiseSchedule(tiny_models.betas("epsilon")).timesteps(quantile_B, "logit-normal")
    assert discrete.tolist() == [268, 500, 731]


def test_the_timesteps_that_a_sampler_visits_are_equally_likely():
    quantile_B = torch.tensor([0.0, 0.24, 0.25, 0.5, 0.9999])
    discrete = NoiseSchedule(tiny_models.betas("epsilon")).visited(quantile_B, torch.tensor([751, 501, 251, 1]))
    assert discrete.tolist() == [1, 1, 251, 501, 751] and discrete.dtype == torch.long
    flow = NoiseSchedule(FlowMatchEulerDiscreteScheduler()).visited(quantile_B, torch.tensor([1000.0, 750.0]))
    assert flow.tolist() == [750.0, 750.0, 750.0, 1000.0, 1000.0]


def test_training_at_the_timesteps_of_the_sampler_takes_those_of_the_configured_steps():
    # "leading" spacing with an offset of 1: 1000 / 4 apart, from 1 on.
    assert timesteps_of(policy_of("sd-eps", timesteps="sampler", num_inference_steps=4)) == [1, 251, 501, 751]
    # Evenly from the shifted 0.001 to 1, and shifted: to 3 s / (1 + 2 s).
    least = 0.003 / 1.002
    sigmas = [least, (least + 1) / 2, 1.0]
    flow = timesteps_of(policy_of("sd3", timesteps="sampler", num_inference_steps=3))
    assert flow == pytest.approx([1000 * 3 * sigma / (1 + 2 * sigma) for sigma in sigmas], rel=1e-5)


def timesteps_of(policy: DiffusionPolicy) -> list[float]:
    """All timesteps that training takes, in rising order."""
    torch.manual_seed(0)
    before, scheduler = torch.get_rng_state(), policy.pipeline.scheduler
    t_N = policy._timesteps(torch.linspace(0, 0.999, 50))
    assert torch.equal(torch.get_rng_state(), before) and policy.pipeline.scheduler is scheduler
    assert policy.passes == 0
    return t_N.unique().tolist()


@pytest.mark.parametrize(
    ("scheduler", "changes", "timesteps"),
    [
        (DDIMScheduler, {}, "uniform"),
        (LCMScheduler, {}, "sampler"),
        (DDIMScheduler, {"timestep_spacing": "trailing"}, "sampler"),
        # With nothing of the signal left at the end of the schedule, any model may be sampled from there.
        (DDIMScheduler, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, "uniform"),
        (DDIMScheduler, {"timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2"}, "uniform"),
    ],
)
def test_a_model_distilled_to_a_few_steps_is_known_by_its_scheduler(scheduler, changes, timesteps: str, caplog):
    pipeline = build("sd-eps")
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **changes)
    with caplog.at_level(logging.INFO, logger="raftdiff"):
        assert DiffusionPolicy(pipeline).timesteps == timesteps
    assert ("distilled" in caplog.text) == (timesteps == "sampler")


def test_a_draw_is_a_function_of_its_generator_alone():
    policy = policy_of("sd-eps", caption_dropout=0.5)
    samples = policy.sample(PROMPTS, SEEDS)
    first, second = (policy.draw(samples, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.noise, second.noise) and torch.equal(first.quantile_B, second.quantile_B)
    many = policy.draw(samples * 200, torch.Generator().manual_seed(3))
    assert abs(many.dropped_B.float().mean() - 0.5) < 0.1
    assert not policy_of("sd-eps").draw(samples * 10, torch.Generator()).dropped_B.any()


@each_kind
@pytest.mark.parametrize("negative", [None, "a blue circle"])
def test_guidance_in_training_and_dropped_prompts_follow_the_formula(family: str, negative: str | None):
    call = {} if negative is None else {"negative_prompt": negative}
    policy = policy_of(family, call=call, training_guidance_scale=4.0)
    samples, draw = batch_of(policy)
    draw = Draw(noise=draw.noise, quantile_B=draw.quantile_B, dropped_B=torch.tensor([False, True, False]))
    x0 = torch.stack([s.latents for s in samples])
    t_B = policy._schedule.timesteps(draw.quantile_B, "uniform")
    x_t, target = policy._schedule.noised(x0, draw.noise, t_B)
    with torch.no_grad():
        with_prompt = policy.predict(x_t, t_B, [p.text for p in PROMPTS])
        without = policy.predict(x_t, t_B, [None] * 3)
        empty = policy.predict(x_t, t_B, [""] * 3) if negative else without
        guided = without + 4.0 * (with_prompt - without)
        guided[1] = empty[1]
        expected_B = (guided - target).square().flatten(1).mean(1)
        torch.testing.assert_close(policy.error(samples, draw), expected_B, atol=1e-6, rtol=1e-5)


def test_the_training_error_has_no_guidance_unless_told_otherwise():
    assert policy_of("sd-eps", guidance_scale=3.0).training_guidance_scale == 1.0
    assert policy_of("sd-eps", guidance_scale=3.0, training_guidance_scale=3.0).training_guidance_scale == 3.0
