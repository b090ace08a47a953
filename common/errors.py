"""Everything that Seedbed refuses, as one tree.

    SeedbedError                    1   anything below; never raised itself
    ├── ConfigError                 3   a federation file or option that makes no sense
    ├── DataError                   4   task data that cannot be read or is not what it claims
    ├── AdapterError                5   an adapter that is malformed or does not fit
    │   ├── AdapterFormatError      5   not safetensors, truncated, missing or misshapen tensors
    │   ├── AdapterMismatchError    5   another base model, rank, target set or digest
    │   └── NonFiniteError          5   NaN or infinity where numbers belong
    ├── ModelError                  6   a base model that cannot be found, fetched or verified
    ├── StorageError                7   no space, no permission, an output that is already there
    ├── TrainingError               8   a training process that crashed, ran out of memory or diverged
    ├── QuorumError                 9   too few participants finished a stage
    ├── ResumeError                10   a run directory that cannot be continued
    └── EnvironmentFailure         11   a port, Ray or another part of the machine that fails

The number is the process's exit code (2 is a usage error, 130 an interrupt). Each error is one sentence that says what is
wrong with which thing, and a next step in `hint`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class SeedbedError(Exception):
    """Base of every error that a user can cause or mend.

    Args:
        message: one sentence: what is wrong, with the values expected and got.
        hint: what to do next, as one sentence.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(SeedbedError):
    exit_code = 3


class DataError(SeedbedError):
    exit_code = 4


class AdapterError(SeedbedError):
    exit_code = 5


class AdapterFormatError(AdapterError):
    pass


class AdapterMismatchError(AdapterError):
    pass


class NonFiniteError(AdapterError):
    pass


class ModelError(SeedbedError):
    exit_code = 6


class StorageError(SeedbedError):
    exit_code = 7


class TrainingError(SeedbedError):
    exit_code = 8


class QuorumError(SeedbedError):
    exit_code = 9


class ResumeError(SeedbedError):
    exit_code = 10


class EnvironmentFailure(SeedbedError):
    exit_code = 11


def nearest(name: str, choices: Iterable[str]) -> str:
    """Say which of `choices` an unknown `name` was probably meant to be.

    Returns:
        ``"Did you mean 'x'?"`` where one is close, else the whole list of choices.
    """
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"Did you mean '{close[0]}'?" if close else f"Choose one of: {', '.join(known)}."
