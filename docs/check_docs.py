"""Checks that the documentation is true of the project: `make docs-check`.

In README.md, CONTRIBUTING.md, CHANGELOG.md and docs/**/*.md:
- links lead to files and headings that exist, and paths in `code` that begin with a folder of the project exist;
- ```python blocks compile;
- in ```bash blocks, every `raftdiff SUBCOMMAND --option` is one that the command line knows;
- in ```bash blocks, every `make TARGET` is one of the Makefile, and every file that `python` runs exists;
- ```yaml blocks whose first line is `# run.yaml` are valid run configurations;
- docs/configuration.md is what docs/make_configuration.py writes.
Prints one `file:line: message` for each thing wrong, and exits with 1 if there is any.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("raftdiff", "pipelines", "reward_models", "app", "benchmarks", "docs", "examples", "tests")

_FENCE = re.compile(r"(?P<indent> *)(?P<ticks>`{3,}|~{3,})(?P<language>[\w+-]*).*")
_LINK = re.compile(r"!?\[[^\]]*\]\((?P<inline><[^>]*>|[^()\s]*)(?:\s+\"[^\"]*\")?\)|^\[[^\]]+\]:\s+(?P<reference>\S+)")
_HTML_LINK = re.compile(r"<(?:a|img)\b[^>]*?\b(?:href|src)=\"(?P<inline>[^\"]+)\"")
_CODE = re.compile(r"(`+)(.+?)\1")
_PATH = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*")
_COMMAND = re.compile(
    r"(?:^|[;&|(]|\$ )\s*(?:\w+=\S* +)*(?:\S*/)?raftdiff +"
    r"(?P<subcommand>(?:shapes|preference) +[a-z]+|[a-z][\w-]*)(?P<rest>[^;&|#]*)"
)
_OPTION = re.compile(r"(?<=\s)--[a-z][\w.-]*")
_MAKE = re.compile(r"(?:^|[;&|(]|\$ )\s*make +(?P<target>[a-z][\w-]*)", re.MULTILINE)
_SCRIPT = re.compile(r"\bpython3? +(?P<file>[\w./-]+\.py)\b")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block: its language, and its lines with the number of the first."""

    language: str
    line: int
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class Page:
    """A Markdown file, taken apart into numbered lines of prose and fenced blocks."""

    path: Path
    prose: tuple[tuple[int, str], ...]
    blocks: tuple[Block, ...]
    unclosed: int | None
    """The line of a fence that is never closed."""


@cache
def read_page(path: Path) -> Page:
    prose: list[tuple[int, str]] = []
    blocks: list[Block] = []
    fence: re.Match[str] | None = None
    start = 0
    body: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if fence is None:
            fence = _FENCE.fullmatch(line)
            start, body = number, []
            if fence is None:
                prose.append((number, line))
        elif line.strip().startswith(fence["ticks"]) and not line.strip().strip(fence["ticks"][0]):
            blocks.append(Block(language=fence["language"].lower(), line=start + 1, lines=tuple(body)))
            fence = None
        else:
            body.append(line.removeprefix(fence["indent"]))
    return Page(path=path, prose=tuple(prose), blocks=tuple(blocks), unclosed=start if fence else None)


@cache
def anchors(path: Path) -> frozenset[str]:
    """The anchors that GitHub gives the headings of a page, and those set by hand."""
    found: list[str] = []
    for _, line in read_page(path).prose:
        found += re.findall(r"<a (?:id|name)=\"([^\"]+)\"", line)
        if heading := re.fullmatch(r" {0,3}#{1,6}\s+(.*?)(?:\s+#+)?\s*", line):
            title = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            base = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            repeats = sum(1 for anchor in found if re.fullmatch(rf"{re.escape(base)}(-\d+)?", anchor))
            found.append(f"{base}-{repeats}" if base in found else base)
    return frozenset(found)


def check_links(page: Page) -> Iterator[tuple[int, str]]:
    for number, line in page.prose:
        bare = _CODE.sub("", line)
        for match in (*_LINK.finditer(bare), *_HTML_LINK.finditer(bare)):
            target = unquote((match["inline"] or match.groupdict().get("reference") or "").strip("<>"))
            if re.match(r"[a-z][a-z0-9+.-]*:", target):  # another site, or mail
                continue
            name, _, anchor = target.partition("#")
            file = (page.path.parent / name).resolve() if name else page.path
            if not file.exists():
                yield number, f"the link leads to {name}, which does not exist"
            elif not file.is_relative_to(ROOT):
                yield number, f"the link leads out of the repository: {name}"
            elif anchor and file.suffix == ".md" and anchor not in anchors(file):
                yield number, f"the link leads to #{anchor}, and no heading of {file.relative_to(ROOT)} has that anchor"


