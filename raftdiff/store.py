"""The scored-sample store of a run: parquet that pandas, duckdb and `datasets` read as it is.

    samples/round-0003/part-00000.parquet     scores/round-0003/<reward>-00000.parquet
    selections/round-0003.parquet

Scores lie apart from the samples, keyed by `sample_id`, so that scoring again never rewrites an image. Beside each
file its SHA-256, in the format of `sha256sum`, is written after it: a file without it, or that differs from it, is
reported and read as if it were not there.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from .checkpoint import remove, write_file
from .types import Completion, Example, Prompt, Sample, Trajectory

logger = logging.getLogger(__name__)

SAMPLES = pa.schema(
    {
        "sample_id": pa.string(),
        "round": pa.int32(),
        "prompt_id": pa.string(),
        "prompt": pa.string(),
        "prompt_metadata": pa.string(),  # JSON
        "seed": pa.uint64(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),  # PNG
        "latents": pa.binary(),  # float32, little-endian, row-major
        "latents_shape": pa.list_(pa.int32()),
        "text": pa.string(),
        "trajectory": pa.struct(
            {
                "states": pa.binary(),  # float32, little-endian, row-major, [T + 1, *latents_shape]
                "times": pa.list_(pa.float32()),
                "log_prob": pa.list_(pa.float32()),
                "noise_level": pa.float64(),
                "guidance_scale": pa.float64(),
            }
        ),
        "completion": pa.struct(
            {
                "tokens": pa.list_(pa.int64()),
                "log_prob": pa.list_(pa.float32()),
                "temperature": pa.float64(),
                "finished": pa.bool_(),
                "value": pa.list_(pa.float32()),
                "reference_log_prob": pa.list_(pa.float32()),
            }
        ),
        "flaw": pa.string(),
    },
    # By this `datasets` knows the column of images; it finds the types of the others by itself.
    metadata={"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})},
)
SCORES = pa.schema({"sample_id": pa.string(), "value": pa.float64()})
SELECTION = pa.schema(
    {
        "sample_id": pa.string(),
        "weight": pa.float64(),
        "rejected_id": pa.string(),
        "step": pa.int32(),
        "grown": pa.int32(),  # the round whose samples these are
    }
)

_ROUND = re.compile(r"round-(\d{4,})")
_PART = re.compile(r"(.+)-(\d{5,})\.parquet")


class SampleStore:
    """The samples, scores and selections of one run. All writing is atomic, and raises StorageError on a full disk;
    writing a part again replaces it. Images, latents, texts and tokens come back exactly as they were."""

    def __init__(self, run_folder: Path) -> None:
        self.samples_folder = run_folder / "samples"
        self.scores_folder = run_folder / "scores"
        self.selections_folder = run_folder / "selections"

    def write_samples(self, round: int, part: int, samples: Sequence[Sample]) -> None:
        """Write one part of a round's samples; image uint8 [3, height, width], latents float32 of any shape."""
        rows = [_to_row(round, sample) for sample in samples]
        write_table(_of_round(self.samples_folder, round) / f"part-{part:05d}.parquet", rows, SAMPLES)

    def parts(self, round: int) -> dict[int, list[Sample]]:
        """Part number to samples, in the order of the numbers; a part that does not verify is absent."""
        tables = read_parts(_of_round(self.samples_folder, round), "part-*.parquet")
        return {part: [_to_sample(row) for row in table.to_pylist()] for _, part, table in tables}

    def read_samples(self, round: int) -> list[Sample]:
        """The samples of every part of a round that verifies, in the order of the parts."""
        return [sample for samples in self.parts(round).values() for sample in samples]

    def rounds(self) -> list[int]:
        """The rounds that have samples, verified or not, in order."""
        folders = {path.parent.name for path in self.samples_folder.glob("round-*/part-*.parquet")}
        return sorted(int(match[1]) for match in map(_ROUND.fullmatch, folders) if match)

    def write_scores(
        self, round: int, part: int, reward_name: str, sample_ids: Sequence[str], values: Iterable[float]
    ) -> None:
        """Write the values that one reward gave to `sample_ids`; NaN, where it failed, is stored as null."""
        path = _of_round(self.scores_folder, round) / f"{quote(reward_name, safe='')}-{part:05d}.parquet"
        rows = [
            {"sample_id": sample_id, "value": None if math.isnan(value) else float(value)}
            for sample_id, value in zip(sample_ids, values, strict=True)
        ]
        write_table(path, rows, SCORES)

    def read_scores(self, round: int) -> dict[str, dict[str, float]]:
        """Reward name to sample id to value; NaN where the reward failed each time, absent where it was not asked."""
        scores: dict[str, dict[str, float]] = {}
        for name, _, table in read_parts(_of_round(self.scores_folder, round), "*.parquet"):
            of_reward = scores.setdefault(unquote(name), {})
            for row in table.to_pylist():
                if row["value"] is not None:
                    of_reward[row["sample_id"]] = row["value"]
                else:
                    of_reward.setdefault(row["sample_id"], math.nan)
        return scores

    def next_score_part(self, round: int, reward_name: str) -> int:
        """The number from which on no part of this reward's scores has been written yet."""
        paths = _of_round(self.scores_folder, round).glob(f"{quote(reward_name, safe='')}-*.parquet")
        taken = [match for match in map(_PART.fullmatch, (path.name for path in paths)) if match]
        return 1 + max((int(match[2]) for match in taken if unquote(match[1]) == reward_name), default=-1)

    def write_selection(self, round: int, examples: Sequence[Example], *, grown: int) -> None:
        """Write what a round trains on, in order, of the samples of the round `grown`."""
        rows = [
            {
                "sample_id": example.sample.id,
                "weight": float(example.weight),
                "rejected_id": example.rejected.id if example.rejected else None,
                "step": example.step,
                "grown": grown,
            }
            for example in examples
        ]
        write_table(self._selection(round), rows, SELECTION)

    def read_selection(self, round: int) -> list[Example]:
        """What a round trained on as it was written, less what is not of the store's own samples; nothing where it
        does not verify."""
        path = self._selection(round)
        table = _read_table(path) if path.exists() else None
        rows = [] if table is None else table.to_pylist()
        samples = {s.id: s for grown in {row["grown"] for row in rows} for s in self.read_samples(grown)}
        return [
            Example(
                sample=samples[row["sample_id"]],
                weight=row["weight"],
                rejected=samples[row["rejected_id"]] if row["rejected_id"] else None,
                step=row["step"],
            )
            for row in rows
            if row["sample_id"] in samples and (row["rejected_id"] or row["sample_id"]) in samples
        ]

    def discard_round(self, round: int) -> None:
        """Remove all that is stored of a round, what depends on the samples first."""
        remove(self._selection(round))
        remove(_checksum(self._selection(round)))
        remove(_of_round(self.scores_folder, round))
        remove(_of_round(self.samples_folder, round))

    def _selection(self, round: int) -> Path:
        return self.selections_folder / f"round-{round:04d}.parquet"


