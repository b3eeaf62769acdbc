"""The settings for memory and speed: each does what it says and nothing else, or is refused in one line."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    SanaTransformer2DModel,
    StableDiffusionImg2ImgPipeline,
    UNet2DModel,
)
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from safetensors import safe_open
from test_diffusion import PROMPTS, SEEDS, batch_of, build, move, policy_of
from test_families import FAMILIES
from tiny_runs import ADAPTER_FILE, pipeline_run, tiny_config, tiny_pipeline

from raftdiff.algorithms.raft import Raft
from raftdiff.build import build_policy
from raftdiff.config import ModelConfig, RunConfig, TrainingConfig, is_identity, parse_config
from raftdiff.errors import ConfigError, MissingExtraError, RaftdiffError, WeightsError
from raftdiff.pipelines.loading import (
    attention_door,
    compile_denoiser,
    configure,
    dispatch_attention,
    load_lora,
    load_pipeline,
    offload_components,
    size_multiple,
)
from raftdiff.rounds import run_rounds
from raftdiff.training import Trainer
from raftdiff.types import Example

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers


def refused(match: str, kind: type[RaftdiffError] = ConfigError) -> Any:
    """One line, of a kind that the command line prints without a traceback."""
    return pytest.raises(kind, match=rf"\A{match}\Z")  # `.` stops at the end of a line


# -- attention ---------------------------------------------------------------------------------------------------------


def test_each_family_has_the_door_to_its_attention_that_works():
    doors = {family: attention_door(make()[0]) for family, make in denoisers().items()}
    assert doors == {
        "sd-eps": "xformers",
        "sdxl": "xformers",
        "sd3": "xformers",
        "flux": "dispatch",
        "sana": None,  # linear attention, which diffusers would replace by an ordinary one
    }


def denoisers() -> dict[str, Any]:
    def of(family: str) -> Any:
        return lambda: (getattr(p := build(family), "unet", None) or p.transformer, p)

    sana = SanaTransformer2DModel(
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
    )
    return {family: of(family) for family in ("sd-eps", "sdxl", "sd3", "flux")} | {"sana": lambda: (sana, None)}


def test_a_dispatched_backend_is_of_one_model_alone_and_changes_no_prediction():
    policy, plain = policy_of("flux"), policy_of("flux")
    before = _AttentionBackendRegistry._active_backend
    dispatch_attention(policy.denoiser, "_native_math")
    assert _AttentionBackendRegistry._active_backend == before
    backends = [m.processor._attention_backend for m in policy.denoiser.modules() if hasattr(m, "processor")]
    assert backends == ["_native_math"] * 2
    samples, draw = batch_of(policy)
    torch.testing.assert_close(policy.error(samples, draw), plain.error(samples, draw), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "attention", "line"),
    [
        (
            "sd-eps",
            "xformers",
            r"model\.attention: xformers needs an NVIDIA GPU, and this model is on cpu; set it to sdpa",
        ),
        ("flux", "xformers", r"model\.attention: xformers needs an NVIDIA GPU.*"),
        ("flux", "flash", r"model\.attention: flash needs an NVIDIA GPU.*"),
        ("sd-eps", "flash", r"model\.attention: flash has no way into UNet2DConditionModel; set it to sdpa"),
        ("sd3", "flash", r"model\.attention: flash has no way into SD3Transformer2DModel; set it to sdpa"),
    ],
)
def test_attention_kernels_that_cannot_be_used_here_are_refused(family: str, attention: Any, line: str):
    with refused(line):
        configure(build(family), ModelConfig(attention=attention))


def test_unknown_and_unfitting_attention_names_are_refused_by_the_configuration():
    with refused(r"run\.yaml: model\.attention: .*'sdpa', 'xformers' or 'flash', found 'xformer'"):
        parse_config({"model": {"attention": "xformer"}}, where="run.yaml")
    with refused(r"run\.yaml: model\.attention: flash computes in 16 bits.*"):
        parse_config({"model": {"attention": "flash"}, "adapter": {"method": "full"}}, where="run.yaml")


# -- components --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_offloaded_components_make_the_same_samples_and_errors(family: str):
    plain, policy = policy_of(family, guidance_scale=3.0), policy_of(family, guidance_scale=3.0)
    offload_components(policy.pipeline)  # on the CPU the layers are moved from the CPU to the CPU
    hooked = {
        name
        for name, component in policy.pipeline.components.items()
        if isinstance(component, torch.nn.Module)
        and any(hasattr(m, "_diffusers_hook") and m._diffusers_hook.hooks for m in component.modules())
    }
    encoders = {name for name in policy.pipeline.components if name.startswith("text_encoder")}
    assert hooked == {"vae", *encoders}
    assert policy.pipeline._execution_device == policy.denoiser.device
    (samples, draw), (expected, _) = batch_of(policy), batch_of(plain)
    for sample, other in zip(samples, expected, strict=True):
        assert torch.equal(sample.image, other.image) and torch.equal(sample.latents, other.latents)
    assert torch.equal(policy.error(samples, draw), plain.error(expected, draw))


def test_a_users_picture_is_encoded_by_an_offloaded_vae():
    plain, policy = policy_of("sd-eps"), policy_of("sd-eps")
    offload_components(policy.pipeline)
    image = (torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    [sample], [expected] = (p.encode_outputs(PROMPTS[:1], [image]) for p in (policy, plain))
    assert torch.equal(sample.latents, expected.latents)


def test_offloading_on_the_cpu_is_refused():
    with refused(r"model\.offload: this pipeline is on the CPU.*; set it to none"):
        configure(build("sd-eps"), ModelConfig(offload="components"))


def test_a_sliced_vae_decodes_picture_by_picture_to_the_same_pictures():
    plain, policy = policy_of("sd-eps"), policy_of("sd-eps")
    configure(policy.pipeline, ModelConfig(vae_slicing=True))
    rows: list[int] = []
    policy.pipeline.vae.decoder.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    found, expected = policy.sample(PROMPTS, SEEDS), plain.sample(PROMPTS, SEEDS)
    assert rows == [1, 1, 1]
    for sample, other in zip(found, expected, strict=True):
        assert (sample.image.int() - other.image.int()).abs().max() <= 1


def test_a_tiled_vae_decodes_large_pictures_in_tiles():
    policy = policy_of("sd-eps", call={"height": 32, "width": 32})
    configure(policy.pipeline, ModelConfig(vae_tiling=True))
    sides: list[int] = []
    policy.pipeline.vae.decoder.register_forward_pre_hook(lambda _, args: sides.append(args[0].shape[-1]))
    [sample] = policy.sample(PROMPTS[:1], SEEDS[:1])
    assert sample.image.shape == (3, 32, 32)
    assert len(sides) > 1 and max(sides) == 8  # latents of 16 in tiles of 8, which is the size the VAE was made for


def test_settings_that_a_component_does_not_have_are_refused():
    class Plain(AutoencoderKL):
        def enable_tiling(self):
            raise NotImplementedError

    pipeline = build("sd-eps")
    pipeline.vae.__class__ = Plain
    with refused(r"model\.vae_tiling: Plain does not have it; leave it out"):
        configure(pipeline, ModelConfig(vae_tiling=True))
    pipeline.unet._supports_gradient_checkpointing = False
    with refused(r"model\.gradient_checkpointing: UNet2DConditionModel does not have it; leave it out"):
        configure(pipeline, ModelConfig(gradient_checkpointing=True))


def test_settings_that_change_no_result_may_change_between_a_run_and_its_resumption():
    free = ["offload", "vae_slicing", "compile", "attention", "gradient_checkpointing", "device"]
    assert not any(is_identity(f"model.{name}") for name in free)
    assert is_identity("model.vae_tiling") and is_identity("training.optimizer")


# -- compiling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd-eps", "sd3"])  # with repeated blocks, and without
def test_a_compiled_denoiser_predicts_trains_and_exports_as_before(family: str, tmp_path: Path):
    plain, policy = policy_of(family), policy_of(family)
    move(plain), move(policy)
    compile_denoiser(policy.denoiser, backend="aot_eager")
    (samples, draw), (expected, _) = batch_of(policy), batch_of(plain)
    for sample, other in zip(samples, expected, strict=True):
        torch.testing.assert_close(sample.latents, other.latents, atol=1e-5, rtol=0)
    error_B, expected_B = policy.error(samples, draw), plain.error(samples, draw)
    torch.testing.assert_close(error_B, expected_B, atol=1e-5, rtol=0)
    error_B.sum().backward(), expected_B.sum().backward()
    for p, q in zip(policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert policy.passes == plain.passes
    assert policy.adapter_state().keys() == plain.adapter_state().keys()
    assert exported_names(policy, tmp_path / "compiled") == exported_names(plain, tmp_path / "plain")


def exported_names(policy: Any, folder: Path) -> set[str]:
    policy.export(folder)
    with safe_open(folder / ADAPTER_FILE, "pt") as file:
        return set(file.keys())


def test_the_denoiser_is_compiled_with_its_lora(monkeypatch):
    seen: list[int] = []
    compiled = "raftdiff.pipelines.diffusion.compile_denoiser"
    monkeypatch.setattr(
        compiled, lambda denoiser: seen.append(sum("lora_" in n for n, _ in denoiser.named_parameters()))
    )
    build_policy(RunConfig(model={"compile": True}), build("sd-eps"))
    build_policy(RunConfig(), build("sd-eps"))
    assert len(seen) == 1 and seen[0] > 0


# -- 16 bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd-eps", "sd3"])
def test_a_whole_round_in_bf16_with_gradient_checkpointing(family: str, tmp_path: Path):
    pipeline = tiny_pipeline() if family == "sd-eps" else build(family)
    pipeline.to(torch.bfloat16)
    config = tiny_config(
        tmp_path,
        rounds=1,
        model={"dtype": "bf16", "gradient_checkpointing": True, "vae_slicing": True, "height": 16, "width": 16},
        training={"precision": "bf16", "micro_batch_size": 1},
    )
    run = pipeline_run(config, pipeline=pipeline)
    assert run.policy.denoiser.is_gradient_checkpointing and run.policy.denoiser.dtype == torch.bfloat16
    first = run.policy.adapter_state()
    result = run_rounds(run)
    assert result.reports[-1].training["skipped_steps"] == 0
    last = run.policy.adapter_state()
    assert {tensor.dtype for tensor in last.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in last.values())
    assert any(not torch.equal(tensor, first[name]) for name, tensor in last.items())


# -- the 8-bit optimizer -----------------------------------------------------------------------------------------------


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose state is laid out as that of bitsandbytes: moments in blocks of 256, one byte each, with a scale for
    each block; small parameters in fp32."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.qmap = torch.linspace(-1, 1, 256)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    for i in (1, 2):
                        small = p.numel() < 4096
                        state[f"state{i}"] = torch.zeros_like(p, dtype=torch.float32 if small else torch.uint8)
                        if not small:
                            state[f"qmap{i}"] = self.qmap
                            state[f"absmax{i}"] = torch.zeros(-(-p.numel() // 256))
                state["step"] += 1
                moments = []
                for i, (beta, value) in enumerate(zip(group["betas"], (p.grad, p.grad**2), strict=True), 1):
                    moment = beta * self.read(state, i) + (1 - beta) * value
                    moments.append(moment / (1 - beta ** state["step"]))
                    self.write(state, i, moment)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * moments[0] / (moments[1].clamp(min=0).sqrt() + 1e-8))

    def read(self, state, i):
        if f"qmap{i}" not in state:
            return state[f"state{i}"]
        blocks = state[f"qmap{i}"][state[f"state{i}"].flatten().long()].view(-1, 256)
        return (blocks * state[f"absmax{i}"][:, None]).view_as(state[f"state{i}"])

    def write(self, state, i, moment):
        if f"qmap{i}" not in state:
            state[f"state{i}"].copy_(moment)
            return
        blocks = moment.flatten().view(-1, 256)
        state[f"absmax{i}"] = blocks.abs().amax(1)
        scaled = blocks / state[f"absmax{i}"][:, None].clamp(min=1e-12)
        state[f"state{i}"] = ((scaled + 1) * 127.5).round().to(torch.uint8).view_as(moment)


class Square:
    """error = mean (w - x)^2 over the weights of two parameters, one of them large enough for 8 bits."""

    modality, passes = "image", 0

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 128), (16,))]

    def parameters(self):
        return self.weights

    def draw(self, samples, generator):
        return policy_draw(len(samples), generator)

    def error(self, samples, draw):
        return sum((w - s).square().mean() for w in self.weights for s in (1.0,)) + draw.noise

    def adapter_state(self):
        return {str(i): w.detach().clone() for i, w in enumerate(self.weights)}

    def load_adapter(self, state):
        with torch.no_grad():
            for i, w in enumerate(self.weights):
                w.copy_(state[str(i)])


def policy_draw(rows: int, generator: torch.Generator):
    from raftdiff.types import Draw

    return Draw(
        noise=torch.randn(rows, generator=generator),
        quantile_B=torch.zeros(rows),
        dropped_B=torch.zeros(rows, dtype=torch.bool),
    )


def test_an_8_bit_optimizer_goes_on_bit_for_bit_from_a_checkpoint(monkeypatch):
    optim = types.ModuleType("bitsandbytes.optim")
    optim.AdamW8bit = AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    [sample, *_] = policy_of("sd-eps").sample(PROMPTS[:1], SEEDS[:1])
    config = TrainingConfig(optimizer="adamw8bit", learning_rate=0.05, steps=6, batch_size=1)

    def trainer(policy: Any) -> Trainer:
        return Trainer(policy, Raft(), config, seed=0, rounds=1, accelerator=Accelerator())

    straight, states = trainer(Square()), {}
    straight.train(
        [Example(sample=sample)], round=1, after_step=lambda step, _: states.update({step: straight.state()})
    )
    saved = states[3]["optimizer"]
    assert saved["state1.0"].dtype == torch.uint8 and saved["state1.1"].dtype == torch.float32
    assert saved["absmax1.0"].shape == (32,) and saved["qmap2.0"].shape == (256,)

    resumed = trainer(Square())
    resumed.load_state(states[3])
    resumed.train([Example(sample=sample)], round=1, first_step=3)
    for part, tensors in straight.state().items():
        for name, tensor in tensors.items():
            assert torch.equal(resumed.state()[part][name], tensor), (part, name)


def test_an_8_bit_optimizer_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with refused(r"training\.optimizer: adamw8bit needs .*pip install 'raftdiff\[bitsandbytes\]'", MissingExtraError):
        Trainer(Square(), Raft(), TrainingConfig(optimizer="adamw8bit"), seed=0, rounds=1, accelerator=Accelerator())  # type: ignore[arg-type]


# -- what is not a base for this ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "multiple"), [("sd-eps", 8), ("sdxl", 8), ("sd3", 8), ("flux", 8)])
def test_sizes_are_multiples_of_what_the_pipeline_takes(family: str, multiple: int):
    pipeline = build(family)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    assert size_multiple(pipeline, denoiser) == multiple
    configure(pipeline, ModelConfig(height=multiple * 3, width=multiple))
    with refused(rf"model\.width: {type(pipeline).__name__} takes multiples of 8 pixels, not 20; set it to 16 or 24"):
        configure(pipeline, ModelConfig(height=16, width=20))


@pytest.mark.parametrize(
    ("family", "multiple"),
    [("sd-eps", 8), ("sd3", 16), ("flux", 16)],  # what models with a VAE of factor 8 and patches of 2 take
)
def test_patches_and_packed_latents_double_the_multiple(family: str, multiple: int):
    pipeline = build(family)
    packed = pipeline.image_processor.config.vae_scale_factor // pipeline.vae_scale_factor
    pipeline.vae_scale_factor = 8
    pipeline.image_processor.register_to_config(vae_scale_factor=8 * packed)
    assert size_multiple(pipeline, getattr(pipeline, "unet", None) or pipeline.transformer) == multiple


def test_a_size_that_the_vae_cannot_take_is_refused_before_any_work(tmp_path: Path):
    config = tiny_config(tmp_path, model={"height": 100})
    with refused(r"model\.height: StableDiffusionPipeline takes multiples of 8 pixels, not 100; set it to 96 or 104"):
        pipeline_run(config)
    assert not config.folder.exists()


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path):
    with refused(rf"{tmp_path}: no model_index\.json there; give .*", WeightsError):
        load_pipeline(ModelConfig(path=str(tmp_path)))


def test_saved_pipelines_for_other_tasks_are_refused(tmp_path: Path):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "unconditional")
    StableDiffusionImg2ImgPipeline(**build("sd-eps").components, requires_safety_checker=False).save_pretrained(
        tmp_path / "img2img"
    )
    lines = {
        "unconditional": r"DDPMPipeline is not a text-to-image diffusion pipeline.*",
        "img2img": r"StableDiffusionImg2ImgPipeline makes pictures from pictures \(`image`\).*",
    }
    for name, line in lines.items():
        model = ModelConfig(path=str(tmp_path / name), gradient_checkpointing=True)
        with refused(line):
            build_policy(RunConfig(model=model), load_pipeline(model))


def test_the_scheduler_of_a_given_pipeline_is_replaced():
    policy = build_policy(RunConfig(model={"scheduler": "DDPMScheduler"}), build("sd-eps"))
    assert type(policy.pipeline.scheduler) is DDPMScheduler
    with refused(r"model\.scheduler: diffusers has no 'DDPMSchedular'.*DDPMScheduler.*"):
        configure(build("sd-eps"), ModelConfig(scheduler="DDPMSchedular"))


@pytest.mark.parametrize(
    ("family", "scheduler", "line"),
    [
        ("lcm", "DDIMScheduler", r".*: LatentConsistencyModelPipeline cannot sample with DDIMScheduler .*leave it out"),
        ("flux", "FlowMatchHeunDiscreteScheduler", r".*: FluxPipeline cannot sample with FlowMatchHeunDiscrete.*"),
        ("sd3", "DDIMScheduler", r".*: DDIMScheduler is not for flow matching, unlike .* of this StableDiffusion3P.*"),
        ("sd-eps", "FlowMatchEulerDiscreteScheduler", r".*: FlowMatch.* is for flow matching, unlike the DDIMSched.*"),
        ("sana", "DDIMScheduler", r".*: DDIMScheduler is not for flow matching, unlike the DPMSolverMultistep.*"),
    ],
)
def test_a_scheduler_that_the_pipeline_cannot_sample_with_is_refused(family: str, scheduler: str, line: str):
    with refused(line):
        build_policy(RunConfig(model={"scheduler": scheduler}), FAMILIES[family]())


def test_a_lora_of_another_base_is_refused(tmp_path: Path):
    policy = policy_of("sd-eps")
    move(policy)
    policy.export(tmp_path)
    load_lora(build("sd-eps"), str(tmp_path))
    with refused(r".* (does not fit|holds no LoRA for the) .*", WeightsError):
        load_lora(build("sd3"), str(tmp_path))
    wider = build("sd-eps")
    wider.unet = tiny_models.unet(cross_attention_dim=2 * tiny_models.WIDTH)
    with refused(r".* does not fit StableDiffusionPipeline: .*; use the base that it was trained from", WeightsError):
        load_lora(wider, str(tmp_path))
    with refused(r".*: there is no LoRA in safetensors; a finished run has one in its folder `lora`", WeightsError):
        load_lora(build("sd-eps"), str(tmp_path / "nowhere"))
    [file] = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with refused(r".*\.safetensors cannot be read as safetensors .*; export or download it again", WeightsError):
        load_lora(build("sd-eps"), str(tmp_path))
