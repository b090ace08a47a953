"""How a refusal travels: a gRPC status that programs understand, and beside it the error and the next step for people."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from seedbed.common.errors import AdapterError, EnvironmentFailure, SeedbedError, StorageError
from seedbed.common.registry import ERROR_KEY, HINT_KEY

_LOG = logging.getLogger("seedbed.registry")


class Refusal(SeedbedError):
    """A refusal with a status of its own.

    Args:
        code: the gRPC status.
        kind: what it is to whoever asked.
    """

    def __init__(self, code: grpc.StatusCode, kind: type[SeedbedError], message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.code = code
        self.kind = kind


class Busy(SeedbedError):
    """Not now: whoever asked should ask again."""


@contextmanager
def refusing(context: Any) -> Iterator[None]:
    """End a call with the status of any error of the body; a defect is logged and told without its insides."""
    try:
        yield
    except SeedbedError as error:
        _refuse(context, error)
    except Exception:
        if not context.is_active():  # the peer has gone: nobody is left to tell
            raise
        _LOG.exception("a call failed")
        context.abort(grpc.StatusCode.INTERNAL, "the registry failed at this call; its log says why")


def _refuse(context: Any, error: SeedbedError) -> None:
    if isinstance(error, Busy):
        context.abort(grpc.StatusCode.UNAVAILABLE, error.message)
    code, kind = _status(error)
    metadata = ((ERROR_KEY, kind.__name__.encode()), (HINT_KEY, error.hint.encode()))
    context.set_trailing_metadata(metadata)
    _LOG.info("refused: %s", error.message)
    context.abort(code, error.message)


def _status(error: SeedbedError) -> tuple[grpc.StatusCode, type[SeedbedError]]:
    if isinstance(error, Refusal):
        return error.code, error.kind
    if isinstance(error, AdapterError):
        return grpc.StatusCode.INVALID_ARGUMENT, type(error)
    if isinstance(error, StorageError):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, StorageError
    return grpc.StatusCode.FAILED_PRECONDITION, type(error) if type(error) is not SeedbedError else EnvironmentFailure
