"""People's votes, in one sqlite file: a pair is issued with a token, and a token takes one vote.

What `record` has returned is on the disk, whatever is killed afterwards; several processes may write.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from raftdiff.checkpoint import write_file
from raftdiff.errors import DataError, RaftdiffError, StorageError

Choice = Literal["left", "right", "tie", "bad"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
LABELS = {"left": 1.0, "right": 0.0, "tie": 0.5, "bad": 0.5}  # of Pick-a-Pic's label_0
KEPT_OPEN = 500  # pairs without a vote; the oldest beyond them are forgotten

SCHEMA = """
CREATE TABLE IF NOT EXISTS pairs (
    token TEXT PRIMARY KEY, issued REAL NOT NULL, prompt TEXT NOT NULL, seed INTEGER NOT NULL, settings TEXT NOT NULL,
    left_model TEXT NOT NULL, right_model TEXT NOT NULL, left_scores TEXT NOT NULL, right_scores TEXT NOT NULL,
    left_png BLOB NOT NULL, right_png BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS votes (
    token TEXT PRIMARY KEY REFERENCES pairs (token),
    choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'tie', 'bad')), cast_at REAL NOT NULL
);
"""
PREFERENCES = pa.schema(
    {
        "caption": pa.string(),
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),
        "model_0": pa.string(),
        "model_1": pa.string(),
        "seed": pa.int64(),
    }
)


class VoteRefused(RaftdiffError):
    """A vote that does not count: the message says why."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One picture of a pair: the model by name and hash of its weights, its scores, the PNG."""

    model: str
    scores: Mapping[str, float]
    png: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two pictures for one prompt from the same seed."""

    token: str
    prompt: str
    seed: int
    left: Side
    right: Side


@dataclass(frozen=True, kw_only=True)
class Vote:
    """A vote with what it was about, without the pictures.

    Vote(prompt="a red circle", left="base@1f00fe3b", right="demo@92d5b0dc", choice="right", left_scores={"clip": 61.0},
         right_scores={"clip": 78.1})
    """

    prompt: str
    left: str
    right: str
    choice: Choice
    left_scores: Mapping[str, float]
    right_scores: Mapping[str, float]


class Votes:
    """The pairs that were issued and the votes on them.

    Args:
        path: the sqlite file; it is made where there is none.

    Raises:
        StorageError: it cannot be opened as one.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._connected() as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(
                f"{path}: the votes cannot be kept there ({error}); move the file or mend its folder"
            ) from error

    def issue(self, prompt: str, seed: int, left: Side, right: Side, settings: Mapping[str, Any] | None = None) -> Pair:
        """Keep a pair and give it a token that nobody can guess."""
        pair = Pair(token=secrets.token_urlsafe(18), prompt=prompt, seed=seed, left=left, right=right)
        with self._connected() as connection:
            connection.execute(
                "DELETE FROM pairs WHERE token IN (SELECT token FROM pairs "
                "WHERE token NOT IN (SELECT token FROM votes) ORDER BY issued DESC LIMIT -1 OFFSET ?)",
                (KEPT_OPEN - 1,),
            )
            connection.execute(
                "INSERT INTO pairs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(pair.token, time.time(), prompt, seed, json.dumps(dict(settings or {}))),
                    *(left.model, right.model, json.dumps(dict(left.scores)), json.dumps(dict(right.scores))),
                    *(left.png, right.png),
                ),
            )
        return pair

    def record(self, token: str, choice: str) -> Vote:
        """Count a vote, durably. The same vote again changes nothing and is no error.

        Raises:
            VoteRefused: a token that was not issued here, one that has another vote already, or no such choice.
        """
        if choice not in CHOICES:
            raise VoteRefused(f"a vote is one of {', '.join(CHOICES)}")
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")  # the pair shall not be forgotten before its vote is counted
            row = connection.execute(
                "SELECT prompt, left_model, right_model, left_scores, right_scores FROM pairs WHERE token = ?", (token,)
            ).fetchone()
            if row is None:
                raise VoteRefused("this pair was not issued here or is too old; ask for the next one")
            connection.execute("INSERT OR IGNORE INTO votes VALUES (?, ?, ?)", (token, choice, time.time()))
            (counted,) = connection.execute("SELECT choice FROM votes WHERE token = ?", (token,)).fetchone()
        if counted != choice:
            raise VoteRefused("this pair has a vote already; ask for the next one")
        return _vote((*row, choice))

    def all(self) -> list[Vote]:
        """Every vote, in the order of casting."""
        with self._connected() as connection:
            rows = connection.execute(
                "SELECT prompt, left_model, right_model, left_scores, right_scores, choice FROM votes "
                "JOIN pairs USING (token) ORDER BY cast_at, token"
            ).fetchall()
        return [_vote(row) for row in rows]

    def tokens(self) -> set[str]:
        """The tokens that have a vote."""
        with self._connected() as connection:
            return {token for (token,) in connection.execute("SELECT token FROM votes")}

    def export(self, path: Path) -> int:
        """Write the votes as `raftdiff train` reads preferences for DPO: parquet with the columns of Pick-a-Pic,
        pictures as PNG, `label_0` 0.5 for "tie" and "both bad". Returns how many have a winner.

        Raises:
            DataError: no vote has a winner.
        """
        sink, decided = pa.BufferOutputStream(), 0
        with self._connected() as connection, pq.ParquetWriter(sink, PREFERENCES, compression="zstd") as writer:
            rows = connection.execute(
                "SELECT prompt, left_png, right_png, choice, left_model, right_model, seed FROM votes "
                "JOIN pairs USING (token) ORDER BY cast_at, token"
            )
            while batch := rows.fetchmany(64):
                labelled = [(*row[:3], LABELS[row[3]], *row[4:]) for row in batch]
                decided += sum(row[3] in ("left", "right") for row in batch)
                columns = [
                    pa.array(c, field.type) for c, field in zip(zip(*labelled, strict=True), PREFERENCES, strict=True)
                ]
                writer.write_batch(pa.record_batch(columns, schema=PREFERENCES))
        if not decided:
            raise DataError("no vote has a winner yet: there is no preference to export")
        write_file(path, sink.getvalue().to_pybytes())
        return decided

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction, which is on the disk when the block ends. Each call has its own, so that
        threads and processes share nothing but the file."""
        with closing(sqlite3.connect(self.path, timeout=30)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            with connection:
                yield connection


def _vote(row: tuple[Any, ...]) -> Vote:
    prompt, left, right, left_scores, right_scores, choice = row
    return Vote(
        prompt=prompt,
        left=left,
        right=right,
        choice=choice,
        left_scores=json.loads(left_scores),
        right_scores=json.loads(right_scores),
    )
