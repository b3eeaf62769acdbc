"""The user's own pictures with captions and texts with prompts, or pairs of them of which one is preferred."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps

from .errors import DataError
from .types import Prompt, Sample

MOST_PIXELS = 64_000_000  # a larger picture is refused before it is decoded
CAPTIONS = ("text", "caption", "prompt")


Picture = Callable[[str], bytes]
"""The bytes of the picture in a column of a row."""


def load_pictures(path: str | Path, *, height: int, width: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Captions and pictures, uint8 [3, height, width]: scaled to cover that size, then cropped around the center.

    A folder has a metadata.jsonl with `file_name` and `text` (or `caption`, `prompt`) on each line; a parquet file,
    or each of a folder of them, has a column `image` (bytes, or the struct of Hugging Face datasets) and one of these.

    Raises:
        DataError: with the file and the line or row.
    """
    path = Path(path)
    column = "file_name" if (path / "metadata.jsonl").is_file() else "image"
    for where, row, picture in _rows(path):
        yield _caption(where, row), _fitted(where, picture(column), height, width)


def load_preferences(path: str | Path, *, height: int, width: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Captions with the preferred and the other picture, both uint8 [3, height, width], fitted as by `load_pictures`.

    A parquet file, or each of a folder of them, has the columns of Pick-a-Pic: `caption`, `jpg_0`, `jpg_1` (bytes) and
    `label_0`: 1 where the first is preferred, 0 where the second is, 0.5 for a tie, which is left out. A folder of
    pictures has a metadata.jsonl with `chosen` and `rejected` (file names) and `text` on each line. Either form may
    stand in either place.

    Raises:
        DataError: with the file and the line or row, or where nothing but ties is there.
    """
    found = False
    for where, row, picture in _rows(Path(path)):
        columns = _preferred_first(where, row)
        if columns is not None:
            chosen, rejected = (_fitted(f"{where}, {c}", picture(c), height, width) for c in columns)
            yield _caption(where, row), chosen, rejected
            found = True
    if not found:
        raise DataError(f"{path}: every pair is a tie, so nothing is preferred to anything; add pairs with a winner")


def load_completions(path: str | Path) -> Iterator[tuple[str, str]]:
    """Prompts and completions: the columns `prompt` and `completion` of a .jsonl or parquet file, or of each parquet
    file of a folder.

    Raises:
        DataError: with the file and the line or row.
    """
    for where, row, _ in _rows(Path(path)):
        yield _text(where, row, "prompt"), _text(where, row, "completion")


def load_text_preferences(path: str | Path) -> Iterator[tuple[str, str, str]]:
    """Prompts with the preferred completion and the other one: `prompt`, `chosen` and `rejected`, in the files of
    `load_completions`.

    Raises:
        DataError: with the file and the line or row.
    """
    for where, row, _ in _rows(Path(path)):
        yield _text(where, row, "prompt"), _text(where, row, "chosen"), _text(where, row, "rejected")


def _text(where: str, row: dict, column: str) -> str:
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: no text in `{column}`; a row has `prompt` and `completion`, or `chosen`, `rejected`")
    return text


def count_rows(path: str | Path, *, pairs: bool = False) -> int:
    """How many examples, or pairs, the functions above would give; no picture is decoded.

    Raises:
        DataError: as they do, but for the pictures themselves.
    """
    return sum(not pairs or _preferred_first(where, row) is not None for where, row, _ in _rows(Path(path)))


def _preferred_first(where: str, row: dict) -> tuple[str, str] | None:
    """The columns of the preferred and of the other picture; None for a tie."""
    if {"chosen", "rejected"} <= row.keys():
        return "chosen", "rejected"
    missing = sorted({"jpg_0", "jpg_1", "label_0"} - row.keys())
    if missing:
        raise DataError(
            f"{where}: no {missing[0]}; a preference has `jpg_0`, `jpg_1` and `label_0`, or `chosen` and `rejected`"
        )
    label = row["label_0"]
    if label not in (0, 0.5, 1):
        raise DataError(f"{where}: label_0 is {label!r}; 1 prefers jpg_0, 0 prefers jpg_1, and 0.5 is a tie")
    return None if label == 0.5 else ("jpg_0", "jpg_1") if label else ("jpg_1", "jpg_0")


def read_folder(path: Path) -> tuple[list[Sample], list[str]]:
    """A folder's pictures in their own sizes as samples to score, and their file names.

    Raises:
        DataError: as `load_pictures`.
    """
    samples: list[Sample] = []
    names: list[str] = []
    for where, row, picture in _folder(Path(path)):
        pixels = _pixels(_decode(where, picture("file_name")))
        samples.append(Sample(id=f"{len(samples):06d}", prompt=Prompt(text=_caption(where, row)), seed=0, image=pixels))
        names.append(row["file_name"])
    return samples, names


def read_texts(path: Path) -> list[Sample]:
    """The texts of a file as samples to score.

    Raises:
        DataError: as `load_completions`.
    """
    return [
        Sample(id=f"{i:06d}", prompt=Prompt(text=prompt), seed=0, text=text)
        for i, (prompt, text) in enumerate(load_completions(path))
    ]


def _rows(path: Path) -> Iterator[tuple[str, dict, Picture]]:
    """Where a row stands, the row, and its pictures by column."""
    if path.is_dir():
        shards = [] if (path / "metadata.jsonl").exists() else sorted(path.glob("*.parquet"))
        return chain.from_iterable(map(_parquet, shards)) if shards else _folder(path)
    if path.suffix == ".parquet" and path.is_file():
        return _parquet(path)
    if path.suffix == ".jsonl" and path.is_file():
        return _json_lines(path, path.parent)
    raise DataError(f"{path}: give a folder with metadata.jsonl, a .jsonl file, or a .parquet file")


def _folder(path: Path) -> Iterator[tuple[str, dict, Picture]]:
    metadata = path / "metadata.jsonl"
    if not metadata.is_file():
        raise DataError(
            f'{metadata}: no such file; it has a line {{"file_name": "1.png", "text": "..."}} per picture, or '
            '{"chosen": "1.png", "rejected": "2.png", "text": "..."} per preference'
        )
    return _json_lines(metadata, path)


def _json_lines(file: Path, folder: Path) -> Iterator[tuple[str, dict, Picture]]:
    """The rows of a file whose pictures lie in `folder`."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}; save it as UTF-8 text") from None
    found = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object")
        yield where, row, partial(_file, where, folder, row)
        found = True
    if not found:
        raise DataError(f"{file} holds no example; it has a line for each")


