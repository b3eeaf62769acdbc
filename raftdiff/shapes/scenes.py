"""Scenes: objects laid out so that a caption is true of them, and their rendering."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .captions import BACKGROUNDS, COLORS, Caption

CANVAS = 64.0  # world units, y downward
CROSS_ARM = 0.36  # half-width of a cross's arms, of its half-width
SUPERSAMPLING = 4
JITTER = 8  # of each colour channel, in 1/255

_EDGE, _GAP = 2.0, 3.0  # least distance to the canvas edge, and between bounding boxes
_RADII = {"small": (8.0, 10.0), None: (10.0, 13.5), "large": (13.5, 19.0)}


@dataclass(frozen=True, kw_only=True)
class Object:
    """One object: the half-width `radius` of its bounding box and its centre, in world units."""

    shape: str
    rgb: tuple[int, int, int]
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    objects: tuple[Object, ...]
    background_rgb: tuple[int, int, int]


def random_scene(caption: Caption, rng: np.random.Generator) -> Scene:
    """A scene of which `caption` is true; what it leaves open is drawn at random."""
    background = caption.background or list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
    layout = {"single": _single, "count": _several, "relation": _pair}[caption.kind](caption, rng)
    colors = [caption.color, caption.other_color] if caption.relation else [caption.color] * caption.count
    shapes = [caption.shape, caption.other_shape] if caption.relation else [caption.shape] * caption.count
    objects = tuple(
        Object(shape=str(shape), rgb=_jitter(COLORS[str(color)], rng), x=x, y=y, radius=r)
        for (x, y, r), color, shape in zip(layout, colors, shapes, strict=True)
    )
    return Scene(objects=objects, background_rgb=_jitter(BACKGROUNDS[background], rng))


def _jitter(rgb, rng):
    red, green, blue = (int(np.clip(c + rng.integers(-JITTER, JITTER + 1), 0, 255)) for c in rgb)
    return red, green, blue


def _uniform_place(r, rng):
    return rng.uniform(r + _EDGE, CANVAS - r - _EDGE, size=2)


def _single(caption, rng):
    size = caption.size or ("small", None, "large")[int(rng.integers(3))]
    r = rng.uniform(*_RADII[size])
    x, y = _uniform_place(r, rng)
    near, far = r + _EDGE, 0.38 * CANVAS  # "at the top": the centre well above the middle band
    aside = rng.uniform(near, max(near, far))
    if caption.position == "at the top":
        y = aside
    elif caption.position == "at the bottom":
        y = CANVAS - aside
    elif caption.position == "on the left":
        x = aside
    elif caption.position == "on the right":
        x = CANVAS - aside
    elif caption.position == "in the center":
        x, y = CANVAS / 2 + rng.uniform(-6, 6, size=2)
    return [(x, y, r)]


def _several(caption, rng):
    largest = 12.0 if caption.count == 2 else 10.0
    return _rejection(lambda: [_placed(rng.uniform(8.0, largest), rng) for _ in range(caption.count)])


def _pair(caption, rng):
    def related(layout):
        (ax, ay, _), (bx, by, _) = layout
        along, across = {
            "left of": (bx - ax, by - ay),
            "right of": (ax - bx, by - ay),
            "above": (by - ay, bx - ax),
            "below": (ay - by, bx - ax),
        }[caption.relation]
        return along > 16 and abs(across) < 0.7 * along

    return _rejection(lambda: [_placed(rng.uniform(8.0, 13.0), rng) for _ in range(2)], related)


def _placed(r, rng):
    x, y = _uniform_place(r, rng)
    return x, y, r


def _rejection(propose, accept=lambda layout: True):
    for _ in range(10_000):
        layout = propose()
        apart = all(
            max(abs(ax - bx), abs(ay - by)) >= ar + br + _GAP
            for i, (ax, ay, ar) in enumerate(layout)
            for bx, by, br in layout[:i]
        )
        if apart and accept(layout):
            return layout
    raise AssertionError("no layout found in 10,000 proposals")


def shape_mask(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether each point is inside the shape whose bounding box is [-1, 1] x [-1, 1], `v` downward."""
    if shape == "circle":
        return u**2 + v**2 <= 1
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) <= 1
    if shape == "triangle":  # apex up, base at the bottom
        return (np.abs(u) <= (v + 1) / 2) & (v <= 1)
    if shape == "cross":
        near, far = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
        return (near <= CROSS_ARM) & (far <= 1)
    raise ValueError(f"unknown shape {shape!r}")


@lru_cache(maxsize=8)
def _grid(size: int) -> np.ndarray:
    return (np.arange(size * SUPERSAMPLING) + 0.5) * (CANVAS / (size * SUPERSAMPLING))


def render(scene: Scene, size: int = 32) -> np.ndarray:
    """The scene as uint8 [size, size, 3], by 4x supersampling and box down-scaling."""
    at = _grid(size)
    canvas = np.empty((len(at), len(at), 3), dtype=np.uint8)
    canvas[:] = scene.background_rgb
    for o in scene.objects:
        x0, x1 = np.searchsorted(at, (o.x - o.radius, o.x + o.radius))
        y0, y1 = np.searchsorted(at, (o.y - o.radius, o.y + o.radius))
        u, v = (at[None, x0:x1] - o.x) / o.radius, (at[y0:y1, None] - o.y) / o.radius
        canvas[y0:y1, x0:x1][shape_mask(o.shape, *np.broadcast_arrays(u, v))] = o.rgb
    cells = canvas.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3)
    return cells.mean(axis=(1, 3), dtype=np.float32).round().astype(np.uint8)
