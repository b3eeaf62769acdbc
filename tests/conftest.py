"""No test waits for a network, and none competes for the cores of a small machine."""

from __future__ import annotations

import os
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}

import pytest
import torch

torch.set_num_threads(1)

PUBLISHED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def published_data() -> Path:
    """The folder of published weights and prompts that are not part of the repository."""
    if not PUBLISHED_DATA.is_dir():
        pytest.skip(f"the published data is not on this machine: no folder {PUBLISHED_DATA}")
    return PUBLISHED_DATA
