"""Writes docs/configuration.md from raftdiff/config.py: each setting with its type, default and docstring.

    .venv/bin/python docs/make_configuration.py

`make docs-check` fails while the page is not what this writes.
"""

from __future__ import annotations

import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic_core import PydanticUndefined

from raftdiff.config import FREE, IDENTITY, RunConfig, Settings

PAGE = Path(__file__).with_name("configuration.md")

HEAD = """\
<!-- Written by docs/make_configuration.py from raftdiff/config.py. Change the text there, then run it. -->

# Configuration

A run is a YAML file. Every key has a default, so a file holds only what differs. Unknown keys are refused, with the
nearest known name.

```bash
raftdiff show-config --preset demo > run.yaml
raftdiff train run.yaml
raftdiff train run.yaml --name=other --rounds=8 --training.learning-rate=5e-5
```

- `show-config` prints a configuration with every default filled in.
- An option of `train` and `show-config` is a key with `-` for `_`, and `=` before its value. It replaces what the
  file or the preset says.
- Sections of the file (`rewards` is a list) are below. `raftdiff train --help` shows the same text.
- From Python a section is a keyword of `raftdiff.align`: `training={{"learning_rate": 5e-5}}`. Prompts are arguments of
  its own: `prompts`, `prompts_per_round`, `held_out`.
- The run folder keeps the whole configuration in `config.yaml`.
{identity}

```yaml
# run.yaml
name: first
rounds: 3
prompts: {{source: "shapes:single/256/1", per_round: 64}}
rewards:
  - {{name: clip, weight: 1.0, options: {{model: shapes}}}}
  - {{name: shapes-rating, weight: 0.5}}
sampling: {{num_inference_steps: 12, guidance_scale: 1.0}}
training: {{steps: 60, learning_rate: 1.0e-3}}
evaluation:
  prompts: shapes:single/64/2
  rewards: [{{name: shapes-oracle}}]
```
"""


def page() -> str:
    """The whole page."""
    identity = textwrap.fill(
        f"- A resumed run must have the same {', '.join(f'`{key}`' for key in IDENTITY[:-1])} and `{IDENTITY[-1]}` "
        f"(but {', '.join(f'`{key}`' for key in FREE[:-1])} and `{FREE[-1]}` may change). Other settings may change "
        "too, and the run says which did.",
        width=118,
        subsequent_indent="  ",
        break_on_hyphens=False,
        break_long_words=False,
    )
    parts = [HEAD.format(identity=identity).rstrip(), *_section("Run", RunConfig)]
    for name, field in RunConfig.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            parts += _section(f"`{name}`", section, field.description)
            for inner, within in _inner(section):
                parts += _section(f"`{inner}`", within, f"Of `{name}`.")
    return "\n".join(parts) + "\n"


def section_of(annotation: Any) -> type[Settings] | None:
    """The class of settings that a type names, alone, in a list or beside None."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_of(part))), None)


def _section(title: str, model: type[Settings], description: str | None = None) -> list[str]:
    lines = ["", f"## {title}", ""]
    if description:
        lines += [" ".join(description.split()), ""]
    lines += ["| Key | Type | Default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if section_of(field.annotation) is None:
            kind = _kind(field.annotation, field.metadata)
        else:
            kind = f"{'list of sections' if get_origin(field.annotation) is list else 'section'}, [below](#{name})"
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {kind} | {_default(field)} | {meaning} |")
    return lines


def _inner(model: type[Settings]) -> Iterator[tuple[str, type[Settings]]]:
    """The sections within a section, but for those that have a place of their own."""
    outer = {section_of(field.annotation) for field in RunConfig.model_fields.values()}
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is not None and section not in outer:
            yield name, section


def _kind(annotation: Any, bounds: list[Any]) -> str:
    """A type in words."""
    if get_origin(annotation) is Literal:
        return _either([f"`{value}`" for value in get_args(annotation)])
    if get_origin(annotation) in (Union, types.UnionType):
        choices = [part for part in get_args(annotation) if get_origin(part) is Literal]
        others = [part for part in get_args(annotation) if get_origin(part) is not Literal]
        named = [f"`{value}`" for choice in choices for value in get_args(choice)]
        return _either(named + [_kind(part, bounds) for part in others])
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _kind(get_args(annotation)[0], [*bounds, *_flat(annotation.__metadata__)])
    if get_origin(annotation) is list:
        return f"list of {_kind(get_args(annotation)[0], [])}"
    if get_origin(annotation) is tuple:
        return " and ".join(_kind(part, []) for part in get_args(annotation))
    if get_origin(annotation) is dict:
        return "mapping"
    words = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`", type(None): "`null`"}
    return words[annotation] + (_bounds(_flat(bounds)) if annotation in (int, float) else "")


def _flat(bounds: Any) -> list[Any]:
    return [part for bound in bounds for part in (getattr(bound, "metadata", None) or [bound])]


def _bounds(bounds: list[Any]) -> str:
    low = next((b.ge for b in bounds if isinstance(b, annotated_types.Ge)), None)
    above = next((b.gt for b in bounds if isinstance(b, annotated_types.Gt)), None)
    high = next((b.le for b in bounds if isinstance(b, annotated_types.Le)), None)
    below = next((b.lt for b in bounds if isinstance(b, annotated_types.Lt)), None)
    if low is not None and high is not None:
        return f", {low} to {high}"
    if low is not None and below is not None:
        return f", {low} to below {below}"
    return f", at least {low}" if low is not None else f", above {above}" if above is not None else ""


def _either(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


def _default(field: Any) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "needed"
    if isinstance(value, Settings):
        return "its defaults"
    if isinstance(value, list):
        value = [item.model_dump(exclude_defaults=True) if isinstance(item, Settings) else item for item in value]
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True, sort_keys=False)
    return f"`{text.removesuffix('...' + chr(10)).strip()}`"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
