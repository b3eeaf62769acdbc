from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import open_clip
import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from raftdiff.shapes import WEIGHTS, texts
from raftdiff.shapes.captions import Caption, parse, random_caption
from raftdiff.shapes.oracle import Reading, judge_reading, read
from raftdiff.shapes.reviews import opening, polarity

from . import shapes, shapes_scorers, shapes_text, shapes_training

GUIDANCE = 1.5  # as the demo samples
STEPS = 10
K = 8
PERPLEXITY = {"translation": 1.5, "continuation": 4.5, "caption": 2.2}  # of a token, at most


class Gates:
    """The table of what was measured, what was wanted of it, and whether that holds."""

    def __init__(self) -> None:
        self.table = Table("gate", "measured", "wanted", "", box=None, pad_edge=False)
        self.passed = True

    def gate(self, name: str, value: float, low: float = 0.0, high: float = 1.0) -> None:
        """A share that must lie within `low` and `high`."""
        wanted = f">= {low:.0%}" if high == 1 else f"<= {high:.0%}" if low == 0 else f"{low:.0%} to {high:.0%}"
        self._row(name, f"{value:.1%}", wanted, low <= value <= high)

    def at_most(self, name: str, value: float, high: float) -> None:
        """A number that must not be above `high`."""
        self._row(name, f"{value:.2f}", f"<= {high:.2f}", value <= high)

    def note(self, name: str, share: float) -> None:
        """A share that is reported alone."""
        self.table.add_row(name, f"{share:.1%}", "", "")

    def _row(self, name: str, measured: str, wanted: str, holds: bool) -> None:
        self.passed &= holds
        self.table.add_row(name, measured, wanted, "ok" if holds else "FAIL")


def check(
    *, stage: Literal["images", "text", "all"] = "all", count: int = 256, console: Console, seed: int = 1234
) -> bool:
    """Measure every gate of the image models, the language model or both on fresh scenes and captions, print a table,
    and say whether all hold."""
    gates = Gates()
    if stage in ("images", "all"):
        check_images(gates, count=count, seed=seed)
    if stage in ("text", "all"):
        check_text(gates, count=count, seed=seed)
    console.print(gates.table)
    return gates.passed


