"""What docs/embedded-model.md claims of the embedded model, measured: `raftdiff shapes check`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import open_clip
import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.table import Table

from raftdiff.shapes import WEIGHTS
from raftdiff.shapes.captions import Caption, random_caption
from raftdiff.shapes.oracle import Reading, judge_reading, read

from . import shapes, shapes_scorers, shapes_training

GUIDANCE = 1.5  # as the demo samples
STEPS = 10
K = 8


def check(*, count: int = 256, console: Console, seed: int = 1234) -> bool:
    """Measure every gate on fresh scenes and captions, print a table, and say whether all hold."""
    pipeline = DiffusionPipeline.from_pretrained(WEIGHTS / "pipeline", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    table = Table("gate", "measured", "wanted", "", box=None, pad_edge=False)
    passed = True

    def gate(name: str, value: float, low: float = 0.0, high: float = 1.0) -> None:
        nonlocal passed
        holds = low <= value <= high
        passed &= holds
        wanted = f">= {low:.0%}" if high == 1 else f"<= {high:.0%}" if low == 0 else f"{low:.0%} to {high:.0%}"
        table.add_row(name, f"{value:.1%}", wanted, "ok" if holds else "FAIL")

    captions, pixels = shapes_training.scenes(2000, seed)
    truth = [read(image) for image in pixels.permute(0, 2, 3, 1).numpy()]
    gate("oracle accepts rendered truth", _strict(truth, captions), 0.98)
    shuffled = [captions[i] for i in np.random.default_rng(seed).permutation(len(captions))]
    gate("oracle accepts shuffled captions", _strict(truth, shuffled), high=0.01)
    with torch.no_grad():
        latents = shapes_training.encode(pipeline.vae, pixels[:1000])
        decoded = torch.cat([pipeline.vae.decode(z).sample for z in latents.split(250)])
    images = decoded.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    gate("VAE reconstructions the oracle accepts", _strict([read(i) for i in images], captions[:1000]), 0.95)

    rng = np.random.default_rng(seed + 1)
    for kind in ("single", "count", "relation"):
        asked = [random_caption(rng, kind) for _ in range(count if kind == "single" else count // 4)]
        drawn = draw(pipeline, asked, K, guidance_scale=GUIDANCE, seed=seed)
        verdicts = [[judge_reading(r, c) for r in row] for row, c in zip(drawn, asked, strict=True)]
        strict = np.array([[all(v.values()) for v in row] for row in verdicts])
        if kind == "single":
            objects = [r.objects[0] if r.objects else None for row in drawn for r in row]
            gate("base: some shape fits the object", float(np.mean([bool(o and o.shape) for o in objects])), 0.85)
            gate("base: strict score, single objects", float(strict.mean()), 0.30, 0.65)
            gate(f"base: best of {K} strict, single objects", float(strict.any(1).mean()), 0.80)
            for guidance in (1.0, 2.0, 3.0):
                again = draw(pipeline, asked, 2, guidance_scale=guidance, seed=seed)
                score = np.mean(
                    [all(judge_reading(r, c).values()) for row, c in zip(again, asked, strict=True) for r in row]
                )
                table.add_row(f"  strict at guidance {guidance:g}", f"{score:.1%}", "", "")
        else:
            table.add_row(f"base: strict score, {kind}", f"{strict.mean():.1%}", "reported", "")
            table.add_row(f"base: best of {K} strict, {kind}", f"{strict.any(1).mean():.1%}", "reported", "")
        for name in ("count", "color", "shape", "size", "position", "relation", "background", "clean"):
            values = [v[name] for row in verdicts for v in row if name in v]
            if values:
                table.add_row(f"  {name}", f"{np.mean(values):.1%}", "", "")

    clip = open_clip.create_model(f"local-dir:{WEIGHTS / 'clip'}", require_pretrained=True).eval()
    accuracy = shapes_scorers.two_way_accuracy(clip, shapes.build_tokenizer(), count=2000)
    gate("CLIP: caption against one changed attribute", accuracy.pop("all"), 0.90)
    for name, value in accuracy.items():
        table.add_row(f"  {name}", f"{value:.1%}", "", "")
    console.print(table)
    return passed


def _strict(readings: Sequence[Reading], captions: Sequence[Caption]) -> float:
    return float(np.mean([all(judge_reading(r, c).values()) for r, c in zip(readings, captions, strict=True)]))


def draw(
    pipeline, captions: Sequence[Caption], k: int, *, guidance_scale: float, seed: int, batch: int = 64
) -> list[list[Reading]]:
    """`k` readings of the pipeline's pictures for each caption."""
    texts = [str(caption) for caption in captions for _ in range(k)]
    readings: list[Reading] = []
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(part))]
        images = pipeline(
            part, num_inference_steps=STEPS, guidance_scale=guidance_scale, generator=generators, output_type="np"
        ).images
        readings += [read((image * 255).round().astype(np.uint8)) for image in images]
    return [readings[i : i + k] for i in range(0, len(readings), k)]
