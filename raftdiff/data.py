"""The user's own pictures with captions: a folder with metadata.jsonl, or a parquet file."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterator
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


def load_pictures(path: str | Path, *, height: int, width: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Captions and pictures, uint8 [3, height, width]: scaled to cover that size, then cropped around the center.

    A folder has a metadata.jsonl with `file_name` and `text` (or `caption`, `prompt`) on each line; a parquet file
    has a column `image` (bytes, or the struct of Hugging Face datasets) and one of these.

    Raises:
        DataError: with the file and the line or row.
    """
    path = Path(path)
    if path.is_dir():
        pairs = _folder(path)
    elif path.suffix == ".parquet" and path.is_file():
        pairs = _parquet(path)
    else:
        raise DataError(f"{path}: give a folder with metadata.jsonl, or a .parquet file")
    for where, _, caption, data in pairs:
        fitted = ImageOps.fit(_decode(where, data), (width, height), Image.Resampling.BICUBIC)
        yield caption, torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()


def read_folder(path: Path) -> tuple[list[Sample], list[str]]:
    """A folder's pictures in their own sizes as samples to score, and their file names.

    Raises:
        DataError: as `load_pictures`.
    """
    samples: list[Sample] = []
    names: list[str] = []
    for where, name, caption, data in _folder(Path(path)):
        pixels = torch.from_numpy(np.array(_decode(where, data))).permute(2, 0, 1).contiguous()
        samples.append(Sample(id=f"{len(samples):06d}", prompt=Prompt(text=caption), seed=0, image=pixels))
        names.append(name)
    return samples, names


def _folder(path: Path) -> Iterator[tuple[str, str, str, bytes]]:
    metadata = path / "metadata.jsonl"
    if not metadata.is_file():
        raise DataError(f'{metadata}: no such file; it has a line {{"file_name": "1.png", "text": "..."}} per picture')
    try:
        lines = metadata.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{metadata}: cannot be read: {error}; save it as UTF-8 text") from None
    found = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{metadata}, line {number}"
        try:
            row = json.loads(line)
            name = row["file_name"]
        except (ValueError, KeyError, TypeError):
            name = None
        if not isinstance(name, str):
            raise DataError(f"{where}: not a JSON object with a `file_name`")
        file = (path / name.replace("\0", "/")).resolve()
        if not file.is_relative_to(path.resolve()) or not file.is_file():
            raise DataError(f"{where}: there is no picture {name!r} in {path}")
        yield where, name, _caption(where, row), file.read_bytes()
        found = True
    if not found:
        raise DataError(f"{metadata} names no picture; it has a line for each")


def _parquet(path: Path) -> Iterator[tuple[str, str, str, bytes]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    where = f"{path}, row {number}"
                    image = row.get("image")
                    data = image.get("bytes") if isinstance(image, dict) else image
                    if not isinstance(data, bytes):
                        raise DataError(f"{where}: the column `image` holds no bytes")
                    yield where, str(number), _caption(where, row), data
        if not number:
            raise DataError(f"{path} holds no picture; it has a row for each")
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); write it again") from None


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