def check_images(gates: Gates, *, count: int, seed: int) -> None:
    pipeline = DiffusionPipeline.from_pretrained(WEIGHTS / "pipeline", use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    captions, pixels = shapes_training.scenes(2000, seed)
    truth = [read(image) for image in pixels.permute(0, 2, 3, 1).numpy()]
    gates.gate("oracle accepts rendered truth", _strict(truth, captions), 0.98)
    shuffled = [captions[i] for i in np.random.default_rng(seed).permutation(len(captions))]
    gates.gate("oracle accepts shuffled captions", _strict(truth, shuffled), high=0.01)
    with torch.no_grad():
        latents = shapes_training.encode(pipeline.vae, pixels[:1000])
        decoded = torch.cat([pipeline.vae.decode(z).sample for z in latents.split(250)])
    images = decoded.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    gates.gate("VAE reconstructions the oracle accepts", _strict([read(i) for i in images], captions[:1000]), 0.95)

    rng = np.random.default_rng(seed + 1)
    for kind in ("single", "count", "relation"):
        asked = [random_caption(rng, kind) for _ in range(count if kind == "single" else count // 4)]
        drawn = draw(pipeline, asked, K, guidance_scale=GUIDANCE, seed=seed)
        verdicts = [[judge_reading(r, c) for r in row] for row, c in zip(drawn, asked, strict=True)]
        strict = np.array([[all(v.values()) for v in row] for row in verdicts])
        if kind == "single":
            objects = [r.objects[0] if r.objects else None for row in drawn for r in row]
            gates.gate("base: some shape fits the object", float(np.mean([bool(o and o.shape) for o in objects])), 0.85)
            gates.gate("base: strict score, single objects", float(strict.mean()), 0.30, 0.65)
            gates.gate(f"base: best of {K} strict, single objects", float(strict.any(1).mean()), 0.80)
            for guidance in (1.0, 2.0, 3.0):
                again = draw(pipeline, asked, 2, guidance_scale=guidance, seed=seed)
                score = np.mean(
                    [all(judge_reading(r, c).values()) for row, c in zip(again, asked, strict=True) for r in row]
                )
                gates.note(f"  strict at guidance {guidance:g}", float(score))
        else:
            gates.note(f"base: strict score, {kind}", float(strict.mean()))
            gates.note(f"base: best of {K} strict, {kind}", float(strict.any(1).mean()))
        for name in ("count", "color", "shape", "size", "position", "relation", "background", "clean"):
            values = [v[name] for row in verdicts for v in row if name in v]
            if values:
                gates.note(f"  {name}", float(np.mean(values)))

    clip = open_clip.create_model(f"local-dir:{WEIGHTS / 'clip'}", require_pretrained=True).eval()
    accuracy = shapes_scorers.two_way_accuracy(clip, shapes.build_tokenizer(), count=2000)
    gates.gate("CLIP: caption against one changed attribute", accuracy.pop("all"), 0.90)
    for name, value in accuracy.items():
        gates.note(f"  {name}", value)


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


def check_text(gates: Gates, *, count: int, seed: int) -> None:
    """The language model, by `count` prompts of each task; its French is of captions that it was not trained on."""
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS / "text").eval()
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "text")
    rng = np.random.default_rng(seed)
    for task, high in PERPLEXITY.items():
        gates.at_most(f"text: perplexity, {task}", perplexity(model, tokenizer, task, count, rng), high)

    captions = [texts.translation_caption(rng, unseen=True) for _ in range(count)]
    prompts = [texts.translation_prompt(caption) for caption in captions]
    sampled = complete(model, tokenizer, prompts, K, seed=seed)
    greedy = complete(model, tokenizer, prompts, 1, seed=seed, greedy=True)
    strict = translation_scores(sampled, captions, strict=True)
    gates.gate("text: strict translations, sampled", float(strict.mean()), 0.40, 0.70)
    gates.gate(f"text: best of {K} strict translations", float(strict.any(1).mean()), 0.90)
    right = translation_scores(greedy, captions, strict=True)
    gates.gate("text: strict translations, greedy", float(right.mean()), 0.55, 0.80)
    gates.note("  attributes right, sampled", float(translation_scores(sampled, captions, strict=False).mean()))

    asked = [texts.asked_words(random_caption(rng), rng) for _ in range(count)]
    written = complete(model, tokenizer, [texts.caption_prompt(words) for words in asked], 1, seed=seed)
    gates.gate("text: captions of the grammar", float(np.mean([is_caption(text) for (text,) in written])), 0.95)
    used = [all(word in text for word in words) for words, (text,) in zip(asked, written, strict=True)]
    gates.gate("text: captions with every word asked for", float(np.mean(used)), 0.80)

    reviews = complete(model, tokenizer, [texts.review_prompt(opening(rng)) for _ in range(count)], K, seed=seed)
    meant = np.array([[polarity(text) for text in row] for row in reviews])
    gates.gate("text: reviews that are well meant", float((meant > 0).mean()), 0.35, 0.55)
    gates.gate("text: reviews that are badly meant", float((meant < 0).mean()), 0.35, 0.55)
    both = (meant > 0).any(1) & (meant < 0).any(1)
    gates.gate("text: openings with reviews of both kinds", float(both.mean()), 0.90)


def translation_scores(rows: Sequence[Sequence[str]], captions: Sequence[Caption], *, strict: bool) -> np.ndarray:
    """Of each row of English texts for a caption's French, float64 [N, K], 0 to 1."""
    return np.array(
        [
            [texts.translation_score(english, texts.french(caption), strict=strict) for english in row]
            for row, caption in zip(rows, captions, strict=True)
        ]
    )


def is_caption(text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, count: int, rng: np.random.Generator
) -> float:
    """Per token of `count` fresh completions of the corpus."""
    inputs = shapes_text.encode(tokenizer, [texts.random_text(task, rng) for _ in range(count)])
    return math.exp(model(**inputs).loss)


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    k: int,
    *,
    seed: int,
    greedy: bool = False,
) -> list[list[str]]:
    """`k` completions of each prompt, sampled at temperature 1 or `greedy`."""
    set_seed(seed)
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False)
    ids = model.generate(**inputs, do_sample=not greedy, num_return_sequences=k)
    found = tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [found[i : i + k] for i in range(0, len(found), k)]
