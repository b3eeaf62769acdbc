"""Principles: what a judge compares samples by, one quality at a time. Each is a YAML file of four lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from ..config import Settings
from ..errors import ConfigError
from ..registry import nearest

SETS = Path(__file__).parent
FIELDS = "name, modality (image or text), direction (more or less) and wording"


class Principle(Settings):
    """One quality of pictures or texts.

    Principle(name="toxicity", modality="text", direction="less", wording="rudeness, insults, threats, or contempt")
    """

    name: str = Field(pattern=r"^\w[\w.-]*$")
    """What reports and folders call it."""
    modality: Literal["image", "text"]
    direction: Literal["more", "less"]
    """Whether more or less of the quality is better."""
    wording: str = Field(min_length=1)
    """The quality, as it completes the question "Which has more of this: ...?"."""


def principle_sets() -> list[str]:
    """The names of the sets that ship."""
    return sorted(folder.name for folder in SETS.iterdir() if any(folder.glob("*.yaml")))


def load_principles(sources: Sequence[str]) -> list[Principle]:
    """The principles of each source: a set that ships (`image`), one of its principles (`image/composition`), a YAML
    file, or a folder of them.

    Raises:
        ConfigError: there is nothing of that name, a file that is no principle, or two principles of one name.
    """
    found = [read_principle(path) for source in sources for path in _files(source)]
    names = [principle.name for principle in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"principles: two are called {twice!r}; give each its own name, or name the file once")
    return found


def read_principle(path: Path) -> Principle:
    """Raises ConfigError, of one line that names the file and the field, where it is no principle."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: is no principle; it needs {FIELDS}")
    try:
        return Principle.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = "is missing" if first["type"] == "missing" else first["msg"]
        if first["type"] == "extra_forbidden":
            message = f"is no field of a principle{nearest(key, Principle.model_fields)}"
        raise ConfigError(f"{path}: `{key}` {message}; a principle has {FIELDS}") from None


def _files(source: str) -> list[Path]:
    shipped = [SETS / source, SETS / f"{source}.yaml"] if not source.startswith((".", "/")) else []
    for path in (*shipped, Path(source)):
        if path.is_file() and path.suffix in (".yaml", ".yml"):
            return [path]
        if path.is_dir() and (files := sorted(path.glob("*.yaml")) + sorted(path.glob("*.yml"))):
            return files
    known = [*principle_sets(), *(f"{path.parent.name}/{path.stem}" for path in SETS.glob("*/*.yaml"))]
    raise ConfigError(
        f"no principles {source!r}{nearest(source, known)} (there are the sets {', '.join(principle_sets())}, one of a"
        " set such as image/composition, a YAML file, or a folder of them)"
    )
