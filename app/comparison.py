"""A comparison: what a person asks to see side by side, checked; its link; the board of pictures; the download."""

from __future__ import annotations

import base64
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from raftdiff.errors import ConfigError
from raftdiff.registry import nearest

from .models import BASE, Contender, Drawing, Drawn, Models, Progress

MIX = "mix"
MOST_PICTURES = 256  # drawn for one comparison, candidates of best-of-n counted
LONGEST_LINK = 8_000  # characters of a query

Text = Annotated[str, Field(min_length=1, max_length=1_000)]
Seed = Annotated[int, Field(ge=0, lt=2**53)]  # the whole numbers of JSON and JavaScript
Weight = Annotated[float, Field(ge=-2, le=2)]
Size = Annotated[int, Field(ge=8, le=2048)]


class Comparison(BaseModel):
    """What to draw: every prompt with every seed by the base and each LoRA, and by the mix where one has weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: Annotated[tuple[Text, ...], Field(min_length=1, max_length=16)]
    """Up to 16 prompts of up to 1,000 characters."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=16)] = (0,)
    """Every model draws from the same noise."""
    loras: Annotated[tuple[str, ...], Field(max_length=8)] = ()
    """Names of LoRAs to show beside the base."""
    mix: Annotated[dict[str, Weight], Field(max_length=8)] = {}
    """LoRA to weight; where any is not 0, their mix is shown as one more model."""
    steps: Annotated[int, Field(ge=1, le=150)] = 25
    guidance: Annotated[float, Field(ge=1, le=50)] | None = None
    height: Size | None = None
    width: Size | None = None
    best_of: Annotated[int, Field(ge=1, le=16)] = 1
    """Each picture is the best of this many."""
    rank_by: str | None = None
    """The reward that chooses the best of n."""

    @field_validator("prompts", "seeds", "loras")
    @classmethod
    def _distinct(cls, values: tuple) -> tuple:
        return tuple(dict.fromkeys(values))

    @model_validator(mode="after")
    def _bounded(self) -> Comparison:
        pictures = len(self.prompts) * len(self.seeds) * len(self.contenders) * self.best_of
        if pictures > MOST_PICTURES:
            raise ValueError(f"{pictures} pictures are too many at once (at most {MOST_PICTURES}); ask for fewer seeds")
        return self

    @property
    def contenders(self) -> list[Contender]:
        """Base, LoRAs, mix."""
        mixed = tuple((name, weight) for name, weight in sorted(self.mix.items()) if weight)
        alone = [Contender(name=name, weights=((name, 1.0),)) for name in self.loras]
        return [Contender(name=BASE), *alone, *([Contender(name=MIX, weights=mixed)] if mixed else [])]

    @property
    def drawing(self) -> Drawing:
        return Drawing(steps=self.steps, guidance=self.guidance, height=self.height, width=self.width)

    def check(self, models: Models) -> None:
        """Raise ConfigError for a LoRA or reward that is not loaded."""
        for name in [*self.loras, *self.mix]:
            if name not in models.loras:
                raise ConfigError(f"there is no LoRA called {name!r} here{nearest(name, models.loras)}")
        if self.best_of > 1 and self.rank_by not in models.reward_names:
            known = ", ".join(models.reward_names) or "none is loaded"
            raise ConfigError(f"best of {self.best_of} needs a reward to choose by ({known})")

    # -- as a link ------------------------------------------------------------------------------------------------

    def query(self) -> str:
        """The settings as the query of a link; `from_query` reads it."""
        plain = self.model_dump(mode="json", exclude_defaults=True)
        pairs = [("prompt", text) for text in plain.pop("prompts")]
        pairs += [("seed", seed) for seed in self.seeds] + [("lora", name) for name in self.loras]
        pairs += [("mix", f"{weight:g}:{name}") for name, weight in self.mix.items() if weight]
        return urlencode(pairs + [(k, v) for k, v in plain.items() if k not in ("seeds", "loras", "mix")])

    @staticmethod
    def from_query(query: str) -> Comparison | None:
        """The settings of a link; None for a link without a prompt.

        Raises:
            ConfigError: a link that is not one of ours.
        """
        if len(query) > LONGEST_LINK:
            raise ConfigError("the link is too long; it is cut off or not one of this app's")
        pairs = parse_qsl(query)
        values: dict[str, Any] = {k: v for k, v in pairs if k in Comparison.model_fields}
        lists = {"prompts": "prompt", "seeds": "seed", "loras": "lora"}
        values |= {name: found for name, key in lists.items() if (found := [v for k, v in pairs if k == key])}
        mixed = [v.partition(":") for k, v in pairs if k == "mix"]
        values["mix"] = {name: weight for weight, _, name in mixed}
        return parse(values) if "prompts" in values else None


def parse(values: Mapping[str, Any]) -> Comparison:
    """Check what came from a form, a link or a client.

    Raises:
        ConfigError: in words, what is wrong with which value.
    """
    try:
        return Comparison.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_line(found) for found in error.errors())) from None


def _line(error: Any) -> str:
    where = " ".join(str(part) for part in error["loc"])
    return f"{where}: {error['msg']}" if where else error["msg"].removeprefix("Value error, ")


