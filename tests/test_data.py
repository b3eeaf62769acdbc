"""The user's own pictures and preferences: both forms, and each way in which they can be wrong."""

from __future__ import annotations

import io
import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raftdiff import data
from raftdiff.data import count_rows, load_pictures, load_preferences, read_folder
from raftdiff.errors import DataError


def png(color: tuple[int, int, int] = (200, 10, 30), size: tuple[int, int] = (8, 8), form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, form)
    return file.getvalue()


def folder(path: Path, *lines: object, **files: bytes) -> Path:
    for name, content in (files or {"a": png()}).items():
        (path / f"{name}.png").write_bytes(content)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (path / "metadata.jsonl").write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, load: Callable = load_pictures) -> str:
    with pytest.raises(DataError) as refused:
        list(load(path, height=4, width=4))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_folder_gives_captions_and_pictures_of_the_wanted_size(tmp_path):
    lines = [
        {"file_name": "a.png", "text": "a red circle"},
        "",
        {"file_name": "b.png", "caption": "a blue \u2028 square"},
    ]
    pairs = list(load_pictures(folder(tmp_path, *lines, a=png(), b=png((0, 0, 255), (20, 8))), height=4, width=6))
    assert [caption for caption, _ in pairs] == ["a red circle", "a blue \u2028 square"]
    assert all(image.shape == (3, 4, 6) and image.dtype == torch.uint8 for _, image in pairs)
    assert pairs[0][1][:, 2, 3].tolist() == [200, 10, 30]


def test_a_picture_is_scaled_to_cover_and_cropped_around_its_center(tmp_path):
    stripes = Image.new("RGB", (24, 8))
    stripes.paste((0, 255, 0), (8, 0, 16, 8))
    file = io.BytesIO()
    stripes.save(file, "PNG")
    path = folder(tmp_path, {"file_name": "a.png", "text": ""}, a=file.getvalue())
    ((_, image),) = load_pictures(path, height=8, width=8)
    assert image[1].min() == 255 and image[0].max() == 0


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_a_parquet_file_gives_them_too(tmp_path, struct, column):
    images = [png(), png((0, 255, 0), form="JPEG")]
    cells = [{"bytes": image, "path": None} for image in images] if struct else images
    pq.write_table(pa.table({"image": cells, column: ["one", "two"]}), tmp_path / "d.parquet")
    pairs = list(load_pictures(tmp_path / "d.parquet", height=8, width=8))
    assert [caption for caption, _ in pairs] == ["one", "two"] and pairs[0][1][0].unique().tolist() == [200]


def test_a_folder_to_score_keeps_sizes_and_names(tmp_path):
    samples, names = read_folder(folder(tmp_path, {"file_name": "a.png", "text": "x"}, a=png(size=(5, 9))))
    assert names == ["a.png"] and samples[0].image.shape == (3, 9, 5) and samples[0].prompt.text == "x"


def test_a_picture_lies_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    file = io.BytesIO()
    Image.new("RGB", (10, 4)).save(file, "JPEG", exif=exif)
    samples, _ = read_folder(folder(tmp_path, {"file_name": "a.png", "text": "x"}, a=file.getvalue()))
    assert samples[0].image.shape == (3, 10, 4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"file_name": "a.png"}, "line 1: no caption; it is called one of text, caption, prompt"),
        ({"file_name": "a.png", "text": 3}, "line 1: no caption"),
        ({"text": "x"}, "line 1: not a JSON object with a `file_name`"),
        ({"file_name": None, "text": "x"}, "line 1: not a JSON object with a `file_name`"),
        ("[1]", "line 1: not a JSON object"),
        ("{", "line 1: not a JSON object"),
        ({"file_name": "b.png", "text": "x"}, "line 1: there is no picture 'b.png'"),
        ({"file_name": "../secret.png", "text": "x"}, "there is no picture '../secret.png'"),
        ({"file_name": "/etc/hostname", "text": "x"}, "there is no picture '/etc/hostname'"),
        ({"file_name": "link.png", "text": "x"}, "there is no picture 'link.png'"),
        ({"file_name": "a\0.png", "text": "x"}, "there is no picture"),
        ({"file_name": ".", "text": "x"}, "there is no picture '.'"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, line, message):
    (tmp_path / "secret.png").write_bytes(png())
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    assert message in refusal(folder(inside, line))


