"""The completion of a sample, as scorers take it."""

from __future__ import annotations

from raftdiff.errors import DataError
from raftdiff.types import Sample


def completion(sample: Sample) -> str:
    """What the model wrote, without the prompt.

    Raises:
        DataError: the sample holds no text.
    """
    if sample.text is None:
        raise DataError(f"sample {sample.id} holds no text; this reward judges texts")
    return sample.text