def _file(where: str, folder: Path, row: dict, column: str) -> bytes:
    name = row.get(column)
    if not isinstance(name, str):
        raise DataError(f"{where}: not a JSON object with a `{column}`")
    file = (folder / name.replace("\0", "/")).resolve()
    if not file.is_relative_to(folder.resolve()) or not file.is_file():
        raise DataError(f"{where}: there is no picture {name!r} in {folder}")
    return file.read_bytes()


def _parquet(path: Path) -> Iterator[tuple[str, dict, Picture]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    where = f"{path}, row {number}"
                    yield where, row, partial(_cell, where, row)
        if not number:
            raise DataError(f"{path} holds no example; it has a row for each")
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); write it again") from None


def _cell(where: str, row: dict, column: str) -> bytes:
    image = row.get(column)
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise DataError(f"{where}: the column `{column}` holds no bytes")
    return data


def _caption(where: str, row: dict) -> str:
    caption = next((row[name] for name in CAPTIONS if isinstance(row.get(name), str)), None)
    if caption is None:
        raise DataError(f"{where}: no caption; it is called one of {', '.join(CAPTIONS)}")
    return caption


def _decode(where: str, data: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]) as image:
            if image.width * image.height > MOST_PIXELS:
                raise DataError(f"{where}: {image.width}x{image.height} pixels are too many (at most {MOST_PIXELS})")
            return ImageOps.exif_transpose(image).convert("RGB")
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, zlib.error, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: the picture cannot be read: {error}") from None


def _fitted(where: str, data: bytes, height: int, width: int) -> torch.Tensor:
    return _pixels(ImageOps.fit(_decode(where, data), (width, height), Image.Resampling.BICUBIC))


def _pixels(image: Image.Image) -> torch.Tensor:
    """uint8 [3, height, width]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
