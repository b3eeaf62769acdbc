"""Prompts: read from files and lists, generated, dealt out to the rounds, and given the seeds of their samples."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import write_file
from .errors import ConfigError, DataError
from .registry import nearest
from .shapes.captions import BACKGROUNDS, COLORS, NUMBERS, POSITIONS, RELATIONS, SHAPES, SIZES, Caption, random_caption
from .shapes.texts import TASKS, random_text
from .types import Prompt

logger = logging.getLogger(__name__)

COLUMNS = ("prompt", "caption", "text")
ATTEMPTS = 8  # texts that a writer has for each opening
LONGEST_LINE = 1 << 20  # characters; a longer one is no line of a prompt list, and must not fill the memory
_UNREADABLE = re.compile("[\0\ud800-\udfff]")


def load_prompts(source: str | Path | Sequence[str], *, limit: int | None = None) -> list[Prompt]:
    """The distinct prompts of `source`, in its order, at most `limit` of them; empty ones are skipped.

    `source` is a list of prompts; or the path of a file: one prompt a line, `.jsonl`, `.csv` or `.parquet` with a
    column `prompt`, `caption` or `text` (the first of these that is there; the others become the metadata, except
    binary columns of parquet); or `shapes:KIND[/COUNT[/SEED]]`, distinct captions of the embedded world, KIND one
    of single, count, relation, all, bare, open (64 and seed 0 unless said; bare is "a COLOR SHAPE", all 24 unless
    said, open is that with or without a background, 144, which leave size and position open); or
    `shapes-text:TASK[/COUNT[/SEED]]`, prompts of its language tasks, translation, continuation or caption. Text is
    UTF-8, with or without a byte order mark, with any line endings. Files are streamed and read no further than
    `limit` asks.

    Raises:
        DataError: a file that is missing, empty or not what its suffix says, with its line.
        ConfigError: an unknown KIND, more captions than there are, a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the limit of prompts is {limit}; it must be 1 or more, or left out")
    prompts: dict[str, Prompt] = {}
    duplicates = 0
    for prompt in _read(source):
        if prompt.text in prompts:
            duplicates += 1
            continue
        prompts[prompt.text] = prompt
        if len(prompts) == limit:
            break
    name = str(source) if isinstance(source, str | Path) else "the list of prompts"
    if not prompts:
        raise DataError(f"{name} holds no prompt; give at least one")
    if duplicates:
        logger.warning("%s: %d duplicate prompts dropped, %d distinct ones kept", name, duplicates, len(prompts))
    return list(prompts.values())


def _read(source: str | Path | Sequence[str]) -> Iterator[Prompt]:
    if isinstance(source, str) and is_generated(source):
        return _generated(source)
    if isinstance(source, str | Path):
        return _file(Path(source).expanduser())
    return _prompts((f"prompt {number} of the list", {"prompt": text}) for number, text in enumerate(source, start=1))


def _file(path: Path) -> Iterator[Prompt]:
    if not path.exists():
        raise DataError(f"there is no prompt file {path}{_nearest_file(path)}")
    if path.is_dir():
        raise DataError(f"{path} is a folder; name the prompt file in it")
    if path.suffix == ".json":
        raise DataError(f"{path}: a .json file cannot be streamed; write one object a line and call it .jsonl")
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower(), _text)
    return _prompts(reader(path))


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    close = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {path.with_name(close[0])}?" if close else ""


_Rows = Iterator[tuple[str, Mapping[str, Any]]]
"""Where each row stands, for error messages, and the row."""


def _prompts(rows: _Rows) -> Iterator[Prompt]:
    for where, row in rows:
        for column in COLUMNS:
            if column in row:
                break
        else:
            raise DataError(f"{where}: none of {', '.join(COLUMNS)} among {', '.join(map(str, row))}; rename one")
        text = row[column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise DataError(f"{where}: {column} is {text!r}, not a text; put it in quotes")
        _check_readable(text, where)
        if text := text.strip():
            yield Prompt(text=text, metadata={name: value for name, value in row.items() if name != column})


def _text(path: Path) -> _Rows:
    for number, line in _lines(path):
        yield f"{path}:{number}", {"prompt": line}


def _jsonl(path: Path) -> _Rows:
    for number, line in _lines(path):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}); write one object a line") from error
        if not isinstance(row, dict):
            raise DataError(f'{where}: not an object; write {{"prompt": "..."}}')
        yield where, row


