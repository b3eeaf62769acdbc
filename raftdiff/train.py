"""`accelerate launch -m raftdiff.train run.yaml`: the same as `raftdiff train`, for several processes."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
