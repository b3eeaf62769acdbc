"""What a picture of the embedded world shows, read off its pixels: the exact judge, never trained on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from .captions import BACKGROUNDS, COLORS, SHAPES, Caption
from .scenes import shape_mask

SHAPE_FIT = 0.66  # least intersection over union with the template of the shape
ASPECT = (0.7, 1.43)
SMALL, LARGE = 0.345, 0.39  # diameter, of the canvas
SIDE = 0.42  # "on the left": the centre's x below this, of the canvas
CENTER = 0.13  # "in the center": the centre at most this far from the middle along each axis
CLEAN = 0.70  # share of what is not object that the background colour covers
LEAST_AREA = 0.013  # of the canvas; the smallest object drawn, a small triangle, has .031
LEAST_SIDE = 0.16  # of the canvas; the smallest object has .25

_PALETTE_NAMES = [*COLORS, *BACKGROUNDS]
_PALETTE = np.array([*COLORS.values(), *BACKGROUNDS.values()], dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Found:
    """One connected patch of an object colour. Lengths are fractions of the canvas, y downward."""

    color: str
    shape: str | None  # None where no template fits
    fit: float  # intersection over union with the best template
    x: float
    y: float
    diameter: float
    area: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Everything the oracle sees in one picture."""

    objects: tuple[Found, ...]  # the largest first
    background: str
    clean: float  # share of what is not object that the background colour covers
    contrast: float  # distance in RGB between objects and background, 0 to 1 (black to white)


@lru_cache(maxsize=4096)
def _template(shape: str, height: int, width: int) -> np.ndarray:
    """How much of each pixel of a box the shape that fills the box covers, 0 to 1, [height, width]."""
    fine = 4
    u = (np.arange(width * fine) + 0.5) / (width * fine) * 2 - 1
    v = (np.arange(height * fine) + 0.5) / (height * fine) * 2 - 1
    mask = shape_mask(shape, *np.broadcast_arrays(u[None, :], v[:, None]))
    return mask.reshape(height, fine, width, fine).mean(axis=(1, 3))


def read(image: np.ndarray) -> Reading:
    """Read a picture, uint8 [height, width, 3], of any size."""
    height, width = image.shape[:2]
    pixels = image.astype(np.float32)
    nearest = ((pixels[:, :, None] - _PALETTE) ** 2).sum(-1).argmin(-1)
    found, covered = [], np.zeros((height, width), dtype=bool)
    for index, color in enumerate(COLORS):
        mask = nearest == index
        if mask.sum() < LEAST_AREA * height * width:
            continue
        labels, _ = ndimage.label(mask)
        # Between two colours the edge of an object can pass through a third: such a halo is a pixel wide and
        # vanishes under opening, an object does not.
        core = ndimage.binary_opening(mask, np.ones((2, 2), dtype=bool))
        for label, box in enumerate(ndimage.find_objects(labels), start=1):
            patch = labels[box] == label
            object_ = _measure(patch, box, color, height, width)
            if object_ is None or (patch & core[box]).sum() < 0.4 * patch.sum():
                continue
            found.append(object_)
            covered[box] |= patch
    background = np.bincount(nearest[~covered], minlength=len(_PALETTE))[len(COLORS) :]
    commonest = int(background.argmax())
    rest = max(int((~covered).sum()), 1)
    contrast = 0.0
    if covered.any() and not covered.all():
        behind = pixels[(nearest == commonest + len(COLORS)) & ~covered]
        behind = behind if len(behind) else pixels[~covered]
        contrast = float(np.linalg.norm(pixels[covered].mean(0) - behind.mean(0)) / np.sqrt(3 * 255**2))
    return Reading(
        objects=tuple(sorted(found, key=lambda o: -o.area)),
        background=_PALETTE_NAMES[commonest + len(COLORS)],
        clean=float(background[commonest] / rest),
        contrast=contrast,
    )


