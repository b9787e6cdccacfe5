"""How a rank that a launcher started ends: its own error first, and no waiting for the lost.

A rank that fails leaves at once, without the farewell of its process group, which would wait for
the others; they then lose contact, or the launcher tells them to end.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

from hybridzoo import launcher
from hybridzoo.parallel import groups

# longer than torchrun (0.1 s) and deepspeed (1 s) take to see that a rank ended, and to say so
PATIENCE_S = 3.0
_LOST = "lost contact with another rank; its error comes first"
_SILENT = "no answer from another rank within parallel.timeout_s; it hangs, or is still at work"


def run(
    command: Callable[[], object],
    sentence: Callable[[Exception], str],
    mistakes: tuple[type[Exception], ...],
    *,
    is_debug: bool = False,
) -> NoReturn:
    """Run a rank's command and end its process: the first error of all ranks' leads the console.

    That of rank 0, or `rank 3: ...` at once; what follows from a lost rank, or what rank 0 surely
    says too, after a moment in which the launcher may end it.

    Args:
        command: returns the exit code, or nothing.
        sentence: a mistake in words.
        mistakes: errors that a user's input causes: exit code 2, and no traceback.
        is_debug: show tracebacks of those too.
    """

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, mistakes):
            _leave(sentence(error), 2, error if is_debug else None)
        elif isinstance(error, KeyboardInterrupt):
            _exit(130)
        elif _is_of_contact(error):
            text = _contact(error, is_told=_is_told(PATIENCE_S))
            _say(text, error if is_debug else None)
            _exit(1)
        _leave(f"{type(error).__name__}: {error}", 1, error)

    # not a handler: an error that nobody expects comes here too, and the interpreter's own farewell
    # would wait for the other ranks
    sys.excepthook = end
    try:
        code = command()
    except SystemExit as asked:
        code = asked.code
    finally:
        # typer and torch.distributed put their own in its place
        sys.excepthook = end
    groups.finish()
    if code is None or isinstance(code, int):
        # all is done: threads of C++ that the interpreter's end does not wait for can abort it
        _exit(code or 0)
    sys.exit(str(code))


def lose() -> NoReturn:
    """End this rank at once, from any thread, because another one died."""
    _say(f"{_LOST}.", None)
    _exit(1)


def _leave(text: str, code: int, error: BaseException | None) -> NoReturn:
    # a mistake in a recipe is every rank's: rank 0 says it, and the launcher ends the others
    if launcher.rank() == 0 or not _is_told(PATIENCE_S):
        _say(text, error)
    _exit(code)


def _say(text: str, error: BaseException | None) -> None:
    prefix = "" if text.startswith("rank ") else f"rank {launcher.rank()}: "
    # one write: lines of several ranks do not mix
    sys.stderr.write(f"{prefix}{text}\n")
    if error is not None:
        sys.stderr.write("".join(traceback.format_exception(error)))


def _is_told(seconds: float) -> bool:
    """Whether the launcher's signal to end came within some seconds."""

    def tell(number: int, _: object) -> None:
        raise InterruptedError

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, tell)
    try:
        time.sleep(seconds)
    except InterruptedError:
        return True
    finally:
        # nothing may come between the line and the end
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    return False


def _is_of_contact(error: BaseException) -> bool:
    # gloo's errors are bare RuntimeErrors that name its source file
    return isinstance(error, dist.DistError) or any(w in str(error) for w in ("gloo", "NCCL"))


def _contact(error: BaseException, *, is_told: bool) -> str:
    text = _SILENT if "imed out" in str(error) else _LOST
    if is_told:
        return f"{text}."
    # the launcher ends nobody here: the cause is on another host, or this
    return (
        f"{text}, or the cause is here ({groups.last_line(error)}). Set NCCL_DEBUG=INFO, or add "
        "--debug for the traceback."
    )


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
