"""The embedded world's own scorers, trained from nothing: an open_clip model, and an aesthetic head on it in the
format of LAION's first predictor. Both ship with the package and load through open_clip's own local-folder route.

What is true of a picture comes from the scene that was laid out, never from the oracle's reading of pixels: the
oracle stays an independent judge. The one exception is the synthetic rating, which is defined on pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save_file
from scipy import stats
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTokenizer

from raftdiff.shapes.captions import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Caption,
    random_caption,
    stated,
    vary,
)
from raftdiff.shapes.oracle import CENTER, SIDE, rating
from raftdiff.shapes.scenes import CANVAS, Scene, random_scene, render

from . import shapes
from .shapes_training import fit

NEGATIVES = 3  # hard negative captions a picture
EMBED_DIM = 64
MEAN_STD = 0.5  # mean and deviation of the pixels, as open_clip's preprocessing takes them
RATING_WEIGHT = 0.3  # of the auxiliary regression of the synthetic rating
PLACE_WEIGHT = 3.0  # of that of the colors' places, whose variance is about a tenth
MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def clip_config(tokenizer: CLIPTokenizer) -> dict:
    """The `model_cfg` of open_clip: 16 patches of 8x8 pixels, 0.78M parameters in all."""
    return {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {
            "image_size": shapes.IMAGE_SIZE,
            "patch_size": 8,
            "width": 128,
            "head_width": 32,
            "layers": 3,
        },
        "text_cfg": {
            "context_length": shapes.MAX_TOKENS,
            "vocab_size": len(tokenizer),
            "width": 64,
            "heads": 4,
            "layers": 2,
            "hf_tokenizer_name": "local",  # any name: a local folder brings its own tokenizer files
        },
    }


def build_clip(tokenizer: CLIPTokenizer) -> CLIP:
    """The open_clip model with random weights. The text's embedding is taken at the highest token id, the first end
    of text (the tokenizer pads with the same token, and the text is read causally)."""
    return CLIP(**clip_config(tokenizer))


# What a caption asks for, and what a scene shows, each as the bits of one integer: a caption is true of a scene when
# the scene has all of its bits.
_FACTS = (
    *((f"kind:{kind}") for kind in ("one", "two", "three", "pair")),
    *(f"color:{name}" for name in COLORS),
    *(f"shape:{name}" for name in SHAPES),
    *(f"other_color:{name}" for name in COLORS),
    *(f"other_shape:{name}" for name in SHAPES),
    *(f"size:{name}" for name in SIZES),
    *(f"position:{name}" for name in POSITIONS),
    *(f"relation:{name}" for name in RELATIONS),
    *(f"background:{name}" for name in BACKGROUNDS),
)
_BIT = {fact: 1 << i for i, fact in enumerate(_FACTS)}


def asks(caption: Caption) -> int:
    """The facts that the caption states, as bits."""
    kind = "pair" if caption.relation else ("one", "two", "three")[caption.count - 1]
    bits = _BIT[f"kind:{kind}"]
    for name in ("color", "shape", "other_color", "other_shape", "size", "position", "relation", "background"):
        value = getattr(caption, name)
        bits |= _BIT[f"{name}:{value}"] if value else 0
    return bits


def shows(caption: Caption, scene: Scene) -> tuple[int, int]:
    """All the facts that are true of a scene made for `caption`, as bits; twice, once seen from either object: "a red
    circle above a blue square" is also a blue square below a red circle."""
    nearest = min(BACKGROUNDS, key=lambda name: math.dist(BACKGROUNDS[name], scene.background_rgb))
    bits = asks(caption) | _BIT[f"background:{nearest}"]
    if caption.relation and caption.other_color and caption.other_shape:
        mirrored = replace(
            caption,
            color=caption.other_color,
            shape=caption.other_shape,
            other_color=caption.color,
            other_shape=caption.shape,
            relation=MIRRORED[caption.relation],
        )
        return bits, asks(mirrored) | _BIT[f"background:{nearest}"]
    if caption.count == 1:
        x, y, radius = scene.objects[0].x / CANVAS, scene.objects[0].y / CANVAS, scene.objects[0].radius
        true = {
            "size:small": radius <= 10,
            "size:large": radius >= 13.5,
            "position:at the top": y < SIDE,
            "position:at the bottom": y > 1 - SIDE,
            "position:on the left": x < SIDE,
            "position:on the right": x > 1 - SIDE,
            "position:in the center": max(abs(x - 0.5), abs(y - 0.5)) < CENTER,
        }
        for fact, holds in true.items():
            bits |= _BIT[fact] if holds else 0
    return bits, bits


