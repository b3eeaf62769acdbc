"""What the throughput benchmark times is what it says."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import architectures, throughput_text
from benchmarks.throughput import Bare, flops_of, fresh_prompts, in_turn
from raftdiff.config import AdapterConfig
from raftdiff.pipelines.diffusion import DiffusionPolicy


@pytest.mark.parametrize(
    ("denoiser", "parameters"),
    [
        ("sd15_unet", 859_520_964),
        ("sdxl_unet", 2_567_463_684),
        ("sd35_medium_transformer", 2_243_171_520),
        ("flux_dev_transformer", 11_901_408_320),
    ],
)
def test_the_architectures_have_as_many_parameters_as_the_published_weights(denoiser, parameters):
    with torch.device("meta"):
        made = getattr(architectures, denoiser)()
    assert sum(p.numel() for p in made.parameters()) == parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bare_denoiser_computes_what_the_policy_predicts(family):
    policy = DiffusionPolicy(
        FAMILIES[family](), AdapterConfig(rank=2), num_inference_steps=1, guidance_scale=1.0, batch_size=2
    )
    prompts = fresh_prompts(2)
    x = torch.stack([s.latents for s in policy.sample(prompts, [0, 1])])
    t_B, texts = torch.tensor([500, 500]), [p.text for p in prompts]
    bare = Bare(policy, x, t_B, texts)
    with torch.no_grad():
        assert torch.equal(bare(x, t_B), policy.predict(x, t_B, texts))
        later = torch.tensor([100, 700])
        assert torch.allclose(bare(2 * x, later), policy.predict(2 * x, later, texts), atol=1e-5)


def test_no_two_calls_get_the_same_prompts():
    texts = [p.text for p in [*fresh_prompts(3), *fresh_prompts(3)]]
    assert len(set(texts)) == 6


def test_operations_are_counted_with_those_of_attention_and_of_the_backward_pass():
    q = torch.randn(1, 1, 8, 4, requires_grad=True)
    weight = torch.randn(4, 4)

    def forward():
        with torch.no_grad():
            torch.nn.functional.scaled_dot_product_attention(q, q, q)

    assert flops_of(forward) == 2 * (2 * 8 * 8 * 4)  # scores, then values; a multiplication and an addition each
    assert flops_of(lambda: (q[0, 0] @ weight).sum().backward()) == 2 * (2 * 8 * 4 * 4)


def test_what_is_compared_is_run_in_turn():
    calls = []
    seconds = in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2)
    assert calls == ["a", "b"] * 3  # the first of each is not measured
    assert seconds.keys() == {"a", "b"} and all(s >= 0 for s in seconds.values())


@pytest.mark.parametrize(("name", "parameters"), [("llama100m", 100_449_920), ("llama8b", 8_030_261_248)])
def test_the_language_models_are_as_large_as_they_are_called(name, parameters):
    with torch.device("meta"):
        made = LlamaForCausalLM(LlamaConfig(**throughput_text.LOADS[name].shape))
    assert sum(p.numel() for p in made.parameters()) == parameters


def test_the_plain_loss_of_texts_is_that_of_the_policy_with_its_gradient():
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    load = throughput_text.Load(shape=shape | {"vocab_size": 1536}, rows=3, prompt=8, written=5, training_rows=3)
    policy = throughput_text.subject(load, "fp32")
    samples = throughput_text.completed(policy, throughput_text.prompts(load, 3), load.written)
    inputs = throughput_text.rows(policy, samples)
    assert inputs["attention_mask"].sum(1).tolist() == [1 + 4 + 5, 1 + 6 + 5, 1 + 8 + 5]  # begin, prompt, completion
    losses = throughput_text.loss(policy, samples), throughput_text.plain_loss(policy, inputs)
    torch.testing.assert_close(*losses)
    ours, plain = (torch.autograd.grad(loss, policy.parameters(), allow_unused=True) for loss in losses)
    torch.testing.assert_close(ours, plain)
    assert [len(s.completion.tokens_T) for s in policy.sample([s.prompt for s in samples], [0, 1, 2])] == [5, 5, 5]
