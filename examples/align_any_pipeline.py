"""Align any text-to-image pipeline of diffusers from Python: a folder, or an id of the hub.

    python examples/align_any_pipeline.py stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --prompts prompts.txt --held-out held-out.txt --reward clip --guidance 7.5 --dtype bf16
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline

import raftdiff
from raftdiff.pipelines.loading import DTYPES
from raftdiff.rounds import Result


def main(arguments: Sequence[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a folder with a model_index.json, or a hub id")
    parser.add_argument("--prompts", required=True, help="a file with one prompt a line")
    parser.add_argument("--held-out", help="prompts for the evaluation, another file")
    parser.add_argument("--reward", default="clip", help="a registered reward (`raftdiff list`)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--per-round", type=int, help="prompts in a round; all if absent")
    parser.add_argument("--samples-per-prompt", type=int, default=8, help="K")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale, in sampling and training")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels; the model's own if absent")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the frozen weights and of training")
    parser.add_argument("--output", default="runs")
    parser.add_argument("--name", default="any-pipeline")
    options = parser.parse_args(arguments)

    pipeline = DiffusionPipeline.from_pretrained(options.model, dtype=DTYPES[options.dtype], use_safetensors=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    result = raftdiff.align(
        pipeline,
        prompts=options.prompts,
        held_out=options.held_out,
        reward=options.reward,
        rounds=options.rounds,
        name=options.name,
        output=options.output,
        prompts_per_round=options.per_round,
        model={"height": options.size, "width": options.size},
        sampling={
            "samples_per_prompt": options.samples_per_prompt,
            "num_inference_steps": options.steps,
            "guidance_scale": options.guidance,
        },
        training={"precision": options.dtype},
    )
    print(result.verdict.message)
    print(f"pipe.load_lora_weights({str(result.lora_path)!r})")
    return result


if __name__ == "__main__":
    main()
