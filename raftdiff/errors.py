"""Errors for the person who reads them: what happened, to which file or value, what to do next.

Each is a `RaftdiffError` and the standard-library error that fits, so both `except` clauses work.
"""


class RaftdiffError(Exception):
    """Anything this package refuses or cannot go on from. `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(RaftdiffError, ValueError):
    """A setting, a name or a combination of settings that cannot be run."""

    exit_code = 2


class DataError(RaftdiffError, ValueError):
    """A prompt file, an image folder or a stored sample that cannot be read as what it should be."""

    exit_code = 2


class WeightsError(RaftdiffError, ValueError):
    """Weights that are missing, incomplete, or made for another model."""


class MissingExtraError(RaftdiffError, ImportError):
    """An optional package is needed; the message says how to install it."""


class RunLockedError(RaftdiffError, RuntimeError):
    """Another process is writing to the run folder."""


class ResumeError(RaftdiffError, RuntimeError):
    """A run folder that cannot be resumed as asked."""


class ScoringError(RaftdiffError, RuntimeError):
    """Too many samples could not be scored."""


class EndpointError(RaftdiffError, ConnectionError):
    """A server that does not answer."""


class TrainingError(RaftdiffError, ArithmeticError):
    """Training produced values that are not finite and cannot go on."""


class StorageError(RaftdiffError, OSError):
    """A file could not be written; the message names it and the bytes it needs."""
