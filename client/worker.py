"""The training process: ``python -m seedbed.client.worker SPEC.json``, one for each rank.

Standard output carries nothing but progress, one JSON object a line:

    {"event": "start", "steps", "examples", "ranks"}
    {"event": "resumed", "step", "steps"}                 it goes on from its checkpoint, after that step
    {"event": "note", "message"}                          a checkpoint that could not be used or written, and why
    {"event": "step", "step", "steps", "loss", "lr", "tokens", "seconds"}
    {"event": "done", "digest", "metrics"}
    {"event": "error", "type", "message", "hint"}         and an exit code that is not 0

What libraries print goes to standard error. With ``SEEDBED_WATCH_STDIN=1`` the process ends, with its whole process
group, as soon as its standard input closes: that is when whoever started it is gone, even by kill -9.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from seedbed.common.errors import SeedbedError, StorageError, TrainingError

WATCH = "SEEDBED_WATCH_STDIN"
_MEMORY_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
MEMORY_HINT = (
    "Raise training.accumulation or lower training.max_tokens so that one pass holds less, or train with DeepSpeed's "
    "zero_stage 3 and offload."
)


def main(arguments: list[str]) -> int:
    """Train what a spec file describes; see the module's description.

    Returns:
        the exit code, 0 or that of the error.
    """
    if os.environ.get(WATCH) == "1":
        threading.Thread(target=_end_with_parent, daemon=True).start()
    emit = _events(_claim_stdout())
    try:
        _work(Path(arguments[0]), emit)
    except BaseException as error:
        if not isinstance(error, SeedbedError):
            traceback.print_exc()
        told = as_seedbed_error(error)
        emit({"event": "error", "type": type(told).__name__, "message": told.message, "hint": told.hint})
        return told.exit_code
    return 0


def _work(spec_file: Path, emit: Callable[[dict[str, Any]], None]) -> None:
    from seedbed.client.outcome import write_result
    from seedbed.client.privacy import not_an_adapter, release
    from seedbed.client.spec import TrainSpec
    from seedbed.client.training import train

    main_rank = int(os.environ.get("RANK", "0")) == 0
    spec = TrainSpec.model_validate_json(spec_file.read_text(encoding="utf-8"))
    if spec.output.exists():  # said now rather than after hours of training
        raise StorageError(f"{spec.output} is already there", "Choose another output directory.")
    if spec.privacy is not None and spec.kind in ("gate", "router", "molora"):
        raise not_an_adapter()
    trained = train(spec, emit if main_rank else _ignore)
    if not main_rank:
        return
    released, clipped = release(spec, trained)
    if spec.privacy is not None:
        emit(
            {"event": "note", "message": f"the update was {'' if clipped else 'not '}clipped to {spec.privacy.clip:g}"}
        )
    digest = write_result(spec, released)
    emit({"event": "done", "digest": digest, "metrics": trained.metrics})


def _ignore(_event: dict[str, Any]) -> None:
    """Ranks other than the first stay silent, unless they fail."""


def as_seedbed_error(error: BaseException) -> SeedbedError:
    """What went wrong, in one sentence: our own errors as they are, others as a `TrainingError`."""
    if isinstance(error, SeedbedError):
        return error
    text = str(error).strip()
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in _MEMORY_SIGNS):
        return TrainingError("the training process ran out of memory", MEMORY_HINT)
    if isinstance(error, KeyboardInterrupt):
        return TrainingError("the training process was interrupted", "Start it again.")
    reason = f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
    return TrainingError(f"the training process failed: {reason}", "The job's log holds the whole traceback.")


def _claim_stdout() -> TextIO:
    """Keep standard output for events; whatever else prints there, even from C++, goes to standard error."""
    sys.stdout.flush()
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


def _events(stream: TextIO) -> Callable[[dict[str, Any]], None]:
    def emit(event: dict[str, Any]) -> None:
        # One write a line, so that the lines of several ranks do not mix.
        stream.write(json.dumps(event) + "\n")
        stream.flush()

    return emit


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