def check_paths(page: Page) -> Iterator[tuple[int, str]]:
    for number, line in page.prose:
        for _, code in _CODE.findall(line):
            if _PATH.fullmatch(code) and not (ROOT / code).exists():
                yield number, f"{code} does not exist"


def check_python(block: Block) -> Iterator[tuple[int, str]]:
    try:
        compile(block.text, "<block>", "exec")
    except SyntaxError as error:
        yield block.line + (error.lineno or 1) - 1, f"the Python block does not compile: {error.msg}"


def check_commands(block: Block) -> Iterator[tuple[int, str]]:
    number = block.line
    for command in re.split(r"(?<!\\)\n", block.text):  # a backslash continues a command on the next line
        for match in _COMMAND.finditer(command.replace("\\\n", " ")):
            subcommand = match["subcommand"]
            usage = help_of(subcommand)
            if usage is None:
                yield number, f"`raftdiff {subcommand} --help` fails: there is no such command, or it is broken"
                continue
            known = set(re.findall(r"--[a-z][\w.-]*", usage))
            for option in _OPTION.findall(match["rest"]):
                if option.rstrip(".") not in known:
                    yield number, f"`raftdiff {subcommand}` has no option {option}"
        number += command.count("\n") + 1


def check_scripts(block: Block) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(block.lines, start=block.line):
        for match in _MAKE.finditer(line):
            if match["target"] not in make_targets():
                yield number, f"the Makefile has no target {match['target']}"
        for match in _SCRIPT.finditer(line):
            if (
                match["file"].startswith(tuple(f"{folder}/" for folder in FOLDERS))
                and not (ROOT / match["file"]).is_file()
            ):
                yield number, f"{match['file']} does not exist"


@cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@cache
def help_of(subcommand: str) -> str | None:
    """What `raftdiff SUBCOMMAND --help` prints, or None where that fails."""
    program = Path(sys.executable).with_name("raftdiff")
    environment = os.environ | {"COLUMNS": "400", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run([program, *subcommand.split(), "--help"], env=environment, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def check_configuration(block: Block) -> Iterator[tuple[int, str]]:
    from raftdiff.config import parse_config
    from raftdiff.errors import ConfigError

    try:
        values = yaml.safe_load(block.text) or {}
        parse_config(values, where="run.yaml")
    except yaml.YAMLError as error:
        yield block.line, f"not YAML: {' '.join(str(error).split())}"
    except ConfigError as error:
        yield block.line, str(error)


def check_page(page: Page) -> Iterator[tuple[int, str]]:
    """Everything wrong with a page: line and message."""
    if page.unclosed is not None:
        yield page.unclosed, "the fenced block that begins here is never closed"
    yield from check_links(page)
    yield from check_paths(page)
    for block in page.blocks:
        if block.language in ("python", "py"):
            yield from check_python(block)
        elif block.language in ("bash", "sh", "shell", "console"):
            yield from check_commands(block)
            yield from check_scripts(block)
        elif block.language in ("yaml", "yml") and block.lines[:1] and block.lines[0].strip() == "# run.yaml":
            yield from check_configuration(block)


def check_generated() -> Iterator[str]:
    """What is wrong with pages that are written by a program."""
    import make_configuration  # beside this file

    page = make_configuration.PAGE
    if not page.is_file() or page.read_text(encoding="utf-8") != make_configuration.page():
        yield f"{page.relative_to(ROOT)}:1: out of date; run docs/make_configuration.py"


def main() -> int:
    pages = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    pages += sorted((ROOT / "docs").rglob("*.md"))
    wrong = 0
    for path in pages:
        name = path.relative_to(ROOT)
        if not path.is_file():
            print(f"{name}:1: the page does not exist")
            wrong += 1
            continue
        for line, message in sorted(check_page(read_page(path))):
            print(f"{name}:{line}: {message}")
            wrong += 1
    for message in check_generated():
        print(message)
        wrong += 1
    print(f"{len(pages)} pages checked, {wrong or 'nothing'} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
