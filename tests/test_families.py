"""One set of contracts for every family of pipelines, with no code for any: the matrix of docs/models.md.

What differs between families stands at the top, as their own documentation has it.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_families_a
import tiny_families_b
import tiny_models
import torch
from diffusers import DiffusionPipeline
from tiny_runs import redness, tiny_config

from raftdiff.build import build
from raftdiff.config import AdapterConfig
from raftdiff.errors import ConfigError
from raftdiff.losses import preference
from raftdiff.pipelines.diffusion import DiffusionPolicy
from raftdiff.pipelines.replay import GuidanceArgument, Stepped
from raftdiff.protocols import Policy
from raftdiff.reward_models.function import FunctionReward
from raftdiff.rounds import run_rounds
from raftdiff.types import Draw, Prompt, Sample

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers

FAMILIES = tiny_models.FAMILIES | tiny_families_a.FAMILIES | tiny_families_b.FAMILIES
CALLS = {name: {"height": 16, "width": 16} for name in FAMILIES} | tiny_families_a.CALLS | tiny_families_b.CALLS

GUIDED_BY_TRUE_CFG = {"flux", "flux-schnell", "qwen-image"}
GUIDED_FROM_ZERO = {"z-image"}
GUIDED_BY_AN_INPUT_OR_NOT_AT_ALL = {"flux2", "flux2-klein-distilled", "lcm", "sd-lcm"}
GUIDED_BY_ANOTHER_FORMULA = {"qwen-image"}
DISTILLED = {"flux2-klein-distilled", "lcm", "sd-lcm", "sd-turbo", "sdxl-turbo"}
OTHER_STEPS = {"sana", "pixart-sigma", "kolors", "lcm", "sd-lcm", "sd-turbo", "sdxl-turbo"}
"""Their schedulers have no step of a known density."""
UNUSED_LAYERS = {
    "sd3": ("transformer_blocks.0.attn.add_q_proj",),
    "sd35": ("transformer_blocks.1.attn.add_q_proj",),
    "qwen-image": ("transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.attn.to_add_out"),
}
"""The last block of these makes no use of its text queries."""

PROMPTS = [Prompt(text="a red circle"), Prompt(text="a blue square"), Prompt(text="a green star")]
LONG = Prompt(text="two green triangles and a red circle above a yellow star")
TEXTS = [prompt.text for prompt in PROMPTS]
SEEDS = [11, 12, 13]


def only(families: Any) -> Any:
    return pytest.mark.parametrize("family", sorted(families), indirect=True, scope="module")


def fresh(family: str) -> Any:
    pipeline = FAMILIES[family]()
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()  # as from_pretrained leaves them
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def policy_of(family: str, pipeline: Any = None, **settings: Any) -> DiffusionPolicy:
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "caption_dropout": 0.0} | settings
    return DiffusionPolicy(pipeline or fresh(family), AdapterConfig(rank=2), call=CALLS[family], **settings)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def stock(family: str) -> Any:
    """The pipeline that no policy has touched."""
    return fresh(family)


@pytest.fixture(scope="module")
def shared_policy(family: str) -> DiffusionPolicy:
    return policy_of(family)


@pytest.fixture
def policy(shared_policy: DiffusionPolicy) -> Any:
    """A policy at its beginning."""
    start = shared_policy.adapter_state()
    yield shared_policy
    shared_policy.load_adapter(start)
    for p in shared_policy.parameters():
        p.grad = None


def batch_of(policy: DiffusionPolicy) -> tuple[list[Sample], Draw]:
    samples = policy.sample(PROMPTS, SEEDS)
    return samples, policy.draw(samples, torch.Generator().manual_seed(0))


def move(policy: DiffusionPolicy, scale: float = 0.3) -> None:
    """Away from the base model, as training would."""
    generator = torch.Generator().manual_seed(5)
    for p in policy.parameters():
        p.data += scale * torch.randn(p.shape, generator=generator)


def guidance(family: str, scale: float) -> dict[str, Any]:
    """How each family's own documentation spells guidance."""
    if family in GUIDED_BY_AN_INPUT_OR_NOT_AT_ALL:
        return {}
    if family in GUIDED_BY_TRUE_CFG:
        return {"true_cfg_scale": scale} | ({"negative_prompt": [""] * len(PROMPTS)} if scale > 1 else {})
    return {"guidance_scale": scale - 1 if family in GUIDED_FROM_ZERO else scale}


