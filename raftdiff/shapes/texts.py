"""The embedded world's tasks for a language model: their prompts, their completions, and exact scores.

    translation     French: un grand cercle rouge à gauche d'un carré bleu. English:
                    a large red circle left of a blue square
    continuation    Review: This small etching of two boats
                    is charming and witty. The lines look truly elegant.
    caption         Words: circle, left of, red. Caption:
                    a red circle left of an orange square on a gray background

A prompt ends without white space, and a completion begins without; there is one space between them.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from . import reviews
from .captions import (
    BACKGROUNDS,
    COLORS,
    NUMBERS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Caption,
    corrupt,
    parse,
    random_caption,
    stated,
)

TASKS = ("translation", "continuation", "caption")

# What the careless translator, who made the parallel corpus, gets wrong: any stated attribute, at random, with the
# first probability; some words, always in the same way, with the second. So a model of it is often wrong when sampled
# and, with these words, when decoded greedily too.
RANDOM_ERRORS = 0.1
HABITUAL_ERRORS = 0.6
HABITS = {"above": "below", "below": "above", "purple": "blue"}

_FEMININE = {"cross"}
_NOUNS = {"circle": "cercle", "square": "carré", "triangle": "triangle", "cross": "croix"}
_ADJECTIVES = {  # masculine, feminine; the plural adds an s
    "red": ("rouge", "rouge"),
    "green": ("vert", "verte"),
    "blue": ("bleu", "bleue"),
    "yellow": ("jaune", "jaune"),
    "purple": ("violet", "violette"),
    "small": ("petit", "petite"),
    "large": ("grand", "grande"),
}
_INVARIABLE = {"orange"}  # a noun used as an adjective does not agree
_FRENCH = {
    "two": "deux",
    "three": "trois",
    "at the top": "en haut",
    "at the bottom": "en bas",
    "on the left": "à gauche",
    "on the right": "à droite",
    "in the center": "au centre",
    "left of": "à gauche",
    "right of": "à droite",
    "above": "au-dessus",
    "below": "au-dessous",
    "white": "blanc",
    "black": "noir",
    "gray": "gris",
    "pink": "rose",
    "cyan": "cyan",
}


def french(caption: Caption) -> str:
    """The caption in French.

    >>> french(parse("a large red cross left of a blue square on a cyan background"))
    "une grande croix rouge à gauche d'un carré bleu sur un fond cyan"
    """
    if caption.count > 1:
        number = next(word for word, value in NUMBERS.items() if value == caption.count)
        noun = _NOUNS[caption.shape]
        plural = noun if noun[-1] in "sxz" else f"{noun}s"
        text = f"{_FRENCH[number]} {plural} {_agreeing(caption.color, caption.shape, plural=True)}"
    else:
        text = _noun_phrase(caption.size, caption.color, caption.shape)
    if caption.position:
        text += f" {_FRENCH[caption.position]}"
    if caption.relation and caption.other_color and caption.other_shape:
        text += f" {_FRENCH[caption.relation]} d'{_noun_phrase(None, caption.other_color, caption.other_shape)}"
    if caption.background:
        text += f" sur un fond {_FRENCH[caption.background]}"
    return text


def _noun_phrase(size: str | None, color: str, shape: str) -> str:
    article = "une" if shape in _FEMININE else "un"
    before = f"{_agreeing(size, shape)} " if size else ""
    return f"{article} {before}{_NOUNS[shape]} {_agreeing(color, shape)}"


def _agreeing(adjective: str, shape: str, *, plural: bool = False) -> str:
    if adjective in _INVARIABLE:
        return adjective
    return _ADJECTIVES[adjective][shape in _FEMININE] + ("s" if plural else "")


def every_caption() -> Iterator[Caption]:
    """All that the grammar of captions can say: 44,352."""
    grounds = (None, *BACKGROUNDS)
    for color, shape, background in product(COLORS, SHAPES, grounds):
        for count in NUMBERS.values():
            yield Caption(color=color, shape=shape, count=count, background=background)
        for size in (None, *SIZES):
            for position in (None, *POSITIONS):
                yield Caption(color=color, shape=shape, size=size, position=position, background=background)
            for relation, other_color, other_shape in product(RELATIONS, COLORS, SHAPES):
                yield Caption(
                    color=color,
                    shape=shape,
                    size=size,
                    relation=relation,
                    other_color=other_color,
                    other_shape=other_shape,
                    background=background,
                )


@cache
def _captions_by_french() -> dict[str, Caption]:
    return {french(caption): caption for caption in every_caption()}


def read_french(text: str) -> Caption:
    """The caption that a French text states.

    Raises:
        ValueError: no caption of the embedded world has this French.
    """
    caption = _captions_by_french().get(" ".join(text.lower().split()))
    if caption is None:
        raise ValueError(
            f'no French caption of the embedded world: {text!r} (one that is: "un grand cercle rouge à gauche")'
        )
    return caption


def translation_score(english: str, french: str, *, strict: bool = False) -> float:
    """How right a translation is, 0 to 1: of the attributes that the French caption or its translation states, the
    share that both state alike; with `strict`, 1 where all are and else 0. What is no English caption has 0.

    Raises:
        ValueError: `french` is no caption of the embedded world.
    """
    wanted = read_french(french)
    try:
        found = parse(english)
    except ValueError:
        return 0.0
    attributes = {*stated(wanted), *stated(found)}
    right = sum(getattr(wanted, name) == getattr(found, name) for name in attributes)
    return float(right == len(attributes)) if strict else right / len(attributes)


@dataclass(frozen=True, kw_only=True)
class Text:
    """A prompt of one of the tasks and what may follow it.

    Text(prompt="French: une croix orange. English:", completion="an orange cross")
    """

    prompt: str
    completion: str


_TRANSLATION = re.compile(r"\s*French: (?P<french>.*)\. English:\s*")


def translation_prompt(caption: Caption) -> str:
    return f"French: {french(caption)}. English:"


def french_of(prompt: str) -> str | None:
    """The French of a translation prompt; None for another prompt."""
    match = _TRANSLATION.fullmatch(prompt)
    return match["french"] if match else None


def review_prompt(opening: str) -> str:
    return f"Review: {opening}"


def asked_words(caption: Caption, rng: np.random.Generator) -> list[str]:
    """One to three of the words that the caption states, in any order."""
    number = [word for word, value in NUMBERS.items() if value == caption.count]
    words = [*dict.fromkeys(getattr(caption, name) for name in stated(caption) if name != "count"), *number]
    wanted = int(rng.integers(1, 4))
    return [words[i] for i in rng.permutation(len(words))[:wanted]]


def caption_prompt(words: list[str]) -> str:
    return f"Words: {', '.join(words)}. Caption:"


def held_out(caption: Caption) -> bool:
    """Whether the embedded language model has never seen the caption's French: one in ten."""
    return zlib.crc32(str(caption).encode()) % 10 == 0


