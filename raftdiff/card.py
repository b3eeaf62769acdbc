"""The model card of a LoRA: what it was trained on and what not, what that did, and how to load it.

The same run writes the same bytes: no dates, no seconds, no paths of this machine beyond those in the settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCardData

from . import __version__
from .config import RunConfig
from .evaluation import Verdict
from .protocols import Modality
from .report import TEMPLATES, against_base, by_guidance, image_grid, side_by_side
from .types import RoundReport, Sample

CARD = "README.md"
PICTURE = "before-after.webp"
HERE = "folder-or-repository"  # stands in the card for the place that it will lie at
PAIRS = 8  # prompts in the picture
LEAST_SIDE, LARGEST_SIDE = 128, 2048  # pixels: of one small picture, of all together
LONGEST_TEXT = 400  # characters of a prompt or completion
TASKS = {"image": ("diffusers", "text-to-image"), "text": ("peft", "text-generation")}
SECRET = re.compile(r"key|token|secret|password", re.IGNORECASE)


def provenance(config: RunConfig) -> dict[str, str]:
    """What the header of an exported file says of its run; `rewards` (name to weight) and `config` are JSON."""
    return {
        "version": __version__,
        "base_model": config.model.path,
        "base_revision": config.model.revision or "",
        "algorithm": config.algorithm.name,
        "rewards": json.dumps({reward.reported_name: reward.weight for reward in config.rewards}),
        "config": json.dumps(public_settings(config), sort_keys=True),
    }


def public_settings(config: RunConfig) -> dict[str, Any]:
    """The settings as they may be shown to others: without the run's own place, and without values that look secret."""
    return _without_secrets(config.model_dump(mode="json", exclude={"name", "output"}))


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: "(removed)" if isinstance(item, str) and SECRET.search(key) else _without_secrets(item)
            for key, item in value.items()
        }
    return [_without_secrets(item) for item in value] if isinstance(value, list) else value


def write_card(
    folder: Path,
    *,
    config: RunConfig,
    modality: Modality,
    reports: Sequence[RoundReport],
    verdict: Verdict,
    before: Sequence[Sample],
    after: Sequence[Sample],
    load_line: str,
) -> None:
    """Write README.md and, for pictures, before-after.webp into the folder of a LoRA.

    Args:
        reports: of all rounds; the first is the base model's.
        verdict: on the evaluated rounds.
        before, after: samples of the base and of the exported model on the held-out prompts.
        load_line: the code that loads the LoRA, with `HERE` for its place.
    """
    trained, judges = config.trained_rewards, (*config.rewards, *config.evaluation.rewards)
    aligned_round, rows = against_base(reports, verdict, trained)
    both = side_by_side(before, after, PAIRS)
    pairs = [pair for pair in both if pair[0].image is not None]
    if pairs:
        _write_picture(folder / PICTURE, pairs)
    library, task = TASKS[modality]
    base = config.model.path
    on_hub = bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base)) and not Path(base).exists()
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name=library,
        pipeline_tag=task,
        tags=["lora" if config.adapter.method == "lora" else "full-fine-tuning", task, "raftdiff"],
    )
    settings = yaml.safe_dump(public_settings(config), sort_keys=False, allow_unicode=True)
    text = _template().render(
        front_matter=data.to_yaml(),
        config=config,
        on_hub=on_hub,
        round=aligned_round,
        trained=[(reward.reported_name, reward.weight) for reward in config.rewards if reward.weight],
        watched=[reward.reported_name for reward in judges if reward.reported_name not in trained],
        verdict=verdict,
        tables=by_guidance(rows),
        picture=PICTURE,
        prompts=[one.prompt.text for one, _ in pairs],
        texts=[
            [shorten(text, LONGEST_TEXT) for text in (one.prompt.text, one.text, other.text)]
            for one, other in both
            if one.text is not None and other.text is not None
        ],
        load_line=load_line,
        settings=settings,
        fence=_fence(settings),
        version=__version__,
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def _write_picture(path: Path, pairs: Sequence[tuple[Sample, Sample]]) -> None:
    """The base's pictures above, the aligned ones of the same prompts and seeds below."""
    images = [sample.image for row in zip(*pairs, strict=True) for sample in row if sample.image is not None]
    grid = image_grid(images, len(pairs), scale=max(1, LEAST_SIDE // images[0].shape[-1]))
    grid.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    grid.save(path, "webp", quality=90)


def plain(text: str) -> str:
    """A text from anywhere as Markdown that shows it as it is, on one line."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(text.split()))


def _fence(text: str) -> str:
    """Backticks that enclose a text which may hold backticks itself."""
    return "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = plain
    return environment.get_template("card.md.jinja")