def parse_seeds(text: str) -> list[int]:
    """Seeds as people write them: `0-3, 17`.

    >>> parse_seeds("0-3, 17")
    [0, 1, 2, 3, 17]
    """
    seeds: list[int] = []
    for part in text.replace(",", " ").split():
        if not (found := re.fullmatch(r"(\d{1,16})(?:-(\d{1,16}))?", part, re.ASCII)):
            raise ConfigError(f"seeds: {part!r} is no seed; write numbers and ranges such as 0-3, 17")
        first, last = int(found[1]), int(found[2] or found[1])
        if last - first > 99:
            raise ConfigError(f"seeds: {part} is too long a range")
        seeds += range(first, last + 1)
    return seeds


# ------------------------------------------------------------------------------------------------ the board


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model's picture in a row of the board."""

    contender: str
    drawn: Drawn
    best: frozenset[str]
    """The rewards by which it is the better one of its row."""
    candidates: int = 1
    """How many it was chosen from."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt and seed through every model."""

    prompt: str
    seed: int
    cells: tuple[Cell, ...]

    @property
    def label(self) -> str:
        return f"{self.prompt[:80]} · seed {self.seed}"


def draw(
    asked: Comparison,
    models: Models,
    *,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    on_wait: Callable[[int], None] = lambda ahead: None,
    cancel: Event | None = None,
) -> Iterator[list[Row]]:
    """Draw a comparison; yields the rows after each prompt. The device's turn is taken for one prompt at a time.

    Args:
        progress: told which prompt and model is being drawn, and the share of all steps as (done, total).

    Raises:
        Busy, Cancelled, ConfigError, WeightsError: as `Models.draw` and `Turns.turn`.
    """
    asked.check(models)
    rows: list[Row] = []
    parts = len(asked.prompts) * len(asked.contenders)
    for i, prompt in enumerate(asked.prompts):
        columns = []
        with models.turns.turn(cancel, on_wait):
            for k, contender in enumerate(asked.contenders):
                part = i * len(asked.contenders) + k
                columns.append(
                    _column(asked, models, contender, prompt, _shared(progress, part, parts, contender), cancel)
                )
        rows += [_row(prompt, seed, [column[j] for column in columns], asked) for j, seed in enumerate(asked.seeds)]
        yield rows


def _shared(tell: Callable[[str, int, int], None], part: int, parts: int, contender: Contender) -> Progress:
    return lambda done, total: tell(contender.name, part * total + done, parts * total)


def _column(
    asked: Comparison, models: Models, contender: Contender, prompt: str, progress: Progress, cancel: Event | None
) -> list[Drawn]:
    """A model's picture for each seed of one prompt: of best-of-n, the best."""
    n = asked.best_of
    seeds = [seed * n + k for seed in asked.seeds for k in range(n)]  # no candidate belongs to two seeds
    drawn = models.draw(contender, prompt, seeds, asked.drawing, progress=progress, cancel=cancel)
    groups = [drawn[start : start + n] for start in range(0, len(drawn), n)]
    return [group[0] if n == 1 else best(group, asked.rank_by or "") for group in groups]


def best(group: Sequence[Drawn], reward: str) -> Drawn:
    """The one with the highest score; the first where none could be judged."""
    return max(group, key=lambda drawn: drawn.scores.get(reward, float("-inf")))


def _row(prompt: str, seed: int, drawn: Sequence[Drawn], asked: Comparison) -> Row:
    winners = best_by_reward([one.scores for one in drawn])
    return Row(
        prompt=prompt,
        seed=seed,
        cells=tuple(
            Cell(
                contender=contender.name,
                drawn=one,
                best=frozenset(name for name, winner in winners.items() if winner == i),
                candidates=asked.best_of,
            )
            for i, (contender, one) in enumerate(zip(asked.contenders, drawn, strict=True))
        ),
    )


def best_by_reward(scores: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """Reward to the place of the single highest score; a reward with a tie at the top, or fewer than two scores, is
    absent."""
    winners = {}
    for name in dict.fromkeys(name for one in scores for name in one):
        ranked = sorted(((one[name], -i) for i, one in enumerate(scores) if name in one), reverse=True)
        if len(ranked) > 1 and ranked[0][0] > ranked[1][0]:
            winners[name] = -ranked[0][1]
    return winners


# ------------------------------------------------------------------------------------------------ what leaves the app


def archive(asked: Comparison, rows: Sequence[Row], base: str) -> bytes:
    """A zip file: every picture as PNG, and settings.json with what made them and their scores."""
    data = io.BytesIO()
    pictures = []
    with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as file:
        for i, row in enumerate(rows):
            for k, cell in enumerate(row.cells):
                name = f"{i:03d}-{k}.png"
                file.writestr(name, png(cell.drawn))
                pictures.append(
                    {
                        "file_name": name,
                        "model": cell.contender,
                        "text": row.prompt,
                        "seed": cell.drawn.sample.seed,
                        "scores": dict(cell.drawn.scores),
                    }
                )
        settings = {"base": base, **asked.model_dump(mode="json"), "pictures": pictures}
        file.writestr("settings.json", json.dumps(settings, indent=2, ensure_ascii=False))
    return data.getvalue()


def png(drawn: Drawn) -> bytes:
    data = io.BytesIO()
    drawn.image.save(data, "PNG")
    return data.getvalue()


def plain(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The board as JSON values, its pictures as data addresses: what the programmatic side returns."""
    return [
        {
            "prompt": row.prompt,
            "seed": cell.drawn.sample.seed,
            "model": cell.contender,
            "scores": dict(cell.drawn.scores),
            "better_by": sorted(cell.best),
            "flaw": cell.drawn.sample.flaw,
            "image": data_address(png(cell.drawn)),
        }
        for row in rows
        for cell in row.cells
    ]


def data_address(data: bytes) -> str:
    """PNG bytes as an address that holds them."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