def _of_round(folder: Path, round: int) -> Path:
    return folder / f"round-{round:04d}"


def _checksum(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Publish rows as one parquet file, with its SHA-256 beside it."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    write_file(path, data)
    write_file(_checksum(path), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode())


def _read_table(path: Path) -> pa.Table | None:
    """The table, parsed from the very bytes whose hash was checked; None, with a warning, if they do not verify."""
    checksum = _checksum(path)
    if not checksum.is_file():
        logger.warning("%s is ignored: %s is missing, so it may be incomplete", path, checksum.name)
        return None
    data = path.read_bytes()
    if checksum.read_bytes() != f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode():
        logger.warning("%s is ignored: its %d bytes are not those whose SHA-256 was stored", path, len(data))
        return None
    return pq.read_table(pa.BufferReader(data))


def read_parts(folder: Path, pattern: str) -> list[tuple[str, int, pa.Table]]:
    """Name, part number and table of each part of a folder that verifies, in this order."""
    matches = [(_PART.fullmatch(path.name), path) for path in folder.glob(pattern)]
    parts = sorted((match[1], int(match[2]), path) for match, path in matches if match)
    return [(name, part, table) for name, part, path in parts if (table := _read_table(path)) is not None]


def _to_row(round: int, sample: Sample) -> dict[str, Any]:
    image, latents = sample.image, sample.latents
    assert image is None or image.dtype == torch.uint8
    assert latents is None or latents.dtype == torch.float32
    return {
        "sample_id": sample.id,
        "round": round,
        "prompt_id": sample.prompt.id,
        "prompt": sample.prompt.text,
        "prompt_metadata": json.dumps(dict(sample.prompt.metadata), ensure_ascii=False),
        "seed": sample.seed,
        "image": None if image is None else {"bytes": _to_png(image), "path": f"{sample.id}.png"},
        "latents": None if latents is None else _to_bytes(latents),
        "latents_shape": None if latents is None else list(latents.shape),
        "text": sample.text,
        "trajectory": None if sample.trajectory is None else _to_struct(sample.trajectory),
        "completion": None if sample.completion is None else _completion_to_struct(sample.completion),
        "flaw": sample.flaw,
    }


def _to_struct(trajectory: Trajectory) -> dict[str, Any]:
    assert trajectory.states.dtype == torch.float32
    return {
        "states": _to_bytes(trajectory.states),
        "times": trajectory.times.tolist(),
        "log_prob": trajectory.log_prob_T.tolist(),
        "noise_level": trajectory.noise_level,
        "guidance_scale": trajectory.guidance_scale,
    }


def _completion_to_struct(completion: Completion) -> dict[str, Any]:
    return {
        "tokens": completion.tokens_T.tolist(),
        "log_prob": completion.log_prob_T.tolist(),
        "temperature": completion.temperature,
        "finished": completion.finished,
        "value": _listed(completion.value_T),
        "reference_log_prob": _listed(completion.reference_log_prob_T),
    }


def _to_completion(row: dict[str, Any]) -> Completion:
    return Completion(
        tokens_T=torch.tensor(row["tokens"], dtype=torch.int64),
        log_prob_T=torch.tensor(row["log_prob"], dtype=torch.float32),
        temperature=row["temperature"],
        finished=row["finished"],
        value_T=_floats(row["value"]),
        reference_log_prob_T=_floats(row["reference_log_prob"]),
    )


def _listed(values: torch.Tensor | None) -> list[float] | None:
    return None if values is None else values.tolist()


def _floats(values: list[float] | None) -> torch.Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float32)


def _to_sample(row: dict[str, Any]) -> Sample:
    latents = trajectory = None
    if row["latents"] is not None:
        latents = _from_bytes(row["latents"], row["latents_shape"])
    if (steps := row["trajectory"]) is not None:
        trajectory = Trajectory(
            states=_from_bytes(steps["states"], [len(steps["times"]), *row["latents_shape"]]),
            times=torch.tensor(steps["times"]),
            log_prob_T=torch.tensor(steps["log_prob"]),
            noise_level=steps["noise_level"],
            guidance_scale=steps["guidance_scale"],
        )
    return Sample(
        id=row["sample_id"],
        prompt=Prompt(text=row["prompt"], metadata=json.loads(row["prompt_metadata"])),
        seed=row["seed"],
        image=None if row["image"] is None else _from_png(row["image"]["bytes"]),
        latents=latents,
        text=row["text"],
        completion=_to_completion(row["completion"]) if row.get("completion") else None,  # older files have no column
        trajectory=trajectory,
        flaw=row["flaw"],
    )


def _to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().astype("<f4", copy=False).tobytes()


def _from_bytes(data: bytes, shape: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32)).view(list(shape))


def _to_png(image: torch.Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _from_png(data: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