def truth(asked_T: torch.Tensor, shown_B2: torch.Tensor) -> torch.Tensor:
    """Whether each caption is true of each picture, bool [B, T], from int64 bits [T] and [B, 2]."""
    lacking_B2T = asked_T & ~shown_B2[:, :, None]
    return (lacking_B2T == 0).any(dim=1)


def places(caption: Caption, scene: Scene) -> list[tuple[float, float]]:
    """For each color the mean of its objects' x and y, -1 to 1 over the canvas; NaN for a color that is not there."""
    names = [caption.color, caption.other_color] if caption.relation else [caption.color] * caption.count
    found = []
    for color in COLORS:
        own = [(o.x, o.y) for o, name in zip(scene.objects, names, strict=True) if name == color]
        x, y = np.mean(own, axis=0) / CANVAS * 2 - 1 if own else (math.nan, math.nan)
        found.append((float(x), float(y)))
    return found


@dataclass(frozen=True, kw_only=True)
class LabelledScenes:
    """Captions of the training mixture with all that is known of their scenes."""

    captions: list[Caption]
    shown_N2: torch.Tensor
    """int64 bits, see `shows`."""
    place_NC2: torch.Tensor
    """float32 [N, colors, 2], see `places`."""
    pixels: torch.Tensor
    """uint8 [N, 3, 32, 32]"""


def labelled_scenes(count: int, seed: int) -> LabelledScenes:
    rng = np.random.default_rng(seed)
    captions = [random_caption(rng) for _ in range(count)]
    laid_out = [random_scene(caption, rng) for caption in captions]
    pairs = list(zip(captions, laid_out, strict=True))
    pixels = np.stack([render(scene, shapes.IMAGE_SIZE) for scene in laid_out])
    return LabelledScenes(
        captions=captions,
        shown_N2=torch.tensor([shows(caption, scene) for caption, scene in pairs]),
        place_NC2=torch.tensor([places(caption, scene) for caption, scene in pairs]),
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
    )


def exchange(caption: Caption) -> Caption | None:
    """A relation with the two shapes exchanged, every word else in place: the hard negative that only a model which
    binds shapes to colors can tell. None where there is nothing to exchange."""
    if caption.other_shape is None or caption.shape == caption.other_shape:
        return None
    return replace(caption, shape=caption.other_shape, other_shape=caption.shape)


def hard_negatives(caption: Caption, rng: np.random.Generator) -> list[Caption]:
    """`NEGATIVES` captions that differ from `caption` in one stated attribute each: always in the position or the
    relation, which are learned last, then in others at random, different ones as far as they go. For half of the
    relations the last has the shapes exchanged."""
    attributes = rng.permutation(stated(caption)).tolist()
    attributes.sort(key=lambda attribute: attribute not in ("position", "relation"))
    negatives = [vary(caption, attributes[i % len(attributes)], rng) for i in range(NEGATIVES)]
    exchanged = exchange(caption)
    if exchanged is not None and rng.random() < 0.5:
        negatives[-1] = exchanged
    return negatives


