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


def pairs(output: str, samples: int) -> Path:
    """The best and the worst of some samples of the base for each of 144 prompts, as `data.path` takes preferences."""
    folder = Path(output) / f"preferences-{samples}"
    if not (folder / "metadata.jsonl").exists():
        shutil.rmtree(folder, ignore_errors=True)
        settings = {"seed": 1, "rounds": 1, "prompts.per_round": None, "training.steps": 1}
        settings["sampling.samples_per_prompt"] = samples
        write(preferences(run(configured("claims", output, f"dpo-pairs-{samples}", settings)).folder), folder)
    return folder


def winners(output: str, samples: int) -> Path:
    """The preferred side of the pairs alone, with captions."""
    folder = pairs(output, samples)
    alone = Path(output) / f"winners-{samples}"
    if not (alone / "metadata.jsonl").exists():
        shutil.rmtree(alone, ignore_errors=True)
        shutil.copytree(folder, alone)
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
        lines = [json.dumps({"file_name": row["chosen"], "text": row["text"]}) for row in rows]
        (alone / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return alone


def offline(output: str, beta: float = BETA, samples: int = 8) -> Result:
    """DPO on the pairs: two rounds of 64 steps."""
    options = {"source": "offline", "beta": beta}
    return _trained(output, f"dpo-{samples}-beta{beta:g}", {"name": "dpo", "options": options}, pairs(output, samples))


def sft(output: str, samples: int) -> Result:
    """SFT on the winners, at the same dose."""
    return _trained(output, f"sft-winners-{samples}", {"name": "sft"}, winners(output, samples))


def _trained(output: str, name: str, algorithm: dict[str, Any], data: Path) -> Result:
    settings = {"seed": 1, "algorithm": algorithm, "data": {"path": str(data)}, "evaluation.every": 1}
    return run(configured("claims", output, name, settings))
