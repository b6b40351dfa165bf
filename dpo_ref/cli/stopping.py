"""Ctrl-C, SIGTERM and SIGHUP outside of training, which saves itself (`training/run.py`): one line, no traceback.

Entry points import this before anything that takes long; it needs nothing but the standard library.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_advice = ["type the command again"]


def advise(words: str) -> None:
    """What to type after a stop, from here on."""
    _advice[0] = words


def _handle(handler: Any) -> None:
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(signum, handler)


def _end(signum: int, frame: FrameType | None) -> None:
    os.write(2, b"\nstopped while starting, nothing was done\n")
    os._exit(128 + signum)


def raising(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signum)


def end_at_once() -> None:
    """While modules are imported nothing is open that would have to be closed, and an exception could be swallowed."""
    _handle(_end)


@contextmanager
def in_one_line() -> Iterator[None]:
    """Around a whole command: a stop closes what is open, and ends it with one line and status 128 + the signal's
    number. A further one while it closes ends it at once, without a word."""
    _handle(raising)
    try:
        yield
    except KeyboardInterrupt as stop:
        _handle(signal.SIG_DFL)
        print(f"\nstopped; {_advice[0]}", file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
    finally:
        _handle(signal.SIG_DFL)