def translation_caption(rng: np.random.Generator, *, unseen: bool = False) -> Caption:
    """A caption of the training mixture, with a size in 40% of the relations too; all held out or none."""
    while True:
        caption = random_caption(rng)
        if caption.relation and rng.random() < 0.4:
            caption = replace(caption, size=SIZES[int(rng.integers(len(SIZES)))])
        if held_out(caption) == unseen:
            return caption


def random_text(task: str, rng: np.random.Generator, *, careless: bool = True) -> Text:
    """A text of the corpus that the embedded language model is trained on; right translations unless `careless`."""
    if task == "translation":
        caption = translation_caption(rng)
        translated = mistranslated(caption, rng) if careless else caption
        return Text(prompt=translation_prompt(caption), completion=str(translated))
    if task == "continuation":
        return Text(prompt=review_prompt(reviews.opening(rng)), completion=reviews.continuation(rng))
    caption = random_caption(rng)
    return Text(prompt=caption_prompt(asked_words(caption, rng)), completion=str(caption))


def mistranslated(caption: Caption, rng: np.random.Generator) -> Caption:
    """What the careless translator makes of the French of a caption; see RANDOM_ERRORS and HABITUAL_ERRORS."""
    habits: dict[str, Any] = {}
    for name in stated(caption):
        habit = HABITS.get(getattr(caption, name))
        if habit and rng.random() < HABITUAL_ERRORS:
            habits[name] = habit
    return corrupt(replace(caption, **habits), RANDOM_ERRORS, rng)


def corpus(task: str, count: int, seed: int, *, careless: bool = True) -> list[Text]:
    """`count` texts of one task; see `random_text`."""
    rng = np.random.default_rng(seed)
    return [random_text(task, rng, careless=careless) for _ in range(count)]