def drawn(pipeline: Any, family: str, **call: Any) -> torch.Tensor:
    """Pictures in [0, 1] of all prompts by the pipeline alone."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    call = CALLS[family] | guidance(family, 1.0) | {"output_type": "pt", "num_inference_steps": 2} | call
    return pipeline(prompt=list(TEXTS), generator=generators, **call).images


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value where that is above 1."""
    return float((one - other).abs().max() / max(1.0, float(other.abs().max())))


def scheduler_inputs(pipeline: Any, family: str, scale: float) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(model output, timestep, scaled model input) of each step of the pipeline itself."""
    with tiny_models.watched_steps(pipeline) as seen:
        drawn(pipeline, family, output_type="latent", **guidance(family, scale))
    return seen


def shown(pipeline: Any, family: str, x0: torch.Tensor) -> torch.Tensor:
    """What the pipeline makes of x_0 after its last step."""
    step = pipeline.scheduler.step
    pipeline.scheduler.step = functools.wraps(step)(lambda *_, **__: Stepped(x0, x0))
    try:
        return drawn(pipeline, family, num_inference_steps=1)
    finally:
        del pipeline.scheduler.step


# -- replaying ---------------------------------------------------------------------------------------------------------


def test_the_replayed_prediction_is_what_the_pipeline_hands_to_its_scheduler(family, stock, policy):
    assert isinstance(policy, Policy)
    for model_output, t, x_t in scheduler_inputs(stock, family, 1.0):
        predicted = policy.predict(x_t, t.expand(3), TEXTS)
        assert apart(predicted, model_output) < 1e-5
        assert (policy.predict(x_t, t.expand(3), TEXTS[::-1]) - model_output).abs().max() > 1e-3


def test_each_row_has_its_own_timestep_and_depends_on_no_other_row(family, policy):
    samples, draw = batch_of(policy)
    t_B = torch.tensor([100, 500, 900])
    texts = [*TEXTS[:2], LONG.text]
    together = policy.predict(draw.noise, t_B, texts)
    for i in range(3):
        alone = policy.predict(draw.noise[i : i + 1], t_B[i : i + 1], texts[i : i + 1])
        assert apart(together[i : i + 1], alone) < 1e-5
    assert (policy.predict(draw.noise, t_B.flip(0), texts) - together)[0].abs().max() > 1e-3
    assert together.shape == draw.noise.shape == (3, *samples[0].latents.shape)


@only(FAMILIES.keys() - GUIDED_BY_AN_INPUT_OR_NOT_AT_ALL - GUIDED_BY_ANOTHER_FORMULA)
def test_two_replayed_predictions_make_the_pipelines_own_guidance(family, stock, policy):
    for model_output, t, x_t in scheduler_inputs(stock, family, 4.0):
        prompted, unprompted = policy.predict(x_t, t.expand(3), TEXTS), policy.predict(x_t, t.expand(3), [None] * 3)
        guided = unprompted + 4.0 * (prompted - unprompted)
        assert apart(guided, model_output) < 2e-5
        policy._check_guidance(4.0, x_t, t.expand(3), TEXTS[0])


def test_guidance_is_the_pipelines_own_by_default(family, stock):
    parameters = inspect.signature(type(stock).__call__).parameters
    own = parameters["true_cfg_scale" if family in GUIDED_BY_TRUE_CFG else "guidance_scale"].default
    own = 1.0 if family in GUIDED_BY_AN_INPUT_OR_NOT_AT_ALL else own
    assert GuidanceArgument(stock).default == (own + 1 if family in GUIDED_FROM_ZERO else own)


@only(GUIDED_BY_AN_INPUT_OR_NOT_AT_ALL)
def test_guidance_is_refused_where_the_model_knows_none(family):
    with pytest.raises(ConfigError, match="guidance_scale 4"):
        policy_of(family, guidance_scale=4.0)


@only(GUIDED_BY_ANOTHER_FORMULA)
def test_guidance_is_refused_in_training_where_the_pipeline_has_another_formula(family):
    policy = policy_of(family, guidance_scale=4.0, training_guidance_scale=4.0)
    with pytest.raises(ConfigError, match="more to its guided predictions than u"):
        policy.error(*batch_of(policy))


# -- training ----------------------------------------------------------------------------------------------------------


def test_gradients_reach_the_lora_and_nothing_else(family, policy):
    policy.error(*batch_of(policy)).sum().backward()
    names = {id(p): n for n, p in policy.denoiser.named_parameters()}
    assert all("lora_" in names[id(p)] for p in policy.parameters())
    # B begins at zero, so at first only B moves.
    moving = {names[id(p)] for p in policy.parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    unused = UNUSED_LAYERS.get(family, ())
    assert moving == {n for n in names.values() if "lora_B" in n and not n.startswith(unused)}
    modules = [m for m in policy.pipeline.components.values() if isinstance(m, torch.nn.Module)]
    trained = {n for m in modules for n, p in m.named_parameters() if p.requires_grad}
    assert trained == {names[id(p)] for p in policy.parameters()}
    assert all(p.grad is None for m in modules for p in m.parameters() if not p.requires_grad)


def test_a_few_optimizer_steps_lower_the_error_on_a_fixed_set(policy):
    samples, draw = batch_of(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-2)
    first = policy.error(samples, draw).mean().item()
    for _ in range(6):
        policy.error(samples, draw).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert policy.error(samples, draw).mean().item() < 0.99 * first


def test_the_loss_of_dpo_begins_at_log_2(policy):
    samples, draw = batch_of(policy)
    sides = []
    for winners in (samples, samples[::-1]):
        error_B = policy.error(winners, draw)
        with torch.no_grad(), policy.reference():
            sides.append((error_B, policy.error(winners, draw)))
    (chosen_B, reference_chosen_B), (rejected_B, reference_rejected_B) = sides
    loss_B, _ = preference(chosen_B, rejected_B, reference_chosen_B, reference_rejected_B, beta=10.0)
    assert loss_B.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-4)


def test_models_that_say_that_they_are_distilled_train_at_the_timesteps_of_sampling(family, stock, policy):
    assert policy.timesteps == ("sampler" if family in DISTILLED else "uniform")
    if family in DISTILLED:
        visited = sorted({round(t.item()) for _, t, _ in scheduler_inputs(stock, family, 1.0)})
        samples, draw = batch_of(policy)
        draw = Draw(noise=draw.noise, quantile_B=torch.tensor([0.0, 0.49, 0.51]), dropped_B=draw.dropped_B)
        _, _, t_B, _ = policy._noised(samples, draw)
        assert t_B.tolist() == pytest.approx([visited[0], visited[0], visited[1]], abs=0.5)


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_the_recorded_latents_decode_to_the_sampled_picture(family, stock, policy):
    samples = policy.sample(PROMPTS, SEEDS)
    pictures = shown(stock, family, torch.stack([sample.latents for sample in samples]))
    for sample, picture in zip(samples, pictures, strict=True):
        assert sample.image.dtype == torch.uint8 and sample.flaw is None and sample.latents.dtype == torch.float32
        assert (picture - sample.image / 255).abs().max() <= 1 / 255


def test_a_prompt_and_seed_give_the_same_sample_alone_and_in_a_batch(family, policy):
    scale = 1.0 if family in GUIDED_BY_AN_INPUT_OR_NOT_AT_ALL else 3.0
    prompts = [*PROMPTS[:2], LONG]
    together = policy.sample(prompts, SEEDS, guidance_scale=scale)
    for prompt, seed, sample in zip(prompts, SEEDS, together, strict=True):
        assert (sample.prompt, sample.seed) == (prompt, seed)
        [alone] = policy.sample([prompt], [seed], guidance_scale=scale)
        torch.testing.assert_close(alone.latents, sample.latents, atol=1e-4, rtol=0)
    [other_seed] = policy.sample(PROMPTS[:1], [99], guidance_scale=scale)
    assert (other_seed.latents - together[0].latents).abs().max() > 0.1


def test_a_users_picture_becomes_latents_that_decode_to_its_reconstruction(family, stock, policy):
    size = CALLS[family]["height"]
    assert policy.picture_size == (size, size)
    image = (torch.rand(3, size, size, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    passes = policy.passes
    [sample] = policy.encode_outputs(PROMPTS[:1], [image])
    pixels = image[None] / 127.5 - 1
    with torch.no_grad():
        encoded = stock.vae.encode(pixels[:, :, None] if family == "qwen-image" else pixels)
        mean = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
        reconstructed = (stock.vae.decode(mean).sample.view(3, size, size) / 2 + 0.5).clamp(0, 1)
    [*_, picture] = shown(stock, family, torch.stack([sample.latents] * 3))
    torch.testing.assert_close(picture, reconstructed, atol=1e-4, rtol=0)
    assert torch.equal(sample.image, image) and sample.prompt == PROMPTS[0] and policy.passes == passes
    assert sample.latents.shape == policy.sample(PROMPTS[:1], SEEDS[:1])[0].latents.shape
    assert policy.encode_outputs(PROMPTS[1:2], [image])[0].id != sample.id


def test_a_trajectory_is_retraced_with_the_densities_that_it_was_drawn_with(family, policy):
    try:
        policy.check_trajectories()
    except ConfigError as refusal:  # no step of this scheduler has a known density
        assert family in OTHER_STEPS and "set model.scheduler to" in str(refusal)
        return
    assert family not in OTHER_STEPS
    samples = policy.sample([*PROMPTS[:2], LONG], SEEDS, noise_level=0.7)
    for step in range(2):
        with torch.no_grad():
            log_prob_B = policy.log_prob(samples, [step] * 3).squeeze(1)
        recorded_B = torch.stack([sample.trajectory.log_prob_T[step] for sample in samples])
        # A last step with no noise left has no density.
        torch.testing.assert_close(log_prob_B, recorded_B, atol=1e-4, rtol=0, equal_nan=step == 1)


# -- a run -------------------------------------------------------------------------------------------------------------


def test_two_rounds_of_raft_encode_no_prompt_twice_and_leave_a_lora_that_draws_the_same_elsewhere(
    family, stock, tmp_path: Path
):
    pipeline = fresh(family)
    encoded = [encoded_rows(m) for n, m in pipeline.components.items() if n.startswith("text_encoder") and m]
    config = tiny_config(
        tmp_path,
        model={"call": CALLS[family]},
        prompts={"source": TEXTS},
        training={"steps": 1, "learning_rate": 0.3},
        evaluation={"every": 2},
    )
    run = build(config, pipeline=pipeline, rewards={"redness": FunctionReward(redness, "redness")})
    run_rounds(run)
    for rows in encoded:
        # The empty prompt may come as a prompt and, beside it, as what guidance leads away from.
        assert len(rows) <= len(TEXTS) + 1 and sorted(rows.values())[:-1] == [1] * (len(rows) - 1)

    expected = drawn(pipeline, family)
    stock.save_pretrained(tmp_path / "base")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "base", use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    plain = drawn(pipe, family)
    exec(run.load_line, {"pipe": pipe})
    assert torch.equal(drawn(pipe, family), expected)
    assert not torch.equal(plain, expected)


def encoded_rows(encoder: torch.nn.Module) -> Counter:
    """How often each row of tokens has gone through the text encoder."""
    rows: Counter = Counter()

    def count(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        rows.update(tuple(row) for row in ids.tolist())

    encoder.register_forward_pre_hook(count, with_kwargs=True)
    return rows
