"""Every claim, one after the other on each core; finished runs are reused, so this can be broken off and begun again.

python -m benchmarks.claims
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.common import arguments, console

# Those that share runs stand in one line, so that no two processes make the same run; the longest lines come first.
LINES = (
    ("m4", "m1t", "m2t", "m6t", "m3t", "m5t"),
    ("r1", "r3"),
    ("s1", "s2", "s6", "s4", "s5"),
    ("d4", "d5", "d6"),
    ("m1", "m2", "m6", "m3", "m5"),
    ("r5",),
    ("r2", "r3t", "ppo"),
    ("s2t", "s5t", "s3", "s4t"),
    ("r6",),
    ("d3",),
    ("r4", "d1", "d2"),
)


def verdict_of(name: str, output: str) -> str:
    """A claim's verdict, the last line it printed; the whole is kept beside the runs."""
    command = [sys.executable, "-m", f"benchmarks.claims.{name}", "--output", output]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    Path(output).mkdir(parents=True, exist_ok=True)
    (Path(output) / f"claim-{name}.log").write_text(said.stdout + said.stderr, encoding="utf-8")
    if said.returncode:
        return f"{name.upper()}: failed. See {output}/claim-{name}.log"
    return said.stdout.rstrip().splitlines()[-1]


def main() -> None:
    options = arguments(__doc__ or "", processes=os.cpu_count() or 1)
    verdicts: dict[str, str] = {}

    def work(line: tuple[str, ...]) -> None:
        for name in line:
            verdicts[name] = verdict_of(name, options.output)
            console.print(verdicts[name], highlight=False, markup=False, soft_wrap=True)

    with ThreadPoolExecutor(options.processes) as pool:
        list(pool.map(work, LINES))
    console.print(f"{len(verdicts)} claims; the tables are in {options.output}/claim-*.log")


if __name__ == "__main__":
    main()