@pytest.mark.parametrize(
    "content", [b"", b"no picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>", png(form="JPEG")[:-9]]
)
def test_a_file_that_is_no_picture_is_named(tmp_path, content):
    path = folder(tmp_path, {"file_name": "a.png", "text": "x"}, a=content)
    assert "line 1: the picture cannot be read" in refusal(path)


def test_a_damaged_picture_is_read_or_refused_but_nothing_else(tmp_path):
    rng = random.Random(0)
    whole = png(size=(40, 40))
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path = folder(tmp_path, {"file_name": "a.png", "text": "x"}, a=bytes(damaged))
        try:
            list(load_pictures(path, height=4, width=4))
        except DataError as refused:
            assert "line 1" in str(refused)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MOST_PIXELS", 63)
    path = folder(tmp_path, {"file_name": "a.png", "text": "x"})
    assert "line 1: 8x8 pixels are too many (at most 63)" in refusal(path)


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path):
    header = png()[:16] + (60_000).to_bytes(4, "big") * 2 + png()[24:]
    header = header[:29] + zlib.crc32(header[12:29]).to_bytes(4, "big") + header[33:]
    assert "line 1: " in refusal(folder(tmp_path, {"file_name": "a.png", "text": "x"}, a=header))


def test_other_things_are_refused_by_name(tmp_path):
    assert "metadata.jsonl: no such file; it has a line" in refusal(tmp_path)
    assert "give a folder with metadata.jsonl, a .jsonl file, or a .parquet file" in refusal(tmp_path / "nothing")
    (tmp_path / "metadata.jsonl").write_bytes(b'{"text": "\xff"}')
    assert "metadata.jsonl: cannot be read" in refusal(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    assert "x.parquet: not a readable parquet file" in refusal(tmp_path / "x.parquet")
    pq.write_table(pa.table({"image": [None], "text": ["x"]}), tmp_path / "y.parquet")
    assert "y.parquet, row 1: the column `image` holds no bytes" in refusal(tmp_path / "y.parquet")
    pq.write_table(pa.table({"image": [png()]}), tmp_path / "z.parquet")
    assert "z.parquet, row 1: no caption" in refusal(tmp_path / "z.parquet")


def test_grey_and_transparent_pictures_become_rgb(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), 7, dtype=np.uint8)).save(file, "PNG")
    samples, _ = read_folder(folder(tmp_path, {"file_name": "a.png", "text": "x"}, a=file.getvalue()))
    assert samples[0].image.unique().tolist() == [7]


# -- preferences -------------------------------------------------------------------------------------------------------

RED, BLUE = (255, 0, 0), (0, 0, 255)


def pick_a_pic(path: Path, labels: list, **columns: list) -> Path:
    """A parquet file of red pictures against blue ones, with some of the further columns that Pick-a-Pic has."""
    count = len(labels)
    plain = {
        "are_different": [True] * count,
        "caption": [f"caption {i}" for i in range(count)],
        "jpg_0": [png(RED, form="JPEG")] * count,
        "jpg_1": [png(BLUE, form="JPEG")] * count,
        "label_0": labels,
        "label_1": [None] * count,
    }
    columns = {name: column for name, column in (plain | columns).items() if column}
    pq.write_table(pa.table(columns), path)
    return path


def preferred(path: Path) -> list[tuple[str, str, str]]:
    """Caption, and the colors of the preferred and of the other picture."""

    def color(image: torch.Tensor) -> str:
        assert image.shape == (3, 4, 6) and image.dtype == torch.uint8
        return "red" if image[0].min() > 250 else "blue" if image[2].min() > 250 else "other"

    return [(caption, color(a), color(b)) for caption, a, b in load_preferences(path, height=4, width=6)]


def test_pick_a_pic_gives_the_winner_first_and_no_ties(tmp_path):
    pairs = preferred(pick_a_pic(tmp_path / "p.parquet", [1.0, 0.5, 0.0]))
    assert pairs == [("caption 0", "red", "blue"), ("caption 2", "blue", "red")]


def test_pictures_and_pairs_are_counted_without_being_decoded(tmp_path):
    damaged = [b"no picture"] * 3
    pairs = pick_a_pic(tmp_path / "pairs.parquet", [1.0, 0.5, 0.0], jpg_0=damaged, jpg_1=damaged)
    assert count_rows(pairs, pairs=True) == 2  # no tie
    lines = [{"file_name": "a.png", "text": "x"}, "", {"file_name": "b.png", "text": "y"}]
    assert count_rows(folder(tmp_path, *lines, a=damaged[0])) == 2


