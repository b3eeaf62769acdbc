"""The embedded world: captions, scenes, their rendering, and the exact judge of what a picture shows."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""The embedded model: `pipeline` (diffusers), `clip` (open_clip), `aesthetic` (a head in LAION's format)."""
