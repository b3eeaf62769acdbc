"""The captions of the embedded world: their grammar, a parser, and random ones.

a|an [small|large] COLOR SHAPE [POSITION] [on a BACKGROUND background]
two|three COLOR SHAPEs                    [on a BACKGROUND background]
a|an COLOR SHAPE RELATION a|an COLOR SHAPE [on a BACKGROUND background]
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 70),
    "blue": (50, 80, 220),
    "yellow": (245, 215, 50),
    "purple": (150, 60, 190),
    "orange": (245, 135, 30),
}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "black": (25, 25, 30),
    "gray": (130, 130, 135),
    "pink": (250, 190, 205),
    "cyan": (170, 220, 240),
}
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
SHAPES = tuple(PLURALS)
SIZES = ("small", "large")
POSITIONS = ("at the top", "at the bottom", "on the left", "on the right", "in the center")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {"two": 2, "three": 3}

_COLOR, _SHAPE = "|".join(COLORS), "|".join(SHAPES)
_GRAMMAR = re.compile(
    rf"(?:(?P<number>two|three) (?P<colors>{_COLOR}) (?P<plural>{'|'.join(PLURALS.values())})"
    rf"|an? (?:(?P<size>{'|'.join(SIZES)}) )?(?P<color>{_COLOR}) (?P<shape>{_SHAPE})"
    rf"(?: (?P<position>{'|'.join(POSITIONS)})"
    rf"| (?P<relation>{'|'.join(RELATIONS)}) an? (?P<other_color>{_COLOR}) (?P<other_shape>{_SHAPE}))?)"
    rf"(?: on an? (?P<background>{'|'.join(BACKGROUNDS)}) background)?"
)
_SINGULAR = {plural: shape for shape, plural in PLURALS.items()}


@dataclass(frozen=True, kw_only=True)
class Caption:
    """What a caption asks for; `None` is what it leaves open. `str(caption)` is the caption itself.

    >>> str(Caption(color="red", shape="cross", size="large", background="cyan"))
    'a large red cross on a cyan background'
    """

    color: str
    shape: str
    count: int = 1
    size: str | None = None
    position: str | None = None
    relation: str | None = None
    other_color: str | None = None
    other_shape: str | None = None
    background: str | None = None

    @property
    def kind(self) -> str:
        """`single`, `count` or `relation`."""
        if self.relation:
            return "relation"
        return "single" if self.count == 1 else "count"

    def __str__(self) -> str:
        if self.count > 1:
            number = next(word for word, value in NUMBERS.items() if value == self.count)
            text = f"{number} {self.color} {PLURALS[self.shape]}"
        else:
            text = _with_article(" ".join(filter(None, (self.size, self.color, self.shape))))
        if self.position:
            text += f" {self.position}"
        if self.relation:
            text += f" {self.relation} {_with_article(f'{self.other_color} {self.other_shape}')}"
        if self.background:
            text += f" on {_with_article(f'{self.background} background')}"
        return text


def _with_article(noun_phrase: str) -> str:
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"


def parse(text: str) -> Caption:
    """The caption that `text` states.

    Raises:
        ValueError: `text` is not in the grammar of the embedded world.
    """
    match = _GRAMMAR.fullmatch(" ".join(text.lower().split()))
    if match is None:
        raise ValueError(
            f"not a caption of the embedded world: {text!r} (one that is: 'a large red circle on the left')"
        )
    found = match.groupdict()
    if found["number"]:
        return Caption(
            color=found["colors"],
            shape=_SINGULAR[found["plural"]],
            count=NUMBERS[found["number"]],
            background=found["background"],
        )
    names = ("color", "shape", "size", "position", "relation", "other_color", "other_shape", "background")
    attributes: dict[str, Any] = {name: found[name] for name in names}
    return Caption(**attributes)


def random_caption(rng: np.random.Generator, kind: str | None = None) -> Caption:
    """A caption drawn from the training mixture: single .5, count .2, relation .3 (or all of one `kind`);
    a size in 40% of the singles, a position in 30%, a background in 40% of all."""
    kind = kind or rng.choice(["single", "count", "relation"], p=[0.5, 0.2, 0.3])
    color, shape = _pick(rng, COLORS), _pick(rng, SHAPES)
    background = _pick(rng, BACKGROUNDS) if rng.random() < 0.4 else None
    if kind == "count":
        return Caption(color=color, shape=shape, count=int(rng.integers(2, 4)), background=background)
    if kind == "relation":
        other_color = _pick(rng, [name for name in COLORS if name != color])
        return Caption(
            color=color,
            shape=shape,
            relation=_pick(rng, RELATIONS),
            other_color=other_color,
            other_shape=_pick(rng, SHAPES),
            background=background,
        )
    return Caption(
        color=color,
        shape=shape,
        size=_pick(rng, SIZES) if rng.random() < 0.4 else None,
        position=_pick(rng, POSITIONS) if rng.random() < 0.3 else None,
        background=background,
    )


def _pick(rng: np.random.Generator, names) -> str:
    names = list(names)
    return names[int(rng.integers(len(names)))]


# What each attribute of a caption may say instead; the count and the relation have values of their own.
ALTERNATIVES: dict[str, tuple] = {
    "color": tuple(COLORS),
    "other_color": tuple(COLORS),
    "shape": SHAPES,
    "other_shape": SHAPES,
    "size": SIZES,
    "position": POSITIONS,
    "relation": RELATIONS,
    "background": tuple(BACKGROUNDS),
}


def stated(caption: Caption) -> list[str]:
    """The attributes that the caption states and that another word can replace."""
    return [name for name in ALTERNATIVES if getattr(caption, name) is not None] + ["count"] * (caption.count > 1)


def vary(caption: Caption, attribute: str, rng: np.random.Generator) -> Caption:
    """The caption with one stated attribute changed to another value: a hard negative. Two objects keep two colors."""
    if attribute == "count":
        return replace(caption, count=5 - caption.count)
    taken = {getattr(caption, attribute)}
    if attribute in ("color", "other_color"):
        taken |= {caption.color, caption.other_color}
    change: dict[str, Any] = {attribute: _pick(rng, [v for v in ALTERNATIVES[attribute] if v not in taken])}
    return replace(caption, **change)


def corrupt(caption: Caption, probability: float, rng: np.random.Generator) -> Caption:
    """The caption as a careless annotator writes it: each stated attribute is, with `probability`, drawn anew
    from the other values. The base model's training captions are made so (see docs/embedded-model.md)."""
    for attribute in stated(caption):
        if rng.random() < probability:
            caption = vary(caption, attribute, rng)
    return caption


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    phrases = [*COLORS, *BACKGROUNDS, *SHAPES, *PLURALS.values(), *SIZES, *POSITIONS, *RELATIONS, *NUMBERS]
    return sorted({word for phrase in [*phrases, "a", "an", "on", "background"] for word in phrase.split()})