def _csv(path: Path) -> _Rows:
    reader = csv.DictReader((line for _, line in _lines(path)), strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row:  # DictReader's key for what has no column
                raise DataError(f"{where}: more fields than the header has; put texts with commas in double quotes")
            yield where, row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.reader.line_num}: not CSV ({error}); check the quotes") from error


def _parquet(path: Path) -> _Rows:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = [field.name for field in file.schema_arrow if not _holds_bytes(field.type)]
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); write it again") from error


def _holds_bytes(type_: Any) -> bool:
    """Whether a column of this arrow type holds pictures or other bytes, which are no metadata of a prompt."""
    from pyarrow import types

    if types.is_binary(type_) or types.is_large_binary(type_) or types.is_fixed_size_binary(type_):
        return True
    return any(_holds_bytes(type_.field(i).type) for i in range(type_.num_fields))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers from 1, without the byte order marks of its parts."""
    # Bytes that are no UTF-8 come through as surrogates, so that the error can name the line they are on.
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for number in count(1):
            line = file.readline(LONGEST_LINE + 1)
            if not line:
                return
            _check_readable(line, f"{path}:{number}")
            if len(line) > LONGEST_LINE:
                raise DataError(f"{path}:{number}: longer than {LONGEST_LINE} characters; one prompt a line, please")
            yield number, line.lstrip("\ufeff")


def _check_readable(text: str, where: str) -> None:
    found = _UNREADABLE.search(text)
    if found is None:
        return
    code = ord(found[0])
    if code == 0:
        what = "a NUL character"
    elif 0xDC80 <= code <= 0xDCFF:
        what = f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8"
    else:
        what = f"half of a surrogate pair, U+{code:04X}"
    raise DataError(f"{where}: {what}; save the prompts as UTF-8 text (is this a text file?)")


_BARE = [Caption(color=color, shape=shape) for color in COLORS for shape in SHAPES]
_OPEN = [replace(caption, background=background) for caption in _BARE for background in (None, *BACKGROUNDS)]
_WITH_BACKGROUND = 1 + len(BACKGROUNDS)
_DISTINCT = {
    "single": len(_BARE) * (1 + len(SIZES)) * (1 + len(POSITIONS)) * _WITH_BACKGROUND,
    "count": len(_BARE) * len(NUMBERS) * _WITH_BACKGROUND,
    "relation": len(_BARE) * len(RELATIONS) * (len(COLORS) - 1) * len(SHAPES) * _WITH_BACKGROUND,
    "bare": len(_BARE),
    "open": len(_OPEN),
}
_DISTINCT["all"] = _DISTINCT["single"] + _DISTINCT["count"] + _DISTINCT["relation"]
_DISTINCT_TEXTS = dict.fromkeys(TASKS, 4000)  # there are more, but drawing until all were met takes long


def is_generated(source: str) -> bool:
    """Whether `source` names prompts of the embedded world, and no file."""
    return source.startswith(("shapes:", "shapes-text:"))


def _generated(source: str) -> Iterator[Prompt]:
    """`shapes:KIND/COUNT/SEED`, `shapes-text:KIND/COUNT/SEED`. A larger COUNT begins with the prompts of a smaller."""
    world, _, rest = source.partition(":")
    limits = _DISTINCT if world == "shapes" else _DISTINCT_TEXTS
    kind, *numbers = rest.split("/")
    if kind not in limits:
        raise ConfigError(f"{source}: unknown kind {kind!r}{nearest(kind, limits)} (there are {', '.join(limits)})")
    if len(numbers) > 2 or not all(re.fullmatch("[0-9]{1,18}", number) for number in numbers):
        raise ConfigError(f"{source}: write {world}:KIND/COUNT/SEED with whole numbers, such as {world}:{kind}/24/1")
    wanted = int(numbers[0]) if numbers else min(64, limits[kind])
    if not 1 <= wanted <= limits[kind]:
        raise ConfigError(f"{source}: there are 1 to {limits[kind]} prompts of the kind {kind}, not {wanted}")
    rng = np.random.default_rng(int(numbers[1]) if len(numbers) == 2 else 0)
    return _captions(kind, wanted, rng) if world == "shapes" else _texts(kind, wanted, rng)


def _captions(kind: str, wanted: int, rng: np.random.Generator) -> Iterator[Prompt]:
    if kind in ("bare", "open"):
        captions = _BARE if kind == "bare" else _OPEN
        for index in rng.permutation(len(captions))[:wanted]:
            yield Prompt(text=str(captions[index]), metadata={"kind": "single"})
        return
    drawn: set[Caption] = set()
    while len(drawn) < wanted:
        caption = random_caption(rng, None if kind == "all" else kind)
        if caption not in drawn:
            drawn.add(caption)
            yield Prompt(text=str(caption), metadata={"kind": caption.kind})


def _texts(task: str, wanted: int, rng: np.random.Generator) -> Iterator[Prompt]:
    drawn: set[str] = set()
    while len(drawn) < wanted:
        text = random_text(task, rng).prompt
        if text not in drawn:
            drawn.add(text)
            yield Prompt(text=text, metadata={"task": task})


def round_prompts(prompts: Sequence[Prompt], *, round: int, per_round: int | None, seed: int) -> list[Prompt]:
    """The prompts of round `round` (from 0): all of them, or `per_round` distinct ones.

    A function of its arguments alone, whatever the number of processes and whatever ran before. The rounds walk
    through the whole list, shuffled anew for each epoch, and repeat no prompt before all were used.
    """
    if per_round is None or per_round >= len(prompts):
        return list(prompts)
    carried: list[int] = []  # the end of the last epoch, which shares a round with the beginning of the next
    for epoch in count():
        order = np.random.default_rng([seed, epoch]).permutation(len(prompts)).tolist()
        if carried:  # no prompt twice in that round
            shared = set(carried)
            first = [index for index in order if index not in shared][: per_round - len(carried)]
            shared = set(first)
            order = first + [index for index in order if index not in shared]
        walk = carried + order
        whole_rounds = len(walk) // per_round
        if round < whole_rounds:
            return [prompts[index] for index in walk[round * per_round : (round + 1) * per_round]]
        round -= whole_rounds
        carried = walk[whole_rounds * per_round :]
    raise AssertionError("unreachable")


def written_prompts(
    write: Callable[[Sequence[Prompt], Sequence[int]], Sequence[str]],
    openings: Sequence[Prompt],
    *,
    kept_out: Collection[str] = (),
    round: int,
    seed: int,
) -> list[Prompt]:
    """The prompts of round `round` (from 1) that `write` makes of the openings and a seed for each, in their order.

    A text that is empty, not readable, among `kept_out`, or one of the round already is written again with the next
    seed, `ATTEMPTS` times in all; an opening that then has none is left out, with a warning. A prompt has the metadata
    of its opening and, as `opening`, its text.

    Raises:
        DataError: no opening has got a prompt.
    """
    found: dict[str, Prompt] = {}  # by the opening
    taken, refused = set(kept_out), Counter[str]()
    waiting = list(openings)
    for attempt in range(ATTEMPTS):
        if not waiting:
            break
        texts = write(waiting, [sample_seed(seed, round, opening.id, attempt) for opening in waiting])
        for opening, text in zip(waiting, map(str.strip, texts), strict=True):
            if reason := _unusable(text, kept_out, taken):
                refused[reason] += 1
            else:
                taken.add(text)
                found[opening.text] = Prompt(text=text, metadata={**opening.metadata, "opening": opening.text})
        waiting = [opening for opening in waiting if opening.text not in found]
    if waiting:
        reasons = ", ".join(f"{count} texts {reason}" for reason, count in refused.most_common())
        lack = f"round {round}: {len(waiting)} of {len(openings)} openings have no prompt after {ATTEMPTS} texts each"
        if not found:
            raise DataError(f"{lack} ({reasons}); give prompts.writer other openings or another model")
        logger.warning("%s (%s in all); the round has %d prompts", lack, reasons, len(found))
    return [found[opening.text] for opening in openings if opening.text in found]


def _unusable(text: str, kept_out: Collection[str], taken: Collection[str]) -> str | None:
    """Why a text can be no prompt beside those that are `taken`, or None."""
    if not text:
        return "empty"
    if _UNREADABLE.search(text):
        return "not readable"
    if text in kept_out:
        return "held out"
    return "repeated" if text in taken else None


def save_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Publish prompts with their metadata as JSON lines, which `load_prompts` reads back as they are.

    Raises:
        StorageError: the file cannot be written.
    """
    rows = [{"prompt": prompt.text, **prompt.metadata} for prompt in prompts]
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def sample_seed(run_seed: int, round: int, prompt_id: str, k: int) -> int:
    """The seed of the k-th sample of a prompt in a round: 63 bits of the SHA-256 of the four, so that no two samples
    share their noise and any number of processes draws the same samples."""
    digest = hashlib.sha256(f"{run_seed}/{round}/{prompt_id}/{k}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
