"""What the loop costs over the bare libraries, as ratios from one run on this machine.

    python -m benchmarks.throughput            # the embedded model and an SD1.5-shaped random one at 256 pixels
    python -m benchmarks.throughput --models shapes

Every pair is timed in turn, several times, and the ratio of the medians is shown: machines are shared and noisy.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.common import arguments, configured, run, table
from raftdiff.config import AdapterConfig, ModelConfig
from raftdiff.pipelines.diffusion import DiffusionPolicy
from raftdiff.pipelines.loading import load_pipeline
from raftdiff.pipelines.lora import ATTENTION
from raftdiff.pipelines.shapes import build_tokenizer
from raftdiff.types import Prompt

K = 8


def sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's architecture with random weights; the tokenizer is the embedded model's."""
    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> float:
    """Seconds of `theirs` over seconds of `ours`: above 1, ours is faster."""
    ours(), theirs()
    seconds: dict[Callable, list[float]] = {ours: [], theirs: []}
    for _ in range(repeats):
        for function, times in seconds.items():
            began = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return statistics.median(seconds[theirs]) / statistics.median(seconds[ours])


def sampling(pipeline: Any, policy: DiffusionPolicy, prompts: list[Prompt], size: dict, repeats: int) -> list[float]:
    rows = [prompt for prompt in prompts for _ in range(K)]
    seeds = list(range(len(rows)))

    def ours():
        policy._prompts._prompts.clear()  # each repeat encodes its prompts anew, as the others do
        policy.sample(rows, seeds)

    def bare(batch: int) -> Callable[[], None]:
        def call():
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch]
                generators = [torch.Generator().manual_seed(s) for s in seeds[start : start + batch]]
                pipeline(
                    [p.text for p in part],
                    num_inference_steps=policy.num_inference_steps,
                    guidance_scale=1.0,
                    generator=generators,
                    output_type="pt",
                    **size,
                )

        return call

    with policy.reference():  # the bare pipeline has no adapter either
        return [ratio(ours, bare(K), repeats), ratio(ours, bare(policy.batch_size), repeats)]


def training(policy: DiffusionPolicy, hand: Any, batch: int, repeats: int, prompts: list[Prompt]) -> float:
    """A step of the policy against the LoRA step as one writes it by hand, on the same latents and prompts."""
    samples = policy.sample(prompts[:1] * batch, list(range(batch)))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)
    texts = [s.prompt.text for s in samples]

    def ours():
        draw = policy.draw(samples, torch.Generator().manual_seed(0))
        policy.error(samples, draw).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    unet = hand.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=ATTENTION[:4]))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    own = torch.optim.AdamW(parameters, lr=1e-5)
    with torch.no_grad():
        states, _ = hand.encode_prompt(texts[:1], unet.device, 1, False)
    states = states.expand(batch, -1, -1)
    x0 = torch.stack([s.latents for s in samples if s.latents is not None]).to(unet.device)
    schedule = policy._schedule

    def theirs():
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(x0.shape, generator=generator).to(unet.device)
        t = torch.randint(0, 1000, (batch,), generator=generator).to(unet.device)
        x_t, target = schedule.noised(x0, noise, t)
        (unet(x_t, t, encoder_hidden_states=states).sample - target).square().mean().backward()
        own.step()
        own.zero_grad(set_to_none=True)

    return ratio(ours, theirs, repeats)


def overhead(output: str) -> float:
    """Seconds of a whole round over the sum of its stages, less one."""
    config = configured("demo", output, "throughput-round", {"rounds": 1, "evaluation.seeds_per_prompt": 1})
    began = time.perf_counter()
    result = run(config)
    whole = time.perf_counter() - began
    loading = time.perf_counter()
    load_pipeline(ModelConfig(path="shapes"))
    loading = time.perf_counter() - loading
    stages = sum(cost.seconds for report in result.reports for cost in report.ledger)
    return max(0.0, whole - loading - stages) / stages


def main() -> None:
    options = arguments(__doc__ or "", models=["shapes", "sd15"], repeats=3)
    rows = []
    for name in options.models:
        small = name == "shapes"
        prompts = [
            Prompt(text=t)
            for t in (
                "a red circle",
                "a blue square on a gray background",
                "two green crosses",
                "a large yellow triangle",
            )
        ][: 4 if small else 1]
        size = {} if small else {"height": 256, "width": 256}
        with tempfile.TemporaryDirectory() as folder:
            if not small:
                sd15().save_pretrained(folder)
            model = ModelConfig(path="shapes" if small else folder)
            pipeline, hand = load_pipeline(model), load_pipeline(model)
            policy = DiffusionPolicy(
                pipeline,
                AdapterConfig(rank=8),
                num_inference_steps=10 if small else 2,
                guidance_scale=1.0,
                batch_size=K * len(prompts),
                call=size,
                caption_dropout=0.0,
            )
            plain, batched = sampling(pipeline, policy, prompts, size, options.repeats)
            step = training(policy, hand, 32 if small else 2, options.repeats * 3, prompts)
        rows += [
            [name, "sampling, against the pipeline prompt by prompt", f"{plain:.2f}x", ">= 1.5x" if small else ""],
            [name, "sampling, against the pipeline batched by hand", f"{batched:.2f}x", ">= 0.95x"],
            [name, "training step, against a hand-written LoRA step", f"{step:.2f}x", ">= 1x"],
        ]
    cost = overhead(tempfile.mkdtemp())
    rows.append(["shapes", "a run's overhead over the sum of its stages", f"{cost:.1%}", "< 5%"])
    table("\nAbove 1x, raftdiff is faster", ["model", "what", "measured", "wanted"], rows)


if __name__ == "__main__":
    main()
