"""Samples, scores and selections come back exactly, and damage is noticed."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raftdiff.errors import StorageError
from raftdiff.store import SampleStore
from raftdiff.types import Completion, Example, Prompt, Sample


def image_sample(k: int, height: int = 5, width: int = 7) -> Sample:
    generator = torch.Generator().manual_seed(k)
    latents = torch.randn(4, 3, 2, generator=generator)
    latents[0, 0] = torch.tensor([float("nan"), -0.0])
    return Sample(
        id=f"0003-92d5b0dc8f6a-{k:02d}",
        prompt=Prompt(text="a red circle, \u00e9\u05d0\u0000", metadata={"tag": "colors", "n": [1, 2.5, None]}),
        seed=2**63 + k,
        image=torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator),
        latents=latents.to(memory_format=torch.contiguous_format).permute(0, 2, 1),
        flaw="black" if k == 1 else None,
    )


def text_sample(k: int) -> Sample:
    return Sample(id=f"0003-text-{k:02d}", prompt=Prompt(text="Q"), seed=k, text="an answer\nof two lines")


def completed_sample(k: int) -> Sample:
    """With what a value head adds to it, for every other k."""
    completion = Completion(
        tokens_T=torch.tensor([5, 2**40, 0]),
        log_prob_T=torch.tensor([-1 / 3, -0.0, float("nan")]),
        temperature=0.7,
        finished=bool(k % 2),
        value_T=torch.tensor([0.1, 1e-40, 3.0]) if k % 2 else None,
        reference_log_prob_T=torch.tensor([-0.25, -1e30, -7.0]) if k % 2 else None,
    )
    return replace(text_sample(k), completion=completion)


def assert_same(read: Sample, written: Sample) -> None:
    fields = ("id", "seed", "text", "flaw")
    assert [getattr(read, f) for f in fields] == [getattr(written, f) for f in fields]
    assert read.prompt == written.prompt
    for name in ("image", "latents"):
        assert_same_tensor(getattr(read, name), getattr(written, name))
    if written.completion is None:
        assert read.completion is None
        return
    assert read.completion is not None
    fields = ("temperature", "finished")
    assert [getattr(read.completion, f) for f in fields] == [getattr(written.completion, f) for f in fields]
    for name in ("tokens_T", "log_prob_T", "value_T", "reference_log_prob_T"):
        assert_same_tensor(getattr(read.completion, name), getattr(written.completion, name))


def assert_same_tensor(got: torch.Tensor | None, want: torch.Tensor | None) -> None:
    if got is None or want is None:
        assert got is want
        return
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.contiguous().numpy().tobytes() == want.contiguous().numpy().tobytes()


def part_path(tmp_path, part: int = 0):
    return tmp_path / "samples" / "round-0003" / f"part-{part:05d}.parquet"


def test_samples_come_back_exactly_in_the_order_of_the_parts(tmp_path):
    store = SampleStore(tmp_path)
    samples = [image_sample(0), image_sample(1, height=1, width=1), text_sample(2)]
    store.write_samples(3, 1, samples[2:])
    store.write_samples(3, 0, samples[:2])
    read = store.read_samples(3)
    assert len(read) == 3
    for got, want in zip(read, samples, strict=True):
        assert_same(got, want)
    assert {part: len(group) for part, group in store.parts(3).items()} == {0: 2, 1: 1}


def test_the_tokens_of_texts_come_back_exactly(tmp_path):
    store = SampleStore(tmp_path)
    samples = [completed_sample(0), completed_sample(1), text_sample(2)]
    store.write_samples(3, 0, samples)
    for read, written in zip(store.read_samples(3), samples, strict=True):
        assert_same(read, written)


def test_a_part_without_samples_is_a_part(tmp_path):
    store = SampleStore(tmp_path)
    store.write_samples(3, 0, [])
    assert store.parts(3) == {0: []}


def test_reading_what_was_never_written_gives_nothing(tmp_path):
    store = SampleStore(tmp_path)
    assert store.rounds() == []
    assert store.read_samples(0) == []
    assert store.read_scores(0) == {}
    assert store.read_selection(0) == []
    store.discard_round(0)


def test_the_columns_are_what_other_readers_expect(tmp_path):
    SampleStore(tmp_path).write_samples(3, 0, [image_sample(0), text_sample(1)])
    table = pq.read_table(part_path(tmp_path))
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features == {"image": {"_type": "Image"}}
    assert str(table.schema.field("image").type) == "struct<bytes: binary, path: string>"
    row, text_row = table.to_pylist()
    assert row["prompt_id"] == Prompt(text=row["prompt"]).id
    assert row["round"] == 3
    assert json.loads(row["prompt_metadata"]) == {"tag": "colors", "n": [1, 2.5, None]}
    with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (7, 5))
    latents = np.frombuffer(row["latents"], "<f4").reshape(row["latents_shape"])
    np.testing.assert_array_equal(latents, image_sample(0).latents.numpy())
    assert text_row["image"] is None
    assert text_row["latents_shape"] is None
    assert pq.ParquetFile(part_path(tmp_path)).metadata.row_group(0).column(0).compression == "ZSTD"


def test_the_checksum_is_in_the_format_of_sha256sum(tmp_path):
    SampleStore(tmp_path).write_samples(3, 0, [text_sample(0)])
    path = part_path(tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (path.parent / "part-00000.parquet.sha256").read_text() == f"{digest}  part-00000.parquet\n"


def flip_a_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", flip_a_bit])
@pytest.mark.parametrize("of_checksum", [False, True])
def test_a_damaged_part_is_reported_and_counts_as_missing(tmp_path, caplog, damage, of_checksum):
    store = SampleStore(tmp_path)
    for part in range(3):
        store.write_samples(3, part, [image_sample(part)])
    assert caplog.messages == []
    path = part_path(tmp_path, 1)
    damaged = path.with_name(path.name + ".sha256") if of_checksum else path
    damaged.write_bytes(damage(damaged.read_bytes()))
    assert sorted(store.parts(3)) == [0, 2]
    (message,) = caplog.messages
    assert message.startswith(f"{path} is ignored: ")
    store.write_samples(3, 1, [image_sample(1)])
    assert sorted(store.parts(3)) == [0, 1, 2]


def test_a_part_whose_checksum_was_never_written_counts_as_missing(tmp_path, caplog):
    store = SampleStore(tmp_path)
    store.write_samples(3, 0, [text_sample(0)])
    (part_path(tmp_path).parent / "part-00000.parquet.sha256").unlink()
    assert store.read_samples(3) == []
    assert "part-00000.parquet.sha256 is missing" in caplog.text


def test_strangers_are_ignored(tmp_path, caplog):
    store = SampleStore(tmp_path)
    store.write_samples(3, 0, [text_sample(0)])
    folder = part_path(tmp_path).parent
    (folder / ".part-00001.parquet.0123456789ab.tmp").write_bytes(b"half")
    (folder / "joined.parquet").write_bytes(b"mine")
    (folder / "part-x.parquet").write_bytes(b"mine")
    (tmp_path / "samples" / "round-best").mkdir()
    (tmp_path / "samples" / "round-best" / "part-00000.parquet").write_bytes(b"mine")
    (tmp_path / "samples" / "notes.txt").write_bytes(b"mine")
    assert [sample.id for sample in store.read_samples(3)] == ["0003-text-00"]
    assert store.rounds() == [3]
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_full_disk_leaves_the_part_that_was_there(tmp_path, monkeypatch, name):
    store = SampleStore(tmp_path)
    store.write_samples(3, 0, [text_sample(0)])

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, name, full)
    with pytest.raises(StorageError, match=r"part-00000\.parquet: No space left on device.* needs \d+ bytes"):
        store.write_samples(3, 0, [text_sample(1)])
    assert [sample.id for sample in store.read_samples(3)] == ["0003-text-00"]
    assert sorted(path.name for path in part_path(tmp_path).parent.iterdir()) == [
        "part-00000.parquet",
        "part-00000.parquet.sha256",
    ]


def test_failed_scores_are_null_on_disk_and_nan_when_read_until_there_is_a_value(tmp_path):
    store = SampleStore(tmp_path)
    store.write_scores(3, 0, "clip", ["a", "b", "c"], torch.tensor([0.1, math.nan, 0.0]))
    store.write_scores(3, 1, "clip", ["d"], [math.inf])
    store.write_scores(3, 0, "aesthetic", ["a"], [5.5])
    scores = store.read_scores(3)
    assert math.isnan(scores["clip"].pop("b"))
    assert scores == {"clip": {"a": torch.tensor(0.1).item(), "c": 0.0, "d": math.inf}, "aesthetic": {"a": 5.5}}
    assert (store.next_score_part(3, "clip"), store.next_score_part(3, "other")) == (2, 0)
    store.write_scores(3, 2, "clip", ["b"], [2.5])
    store.write_scores(3, 3, "clip", ["a"], [math.nan])
    assert (store.read_scores(3)["clip"]["a"], store.read_scores(3)["clip"]["b"]) == (torch.tensor(0.1).item(), 2.5)
    table = pq.read_table(tmp_path / "scores" / "round-0003" / "clip-00000.parquet")
    assert table["value"].to_pylist()[1] is None
    assert table.schema.names == ["sample_id", "value"]


@pytest.mark.parametrize("name", ["../../x", "judge:gpt 4/v2", "a-00001", "a_b", "\u00e9%2F"])
def test_any_reward_name_is_safe_as_a_file_and_comes_back(tmp_path, name):
    store = SampleStore(tmp_path)
    store.write_scores(3, 0, name, ["a"], [1.0])
    assert store.read_scores(3) == {name: {"a": 1.0}}
    assert {path.parent for path in tmp_path.rglob("*.parquet")} == {tmp_path / "scores" / "round-0003"}


def test_scores_and_sample_ids_of_different_lengths_are_refused(tmp_path):
    with pytest.raises(ValueError, match="zip"):
        SampleStore(tmp_path).write_scores(3, 0, "clip", ["a", "b"], [1.0])


def test_a_selection_comes_back_in_order_with_repeats(tmp_path, caplog):
    store = SampleStore(tmp_path)
    a, b, c = (text_sample(i) for i in range(3))
    store.write_samples(2, 0, [a, b, c])
    chosen = [Example(sample=b), Example(sample=a, weight=0.25, step=4), Example(sample=b, rejected=c)]
    store.write_selection(3, [*chosen, Example(sample=text_sample(9))], grown=2)
    assert store.read_selection(3) == chosen  # not what is nowhere in the store
    path = tmp_path / "selections" / "round-0003.parquet"
    path.write_bytes(flip_a_bit(path.read_bytes()))
    assert store.read_selection(3) == []
    assert "round-0003.parquet is ignored" in caplog.text


def test_discarding_a_round_removes_it_alone_and_entirely(tmp_path):
    store = SampleStore(tmp_path)
    for round in (2, 3):
        store.write_samples(round, 0, [text_sample(0)])
        store.write_scores(round, 0, "clip", ["a"], [1.0])
        store.write_selection(round, [Example(sample=text_sample(0))], grown=round)
    store.discard_round(3)
    assert store.rounds() == [2]
    assert [path for path in tmp_path.rglob("*0003*")] == []
    assert len(store.read_samples(2)) == 1
    assert store.read_scores(2) == {"clip": {"a": 1.0}}
    assert store.read_selection(2) == [Example(sample=text_sample(0))]
