"""The picture of the README: the same prompts and seeds through the base (upper row) and the aligned model (lower).

python docs/make_picture.py runs/demo docs/images/demo.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from raftdiff.report import image_grid, read_metrics
from raftdiff.store import SampleStore

COLUMNS = 12


def main(run_folder: str, target: str) -> None:
    evaluation = next(r.evaluations[0] for r in read_metrics(Path(run_folder) / "metrics.jsonl"))
    store = SampleStore(Path(run_folder) / "evaluation" / f"guidance-{evaluation.guidance_scale:g}")
    rows = [store.read_samples(round) for round in (store.rounds()[0], store.rounds()[-1])]
    per_prompt = sum(s.prompt.id == rows[0][0].prompt.id for s in rows[0])
    images = [s.image for row in rows for s in row[: COLUMNS * per_prompt : per_prompt] if s.image is not None]
    image_grid(images, COLUMNS, scale=3).save(target, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
