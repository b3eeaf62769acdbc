"""Batches that shrink where the device runs out of memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache

from .errors import ConfigError

logger = logging.getLogger(__name__)

Row = TypeVar("Row")


class Batches:
    """Work on rows, `size` of them at once; where that does not fit, half as many from then on.

    Args:
        size: rows at once, at first; the attribute `size` is what it has come to.
        what: the rows' name and setting in messages, such as `images at once (sampling.batch_size)`.
        remedy: what to do where a single row does not fit.
        fixed: whether the size must stay, because other processes make the same batches.
    """

    def __init__(self, size: int, what: str, remedy: str, *, fixed: bool = False):
        self.size = size
        self._what, self._remedy, self._fixed = what, remedy, fixed

    def run(self, rows: int, call: Callable[[slice], Sequence[Row]]) -> list[Row]:
        """What `call` returns for consecutive slices of `range(rows)`, joined: one result for each row.

        Raises:
            ConfigError: the device ran out of memory with one row, or with a fixed size.
        """
        results: list[Row] = []
        while len(results) < rows:
            batch = slice(len(results), min(rows, len(results) + self.size))
            made = self._attempt(call, batch)
            if made is None:
                self.size = halved(batch.stop - batch.start, self._what, self._remedy, fixed=self._fixed)
            else:
                results += made
        return results

    @staticmethod
    def _attempt(call: Callable[[slice], Sequence[Row]], batch: slice) -> Sequence[Row] | None:
        try:
            return call(batch)
        except torch.OutOfMemoryError:
            return None  # the exception, which keeps the tensors of the attempt alive, ends here


def halved(tried: int, what: str, remedy: str, *, fixed: bool = False) -> int:
    """Half as many rows as did not fit, with a line in the log; the arguments are those of `Batches`.

    Raises:
        ConfigError: it was one row, or the size is fixed.
    """
    if tried == 1 or fixed:
        fewer = "set fewer, or " if tried > 1 else ""
        raise ConfigError(f"out of memory with {tried} of the {what}; {fewer}{remedy}")
    clear_device_cache(garbage_collection=True)
    logger.warning("out of memory with %d %s; going on with %d", tried, what, tried // 2)
    return tried // 2
