"""A folder of tiny runs for the app to open on, and the app itself, served on a free port."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tiny_runs import tiny_config, tiny_pipeline

from raftdiff.build import build
from raftdiff.config import RunConfig
from raftdiff.rounds import run_rounds

REWARDS: list[dict[str, Any]] = [{"name": "jpeg"}]
WATCHED: list[dict[str, Any]] = [{"name": "shapes-rating"}]


def save_model(folder: Path) -> Path:
    """The tiny pipeline as a folder that diffusers loads."""
    tiny_pipeline().save_pretrained(folder)
    return folder


def run_config(runs: Path, name: str, model: Path, **settings: Any) -> RunConfig:
    """A run of two rounds on the model at a path, each evaluated; it watches a reward that it does not train on."""
    return tiny_config(
        runs,
        name=name,
        model={"path": str(model)},
        rewards=REWARDS,
        **{"evaluation": {"seeds_per_prompt": 1, "rewards": WATCHED}} | settings,
    )


def make_run(runs: Path, name: str, model: Path, **settings: Any) -> Path:
    """A finished run."""
    config = run_config(runs, name, model, **settings)
    run_rounds(build(config))
    return config.folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(runs: Path, **settings: Any) -> Iterator[str]:
    """The app's address while it runs."""
    from raftdiff.app.server import AppConfig, start

    with ExitStack() as stack:
        _, url = start(AppConfig(runs=runs, port=free_port(), **settings), stack, say=lambda text: None)
        yield url