def _measure(patch, box, color, height, width) -> Found | None:
    rows, columns = patch.shape
    if patch.sum() < LEAST_AREA * height * width or max(rows / height, columns / width) < LEAST_SIDE:
        return None
    fits = {}
    for shape in SHAPES:
        template = _template(shape, rows, columns)
        fits[shape] = np.minimum(patch, template).sum() / np.maximum(patch, template).sum()
    best = max(fits, key=lambda shape: fits[shape])
    fitting = fits[best] > SHAPE_FIT and ASPECT[0] <= columns / rows <= ASPECT[1]
    return Found(
        color=color,
        shape=best if fitting else None,
        fit=float(fits[best]),
        x=(box[1].start + columns / 2) / width,
        y=(box[0].start + rows / 2) / height,
        diameter=(rows / height + columns / width) / 2,
        area=float(patch.sum() / (height * width)),
    )


def judge(image: np.ndarray, caption: Caption) -> dict[str, bool]:
    """Each thing that `caption` asks for, true or false of the picture (uint8 [height, width, 3]).

    Always `count`, `color`, `shape`, `clean`; `size`, `position`, `relation`, `background` where stated.
    """
    return judge_reading(read(image), caption)


def judge_reading(reading: Reading, caption: Caption) -> dict[str, bool]:
    objects = reading.objects
    wanted = 2 if caption.relation else caption.count
    verdict = {"count": len(objects) == wanted}
    if caption.relation:
        first = next((o for o in objects if o.color == caption.color), None)
        second = next((o for o in objects if o.color == caption.other_color), None)
        both = first is not None and second is not None
        verdict["color"] = both
        shapes = (first and first.shape, second and second.shape)
        verdict["shape"] = both and shapes == (caption.shape, caption.other_shape)
        verdict["relation"] = first is not None and second is not None and _related(first, second, caption.relation)
    else:
        main = objects[:wanted]
        verdict["color"] = bool(main) and all(o.color == caption.color for o in main)
        verdict["shape"] = bool(main) and all(o.shape == caption.shape for o in main)
    if caption.size:
        diameter = objects[0].diameter if objects else None
        verdict["size"] = diameter is not None and (diameter < SMALL if caption.size == "small" else diameter > LARGE)
    if caption.position:
        verdict["position"] = bool(objects) and _positioned(objects[0], caption.position)
    if caption.background:
        verdict["background"] = reading.background == caption.background
    verdict["clean"] = reading.clean > CLEAN
    return verdict


def _related(a: Found, b: Found, relation: str) -> bool:
    dx, dy = b.x - a.x, b.y - a.y
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along > abs(across)


def _positioned(o: Found, position: str) -> bool:
    return {
        "at the top": o.y < SIDE,
        "at the bottom": o.y > 1 - SIDE,
        "on the left": o.x < SIDE,
        "on the right": o.x > 1 - SIDE,
        "in the center": max(abs(o.x - 0.5), abs(o.y - 0.5)) < CENTER,
    }[position]


def strict(image: np.ndarray, caption: Caption) -> bool:
    """Whether everything that the caption asks for is true of the picture."""
    return all(judge(image, caption).values())


def partial(image: np.ndarray, caption: Caption) -> float:
    """The share, 0 to 1, of what the caption asks for that is true of the picture."""
    verdict = judge(image, caption)
    return sum(verdict.values()) / len(verdict)


def rating(image: np.ndarray) -> float:
    """The world's true aesthetic rating, 1 to 10, from pixels: up to 3 points each for contrast of object and
    background, coverage up to 20% of the canvas, and closeness of the objects' common centre to the middle.
    A picture without an object has 1."""
    reading = read(image)
    area = sum(o.area for o in reading.objects)
    if not area:
        return 1.0
    x = sum(o.x * o.area for o in reading.objects) / area
    y = sum(o.y * o.area for o in reading.objects) / area
    contrast = min(reading.contrast / 0.6, 1.0)
    coverage = min(area / 0.20, 1.0)
    closeness = max(0.0, 1.0 - float(np.hypot(x - 0.5, y - 0.5)) / 0.3)
    return 1.0 + 3.0 * (contrast + coverage + closeness)
