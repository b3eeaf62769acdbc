"""Prompt files as people have them load, those that cannot be read say where, and every round gets its prompts."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from raftdiff.errors import ConfigError, DataError
from raftdiff.prompts import load_prompts, round_prompts, sample_seed
from raftdiff.shapes.captions import parse
from raftdiff.types import Prompt


def texts(source, **options) -> list[str]:
    return [prompt.text for prompt in load_prompts(source, **options)]


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [
        b"a cat\na dog\n",
        b"a cat\na dog",
        b"\xef\xbb\xbfa cat\r\na dog\r\n",
        b"\r\n\n  a cat \n \t\n\na dog\n\n",
        b"a cat\ra dog\r",
        b"\xef\xbb\xbfa cat\n\xef\xbb\xbfa dog\n",
    ],
    ids=["plain", "no-last-newline", "bom-crlf", "empty-lines", "cr", "two-boms"],
)
def test_a_text_file_gives_a_prompt_a_line_in_any_encoding_of_lines(tmp_path: Path, content: bytes):
    for name in ("prompts.txt", "prompts.list", "prompts"):
        assert texts(write(tmp_path / name, content)) == ["a cat", "a dog"]


def test_any_script_and_direction_of_text_is_kept(tmp_path: Path):
    lines = [
        "\u05d7\u05ea\u05d5\u05dc \u05d0\u05d3\u05d5\u05dd",
        "\u200f\u0642\u0637\u0629\u200f",
        "\u732b",
        "\U0001f431 cat",
    ]
    assert texts(write(tmp_path / "p.txt", "\n".join(lines))) == lines


def test_duplicates_are_dropped_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = write(tmp_path / "p.txt", "a cat\na dog\na cat \na cat\n")
    with caplog.at_level(logging.WARNING):
        assert texts(path) == ["a cat", "a dog"]
    assert f"{path}: 2 duplicate prompts dropped, 2 distinct ones kept" in caplog.text


def test_a_list_is_a_source_too():
    assert texts(["a cat", " ", "a dog "]) == ["a cat", "a dog"]
    with pytest.raises(DataError, match="prompt 2 of the list"):
        load_prompts(["a cat", "a\0dog"])
    with pytest.raises(DataError, match="prompt 1 of the list: prompt is 3, not a text"):
        load_prompts([3])  # type: ignore[list-item]
    with pytest.raises(DataError, match="holds no prompt"):
        load_prompts([])


@pytest.mark.parametrize("column", ["prompt", "caption", "text"])
def test_jsonl_csv_and_parquet_keep_the_other_columns_as_metadata(tmp_path: Path, column: str):
    expected = [Prompt(text="a cat, red", metadata={"tag": "x"}), Prompt(text="a dog", metadata={"tag": "y"})]
    jsonl = f'{{"tag": "x", "{column}": "a cat, red"}}\r\n\n{{"{column}": "a dog", "tag": "y"}}'
    assert load_prompts(write(tmp_path / "p.jsonl", "\ufeff" + jsonl)) == expected
    assert load_prompts(write(tmp_path / "p.csv", f'\ufefftag,{column}\r\nx,"a cat, red"\r\ny,a dog\r\n')) == expected
    parquet.write_table(
        pa.table({column: ["a cat, red", None, "a dog"], "tag": ["x", "-", "y"], "jpg_0": [b"1", b"2", b"3"]}),
        tmp_path / "p.parquet",
    )
    assert load_prompts(tmp_path / "p.parquet") == expected


def test_pictures_inside_parquet_structs_are_not_read_as_metadata(tmp_path: Path):
    image = pa.array([{"bytes": b"1", "path": "1.png"}])
    include = pa.array([[{"class": "cat", "count": 2}]])
    parquet.write_table(pa.table({"prompt": ["two cats"], "image": image, "include": include}), tmp_path / "p.parquet")
    (prompt,) = load_prompts(tmp_path / "p.parquet")
    assert prompt.metadata == {"include": [{"class": "cat", "count": 2}]}


def test_the_first_known_column_is_the_prompt(tmp_path: Path):
    path = write(tmp_path / "p.jsonl", '{"text": "t", "caption": "c", "prompt": "p"}')
    assert load_prompts(path) == [Prompt(text="p", metadata={"text": "t", "caption": "c"})]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"", "holds no prompt"),
        ("p.txt", b"\xef\xbb\xbf\r\n \n", "holds no prompt"),
        ("p.csv", b"", "holds no prompt"),
        ("p.txt", b"a cat\na \0dog\n", r"p\.txt:2: a NUL character"),
        ("p.txt", b"a cat\n\na \xe9t\xe9\n", r"p\.txt:3: the byte 0xe9, which is not UTF-8; save"),
        ("p.txt", "a cat\n".encode("utf-16"), r"p\.txt:1: the byte 0xff"),
        ("p.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"p\.txt:1: the byte 0x89"),
        ("p.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"p\.png:1: the byte 0x89"),
        ("p.txt", b"a" * 3_000_000, r"p\.txt:1: longer than"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"p\.jsonl:2: not JSON"),
        ("p.jsonl", b"[" * 200_000, r"p\.jsonl:1: not JSON"),
        ("p.jsonl", b'"a cat"\n', r"p\.jsonl:1: not an object"),
        ("p.jsonl", b'{"prompt": "a"}\n{"promt": "b"}\n', r"p\.jsonl:2: none of prompt, caption, text among promt"),
        ("p.jsonl", b'{"prompt": ["a"]}\n', r"p\.jsonl:1: prompt is \['a'\], not a text"),
        ("p.jsonl", b'{"prompt": "a \\u0000"}\n', r"p\.jsonl:1: a NUL character"),
        ("p.jsonl", b'{"prompt": "a \\ud83d"}\n', r"p\.jsonl:1: half of a surrogate pair, U\+D83D"),
        ("p.csv", b"tag,title\nx,a cat\n", r"p\.csv:2: none of prompt, caption, text among tag, title"),
        ("p.csv", b"prompt\na cat, a dog\n", r"p\.csv:2: more fields than the header"),
        ("p.csv", b'prompt\na cat\n"a dog\n', r"p\.csv:3: not CSV"),
        ("p.csv", b"prompt\na cat\na \xff\n", r"p\.csv:3: the byte 0xff"),
        ("p.parquet", b"", "not a readable parquet file"),
        ("p.parquet", b"PAR1 and then nothing", "not a readable parquet file"),
        ("p.json", b'["a cat"]', "call it .jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_its_line(tmp_path: Path, name: str, content: bytes, words: str):
    with pytest.raises(DataError, match=words):
        load_prompts(write(tmp_path / name, content))


def test_a_parquet_file_without_a_prompt_column_names_those_it_has(tmp_path: Path):
    parquet.write_table(pa.table({"title": ["a"]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match="row 1: none of prompt, caption, text among title"):
        load_prompts(tmp_path / "p.parquet")


def test_a_missing_file_is_refused_with_the_nearest_name(tmp_path: Path):
    write(tmp_path / "animals.txt", "a cat")
    with pytest.raises(DataError, match=r"no prompt file .*animal\.txt; did you mean .*animals\.txt\?"):
        load_prompts(tmp_path / "animal.txt")
    with pytest.raises(DataError, match="nor a folder"):
        load_prompts(str(tmp_path / "nowhere" / "animals.txt"))
    with pytest.raises(DataError, match="is a folder"):
        load_prompts(tmp_path)


def test_a_long_file_is_streamed(tmp_path: Path):
    path = tmp_path / "long.txt"
    with path.open("wb") as file:
        file.writelines(b"a photograph of object number %d, at dusk, in the rain\n" % i for i in range(200_000))
        file.write(b"\0\n")
    assert len(load_prompts(path, limit=1000)) == 1000  # the bad line is never reached
    with pytest.raises(DataError, match=r"long\.txt:200001: a NUL"):
        load_prompts(path)


def test_the_limit_counts_distinct_prompts(tmp_path: Path):
    path = write(tmp_path / "p.txt", "a\na\nb\nc\n")
    assert texts(path, limit=2) == ["a", "b"]
    assert texts(path, limit=9) == ["a", "b", "c"]
    with pytest.raises(ConfigError, match="limit of prompts is 0"):
        load_prompts(path, limit=0)


def test_published_prompt_files_load_whole(published_data: Path):
    animals = load_prompts(published_data / "prompts" / "simple_animals.txt")
    assert len(animals) == 45 and animals[0].text == "cat"
    geneval = load_prompts(published_data / "prompts" / "geneval_test.jsonl")
    assert len(geneval) == 553  # GenEval's own count: the file's 2,212 lines say each four times
    assert geneval[0].text == "a photo of two wine glasses"
    assert geneval[0].metadata["tag"] == "counting"
    assert geneval[0].metadata["include"] == [{"class": "wine glass", "count": 2}]


@pytest.mark.parametrize("kind", ["single", "count", "relation", "all"])
def test_generated_captions_are_distinct_of_their_kind_and_the_same_every_time(kind: str):
    prompts = load_prompts(f"shapes:{kind}/100/1")
    captions = [parse(prompt.text) for prompt in prompts]
    assert len(set(captions)) == 100
    assert [prompt.metadata["kind"] for prompt in prompts] == [caption.kind for caption in captions]
    assert {caption.kind for caption in captions} == ({"single", "count", "relation"} if kind == "all" else {kind})
    assert prompts == load_prompts(f"shapes:{kind}/100/1") != load_prompts(f"shapes:{kind}/100/2")
    assert prompts[:10] == load_prompts(f"shapes:{kind}/10/1")


def test_generated_captions_of_every_number_up_to_all_there_are():
    assert len(texts("shapes:count/288")) == 288
    open_ = texts("shapes:open/144")
    assert len(set(open_)) == 144 and "a red circle on a cyan background" in open_ and "a red circle" in open_
    bare = texts("shapes:bare")
    assert len(set(bare)) == 24 and set(bare) == set(texts("shapes:bare/24/5"))
    assert {"a red circle", "an orange cross"} <= set(bare) and all(len(text.split()) == 3 for text in bare)
    assert len(texts("shapes:single")) == 64


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("shapes:singel", "unknown kind 'singel'; did you mean 'single'"),
        ("shapes:bare/25", "there are 1 to 24 prompts of the kind bare, not 25"),
        ("shapes:count/289", "1 to 288"),
        ("shapes:single/0", "not 0"),
        ("shapes:single/-1", "whole numbers"),
        ("shapes:single/8/1/2", "whole numbers"),
        ("shapes:single/", "whole numbers"),
    ],
)
def test_captions_that_cannot_be_generated_are_refused(source: str, words: str):
    with pytest.raises(ConfigError, match=words):
        load_prompts(source)


def numbered(count: int) -> list[Prompt]:
    return [Prompt(text=str(i)) for i in range(count)]


@pytest.mark.parametrize(("count", "per_round"), [(12, 4), (10, 4), (10, 7), (10, 9), (7, 1), (45, 32)])
def test_rounds_use_every_prompt_before_they_repeat_one_and_none_twice_in_a_round(count: int, per_round: int):
    prompts = numbered(count)
    rounds = [round_prompts(prompts, round=r, per_round=per_round, seed=3) for r in range(40)]
    assert all(len({prompt.id for prompt in chosen}) == per_round for chosen in rounds)
    walk = [prompt.text for chosen in rounds for prompt in chosen]
    for start in range(0, len(walk), count):
        epoch = walk[start : start + count]
        assert len(set(epoch)) == len(epoch)


def test_a_round_is_a_function_of_its_number_and_the_seed_alone():
    prompts = numbered(10)
    late = round_prompts(prompts, round=11, per_round=4, seed=3)
    for r in range(11):
        round_prompts(prompts, round=r, per_round=4, seed=3)
    assert round_prompts(prompts, round=11, per_round=4, seed=3) == late
    assert round_prompts(prompts, round=11, per_round=4, seed=4) != late
    epochs = [round_prompts(numbered(12), round=r, per_round=11, seed=0) for r in (0, 12)]
    assert epochs[0] != epochs[1]


def test_a_round_of_all_prompts_keeps_their_order():
    prompts = numbered(5)
    for per_round in (None, 5, 6):
        assert round_prompts(prompts, round=2, per_round=per_round, seed=1) == prompts


def test_sample_seeds_never_change_between_versions():
    assert sample_seed(0, 0, "92d5b0dc8f6a", 0) == 1931343363114623722


def test_sample_seeds_are_distinct_63_bit_numbers():
    ids = [Prompt(text=str(i)).id for i in range(20)]
    seeds = {sample_seed(s, r, p, k) for s in range(3) for r in range(11) for p in ids for k in range(11)}
    assert len(seeds) == 3 * 11 * 20 * 11
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62 and np.int64(max(seeds)) == max(seeds)
