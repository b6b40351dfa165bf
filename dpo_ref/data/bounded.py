"""Programs that strangers wrote (chat templates, regular expressions), run in a copy of this process.

No guard inside a process stops all of them: one `9**9**9` or one regular expression is a single call of C code. So a
copy of this process runs them, item by item, and hands the outcomes back; the kernel ends it where an item takes too
long, and gives it no more memory than stated.
"""

import gc
import json
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

SECONDS = 10.0  # of computing for one item; a chat template writes a conversation in less than a thousandth
MEMORY = 512 * 2**20  # bytes that all items together may hold at once
CONTINUED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # whoever started the copy says when it ends
BATCH = 64  # outcomes handed back at once

Item = TypeVar("Item")


class OverLimit(Exception):
    """An item took more than it is given; the message says of what."""


def bounded(call: Callable[[Item], Any], items: Sequence[Item], refusal: type[Exception] = OverLimit) -> Iterator[Any]:
    """`call` of every item in a copy of this process, in their order, as JSON has it: what comes back is data alone.

    Raises, in the place of an item's outcome, `OverLimit` and the `refusal` that `call` raises, with its message.
    """
    if not items:
        return
    num_received = 0
    try:
        for outcome in _outcomes(call, items, refusal, BATCH):
            num_received += 1
            yield outcome
    except OverLimit:  # the batch is lost: one by one the last outcome that comes is the one before the item
        yield from _outcomes(call, items[num_received:], refusal, 1)


def _outcomes(call: Callable[[Any], Any], items: Sequence[Any], refusal: type[Exception], batch: int) -> Iterator[Any]:
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        _copy(lambda item: _attempt(call, item, refusal), items, batch, writing)
    os.close(writing)
    with os.fdopen(reading, "rb", 2**17) as stream, _ended(process):
        for _ in range(0, len(items), batch):
            for outcome, refused, over_limit in _received(stream, process):
                if over_limit:
                    raise OverLimit(over_limit)
                if refused is not None:
                    raise refusal(refused)
                yield outcome


def _copy(attempt: Callable[[Any], Any], items: Sequence[Any], batch: int, writing: int) -> None:
    """What the copy does; it never returns, for what stands above it is the business of the process it was made of."""
    try:
        for ignored in CONTINUED:
            signal.signal(ignored, signal.SIG_IGN)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        gc.disable()  # it would look at, and so copy, everything that this process ever made
        _limit_memory()
        watch = _Watch()
        with os.fdopen(writing, "wb", 2**17) as stream:
            for start in range(0, len(items), batch):
                outcomes = [attempt(item) for item in watch.each(items[start : start + batch])]
                stream.write(json.dumps(outcomes).encode() + b"\n")
                stream.flush()
    except BrokenPipeError:
        """Nobody waits for more."""
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(1)


class _Watch:
    """Has the kernel end this process after SECONDS of computing for one item."""

    def __init__(self) -> None:
        self.wound = -SECONDS

    def each(self, items: Sequence[Any]) -> Iterator[Any]:
        """The items, wound before each of them, unless that was a moment ago: the kernel would be called for longer
        than an item takes."""
        for item in items:
            if time.monotonic() > self.wound + SECONDS / 20:
                self.wound = time.monotonic()
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
            yield item


def _attempt(call: Callable[[Any], Any], item: Any, refusal: type[Exception]) -> tuple[Any, str | None, str]:
    """The outcome, or why it was refused, or which limit it is over."""
    try:
        return call(item), None, ""
    except MemoryError:
        return None, None, f"it needs more than {MEMORY // 2**20} MiB of memory"
    except refusal as error:
        return None, str(error), ""


def _limit_memory() -> None:
    """Let this process take MEMORY beyond what it has; only Linux says what that is."""
    with suppress(OSError):
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        least = taken + MEMORY if most == resource.RLIM_INFINITY else min(taken + MEMORY, most)
        resource.setrlimit(resource.RLIMIT_AS, (least, most))


@contextmanager
def _ended(process: int) -> Iterator[None]:
    """The copy is over when the block is, however that ends."""
    try:
        yield
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def _received(stream: BinaryIO, process: int) -> list[list[Any]]:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise OverLimit(_ending(process))
    return json.loads(line)


def _ending(process: int) -> str:
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return f"it takes more than {SECONDS:g} seconds"
    if os.WIFSIGNALED(status):
        return f"the process that did it was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return "the process that did it ended"