def test_a_folder_of_parquet_files_is_read_in_the_order_of_their_names(tmp_path):
    pick_a_pic(tmp_path / "train-00001.parquet", [0.0])
    pick_a_pic(tmp_path / "train-00000.parquet", [0.5, 1.0])
    assert preferred(tmp_path) == [("caption 1", "red", "blue"), ("caption 0", "blue", "red")]
    pq.write_table(pa.table({"image": [png(), png(BLUE)], "text": ["one", "two"]}), tmp_path / "train-00000.parquet")
    pq.write_table(pa.table({"image": [png()], "text": ["three"]}), tmp_path / "train-00001.parquet")
    assert [caption for caption, _ in load_pictures(tmp_path, height=4, width=4)] == ["one", "two", "three"]


def test_a_folder_gives_preferences_by_file_names(tmp_path):
    line = {"chosen": "b.png", "rejected": "a.png", "text": "a square"}
    path = folder(tmp_path, line, "", a=png(RED, (20, 8)), b=png(BLUE))
    assert preferred(path) == [("a square", "blue", "red")]


def test_either_form_of_preference_may_stand_in_either_place(tmp_path):
    line = {"jpg_0": "a.png", "jpg_1": "b.png", "label_0": 0, "caption": "x"}
    assert preferred(folder(tmp_path, line, a=png(RED), b=png(BLUE))) == [("x", "blue", "red")]
    table = pa.table({"prompt": ["y"], "chosen": [png(RED)], "rejected": [{"bytes": png(BLUE), "path": None}]})
    pq.write_table(table, tmp_path / "p.parquet")
    assert preferred(tmp_path / "p.parquet") == [("y", "red", "blue")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jpg_1": []}, "row 1: no jpg_1; a preference has `jpg_0`, `jpg_1` and `label_0`, or `chosen` and `rejected`"),
        ({"label_0": []}, "row 1: no label_0; a preference has"),
        ({"label_0": [0.7]}, "row 1: label_0 is 0.7; 1 prefers jpg_0, 0 prefers jpg_1, and 0.5 is a tie"),
        ({"label_0": ["1"]}, "row 1: label_0 is '1'; 1 prefers"),
        ({"label_0": pa.array([None], pa.float64())}, "row 1: label_0 is None; 1 prefers"),
        ({"label_0": [float("nan")]}, "row 1: label_0 is nan; 1 prefers"),
        ({"caption": []}, "row 1: no caption; it is called one of text, caption, prompt"),
        ({"jpg_0": [b"no picture"]}, "row 1, jpg_0: the picture cannot be read"),
        ({"jpg_0": ["a.jpg"]}, "row 1: the column `jpg_0` holds no bytes"),
        ({"label_0": [0.5]}, "p.parquet: every pair is a tie"),
    ],
)
def test_a_row_that_is_no_preference_is_named(tmp_path, change, message):
    assert message in refusal(pick_a_pic(tmp_path / "p.parquet", [1.0], **change), load_preferences)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"chosen": "a.png", "text": "x"}, "line 1: no jpg_0; a preference has `jpg_0`, `jpg_1` and `label_0`, or"),
        ({"file_name": "a.png", "text": "x"}, "line 1: no jpg_0; a preference has"),
        ({"chosen": "a.png", "rejected": "c.png", "text": "x"}, "line 1: there is no picture 'c.png'"),
        ({"chosen": "a.png", "rejected": "../a.png", "text": "x"}, "line 1: there is no picture '../a.png'"),
        ({"chosen": "a.png", "rejected": None, "text": "x"}, "line 1: not a JSON object with a `rejected`"),
        ({"chosen": "a.png", "rejected": "b.png", "text": "x"}, "line 1, rejected: the picture cannot be read"),
        ({"chosen": "a.png", "rejected": "a.png"}, "line 1: no caption"),
    ],
)
def test_a_line_that_is_no_preference_is_named(tmp_path, line, message):
    assert message in refusal(folder(tmp_path, line, a=png(), b=b"damaged"), load_preferences)
    (tmp_path / "metadata.jsonl").unlink()
    assert '{"chosen": "1.png", "rejected": "2.png", "text": "..."} per preference' in refusal(tmp_path)
