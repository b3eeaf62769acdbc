"""Offline runs that several of DPO's claims share: the same preferences, each run made once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.common import configured, run
from examples.preferences_from_run import preferences, write
from raftdiff.rounds import Result

METRICS = ("reward", "shapes-oracle", "shapes-rating", "diversity")
BETA = 100.0


def pairs(output: str) -> Path:
    """The best and the worst of 8 samples of the base for each of 144 prompts, as `data.path` takes preferences."""
    folder = Path(output) / "preferences"
    if not (folder / "metadata.jsonl").exists():
        shutil.rmtree(folder, ignore_errors=True)
        settings = {"seed": 1, "rounds": 1, "prompts.per_round": None, "training.steps": 1}
        write(preferences(run(configured("claims", output, "dpo-pairs", settings)).folder), folder)
    return folder


def winners(output: str) -> Path:
    """The preferred side of the pairs alone, with captions."""
    folder = pairs(output)
    alone = Path(output) / "winners"
    if not (alone / "metadata.jsonl").exists():
        shutil.rmtree(alone, ignore_errors=True)
        shutil.copytree(folder, alone)
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
        lines = [json.dumps({"file_name": row["chosen"], "text": row["text"]}) for row in rows]
        (alone / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return alone


def offline(output: str, beta: float = BETA) -> Result:
    """DPO on the pairs: two rounds of 64 steps."""
    options = {"source": "offline", "beta": beta}
    return _trained(output, f"dpo-beta{beta:g}", {"name": "dpo", "options": options}, pairs(output))


def sft(output: str) -> Result:
    """SFT on the winners, at the same dose."""
    return _trained(output, "sft-winners", {"name": "sft"}, winners(output))


def _trained(output: str, name: str, algorithm: dict[str, Any], data: Path) -> Result:
    settings = {"seed": 1, "algorithm": algorithm, "data": {"path": str(data)}, "evaluation.every": 1}
    return run(configured("claims", output, name, settings))
