"""S5 (ReST, arXiv 2308.08998, section 3): leaving the original data D out of the mixture increases drift.

D is 256 rendered captions of the embedded world.

    python -m benchmarks.claims.s5
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.claims.rest_runs import METRICS, rest
from benchmarks.common import arguments, drift, drift_difference, gains_table, show, verdict
from raftdiff.shapes.captions import random_caption
from raftdiff.shapes.scenes import random_scene, render


def render_data(folder: Path, count: int) -> str:
    """Captions with true pictures, as `data.path` takes them."""
    if not (folder / "metadata.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng, lines = np.random.default_rng(5), []
        for i in range(count):
            caption = random_caption(rng)
            Image.fromarray(render(random_scene(caption, rng))).save(folder / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "text": str(caption)}))
        (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


def main() -> None:
    options = arguments(__doc__ or "", count=256)
    path = render_data(Path(options.output) / "rendered", options.count)
    thresholds = (0.5, 0.75, 0.875)
    results = {
        "with D": rest(options.output, "with-data", grows=1, thresholds=thresholds, data={"path": path}),
        "without D": rest(options.output, "without-data", grows=1, thresholds=thresholds),
    }
    gains_table("One Grow, three Improve steps", results, METRICS)
    more = drift_difference(results["without D"], results["with D"])
    means = ", ".join(f"{name} {drift(result).mean():.4f}" for name, result in results.items())
    verdict("S5", more.low > 0, f"drift: {means}; without D it is larger by {show(more, 4)}")


if __name__ == "__main__":
    main()