def soften(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures in [0, 1] as a generator may draw them: each blurred, dimmed or lit, and noisy by a random amount."""
    shape = (len(x), 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = x + 0.7 * torch.rand(shape, generator=generator) * (blurred - x)
    x = x * (1 + 0.06 * torch.randn(shape, generator=generator)) + 0.03 * torch.randn(shape, generator=generator)
    sd = 0.04 * torch.rand(shape, generator=generator)
    return (x + sd * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def embed_images(model: CLIP, x: torch.Tensor) -> torch.Tensor:
    """L2-normalised embeddings, float32 [B, 64], of pictures in [0, 1]."""
    return F.normalize(model.encode_image((x - MEAN_STD) / MEAN_STD).float(), dim=-1)


def embed_texts(model: CLIP, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """L2-normalised embeddings, float32 [T, 64]."""
    ids = tokenizer(
        list(texts), padding="max_length", max_length=shapes.MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return F.normalize(model.encode_text(ids).float(), dim=-1)


def contrastive_loss(similarity_BT: torch.Tensor, own_B: torch.Tensor, true_BT: torch.Tensor) -> torch.Tensor:
    """The mean of picture-to-text cross-entropy, over all the texts, and text-to-picture, over the batch. `own_B` is
    the column of each picture's own caption. Pairs of which the caption is also true are not counted as negatives."""
    rows = torch.arange(len(own_B))
    negative = torch.ones_like(true_BT).index_put((rows, own_B), torch.tensor(False)) & true_BT
    logits_BT = similarity_BT.masked_fill(negative, float("-inf"))
    return (F.cross_entropy(logits_BT, own_B) + F.cross_entropy(logits_BT[:, own_B].T, rows)) / 2


def train_clip(
    folder: Path, *, steps: int = 4000, batch: int = 64, seed: int = 3, pool: int = 60_000
) -> tuple[CLIP, CLIPTokenizer]:
    """Contrastive training on softened pictures with hard negatives, `NEGATIVES` a picture.

    Two regressions from the normalised embedding are added to the loss: of the synthetic rating, because captions
    seldom say how large an object is and how near to the center, so the embedding need not carry what the aesthetic
    head reads; and of the place of each color in the picture, because without it relations stay at chance for
    thousands of steps. The linear probe they use is thrown away; `train_aesthetic` fits the head that ships.
    """
    torch.manual_seed(seed)
    tokenizer = shapes.build_tokenizer()
    model = build_clip(tokenizer)
    probe = nn.Linear(EMBED_DIM, 1 + 2 * len(COLORS))
    scenes = labelled_scenes(pool, seed)
    rating_N = standardised_ratings(scenes.pixels)

    def loss_at(step, generator):
        index_B = torch.randint(pool, (batch,), generator=generator)
        rng = np.random.default_rng([seed, step])
        own = [scenes.captions[i] for i in index_B.tolist()]
        wrong = [negative for caption in own for negative in hard_negatives(caption, rng)]
        column = {caption: i for i, caption in enumerate(dict.fromkeys([*own, *wrong]))}
        own_B = torch.tensor([column[caption] for caption in own])
        true_BT = truth(torch.tensor([asks(caption) for caption in column]), scenes.shown_N2[index_B])
        # With so few tokens the plain attention is several times faster backward than the fused one on a CPU.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            image_BD = embed_images(model, soften(scenes.pixels[index_B].float() / 255, generator))
            text_TD = embed_texts(model, tokenizer, [str(caption) for caption in column])
        scale = model.logit_scale.clamp(max=math.log(100)).exp()
        contrast = contrastive_loss(scale * image_BD @ text_TD.T, own_B, true_BT)
        probed_BP = probe(image_BD * math.sqrt(EMBED_DIM))
        rating_loss = F.mse_loss(probed_BP[:, 0], rating_N[index_B])
        place_BP = scenes.place_NC2[index_B].flatten(1)
        there_BP = ~place_BP.isnan()
        place_loss = F.mse_loss(probed_BP[:, 1:][there_BP], place_BP[there_BP])
        return contrast + RATING_WEIGHT * rating_loss + PLACE_WEIGHT * place_loss

    both = nn.ModuleList([model, probe])
    fit("clip", both, loss_at, folder=folder, steps=steps, learning_rate=1.5e-3, seed=seed)
    return model.eval(), tokenizer


def standardised_ratings(pixels: torch.Tensor) -> torch.Tensor:
    """The synthetic ratings of uint8 pictures [N, 3, H, W] with mean 0 and deviation 1, float32 [N]."""
    ratings = torch.tensor(rate(pixels))
    return (ratings - ratings.mean()) / ratings.std()


def rate(pixels: torch.Tensor) -> list[float]:
    """The synthetic rating, 1 to 10, of each of the uint8 pictures [N, 3, H, W]."""
    return [rating(image) for image in pixels.permute(0, 2, 3, 1).numpy()]


@torch.no_grad()
def two_way_accuracy(
    model: CLIP, tokenizer: CLIPTokenizer, count: int = 4000, seed: int = 1003, *, softened: bool = False
) -> dict[str, float]:
    """How often, 0 to 1, a picture is closer to its caption than to one with a single stated attribute changed: for
    each attribute, for `exchanged` shapes, and `all`, the share of all the comparisons but the exchanged ones.

    The pictures are fresh scenes of the training mixture. Changed captions that happen to be true of the picture too
    (at the top *and* on the left) are left out.
    """
    rng = np.random.default_rng(seed)
    scenes = labelled_scenes(count, seed)
    captions = scenes.captions
    comparisons: list[tuple[int, str, Caption]] = []
    for i, caption in enumerate(captions):
        comparisons += [(i, attribute, vary(caption, attribute, rng)) for attribute in stated(caption)]
        exchanged = exchange(caption)
        comparisons += [(i, "exchanged", exchanged)] if exchanged else []
    x = scenes.pixels.float() / 255
    if softened:
        x = soften(x, torch.Generator().manual_seed(seed))
    image_BD = torch.cat([embed_images(model, part) for part in x.split(500)])
    column = {text: i for i, text in enumerate({str(c) for c in captions} | {str(c) for *_, c in comparisons})}
    texts = list(column)
    text_TD = torch.cat([embed_texts(model, tokenizer, texts[i : i + 500]) for i in range(0, len(texts), 500)])
    won: dict[str, list[bool]] = {}
    for i, attribute, wrong in comparisons:
        if truth(torch.tensor([asks(wrong)]), scenes.shown_N2[i : i + 1]).item():
            continue
        right_and_wrong = text_TD[[column[str(captions[i])], column[str(wrong)]]] @ image_BD[i]
        won.setdefault(attribute, []).append(bool(right_and_wrong[0] > right_and_wrong[1]))
    everything = [win for attribute, wins in won.items() if attribute != "exchanged" for win in wins]
    return {name: float(np.mean(wins)) for name, wins in [*sorted(won.items()), ("all", everything)]}


def save_clip(model: CLIP, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write `folder` in open_clip's format, the weights as float16. It loads, tokenizer and all, with
    `open_clip.create_model_from_pretrained(f"local-dir:{folder}")` and `open_clip.get_tokenizer(...)` of the same."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {
        "size": shapes.IMAGE_SIZE,
        "mean": [MEAN_STD] * 3,
        "std": [MEAN_STD] * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    config = {"model_cfg": clip_config(tokenizer), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")


@torch.no_grad()
def train_aesthetic(
    folder: Path, clip_folder: Path, *, count: int = 20_000, held_out: int = 4000, seed: int = 4, ridge: float = 1e-4
) -> dict[str, float]:
    """Fit a linear head to the synthetic rating by ridge regression on the L2-normalised embeddings of `count`
    pictures, half of them softened, and write `folder`/aesthetic.safetensors (`weight` [1, 64], `bias` [1], float16).

    Returns the correlations with the true rating on `held_out` fresh pictures: `pearson` and `spearman`, and
    `pearson_softened` where those are softened.
    """
    model = open_clip.create_model(f"local-dir:{clip_folder}", require_pretrained=True).eval()
    generator = torch.Generator().manual_seed(seed)

    def embed(x):
        return torch.cat([embed_images(model, part) for part in x.split(500)])

    pixels = labelled_scenes(count + held_out, seed).pixels
    rating_N = torch.tensor(rate(pixels))
    x = pixels.float() / 255
    x[: count // 2] = soften(x[: count // 2], generator)
    image_ND = embed(x)
    mean_D, mean = image_ND[:count].mean(0), rating_N[:count].mean()
    centered_ND = image_ND[:count] - mean_D
    gram_DD = centered_ND.T @ centered_ND / count + ridge * torch.eye(EMBED_DIM) / EMBED_DIM
    weight_D = torch.linalg.solve(gram_DD, centered_ND.T @ (rating_N[:count] - mean) / count)
    head = {"weight": weight_D[None].half(), "bias": (mean - weight_D @ mean_D)[None].half()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(head, folder / "aesthetic.safetensors")

    def predict(image_BD):
        return image_BD @ head["weight"].float()[0] + head["bias"].float()

    true_N, clean_N = rating_N[count:], predict(image_ND[count:])
    softened_N = predict(embed(soften(x[count:], generator)))
    return {
        "pearson": float(stats.pearsonr(true_N, clean_N).statistic),
        "spearman": float(stats.spearmanr(true_N, clean_N).statistic),
        "pearson_softened": float(stats.pearsonr(true_N, softened_N).statistic),
    }
