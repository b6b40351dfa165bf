"""Programs that strangers wrote (chat templates, regular expressions), run in a copy of this process.

No guard inside a process stops all of them: one `9**9**9` or one regular expression is a single call of C code. So a
copy of this process runs them, item by item, and hands the outcomes back; the kernel ends it where an item takes too
long, and gives it no more memory than stated.
"""

import os
import pickle
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

SECONDS = 10.0  # of computing for one item; a chat template writes a conversation in less than a thousandth
MEMORY = 512 * 2**20  # bytes that all items together may hold at once
CONTINUED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # whoever started the copy says when it ends

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class OverLimit(Exception):
    """An item took more than it is given; the message says of what."""


def bounded(call: Callable[[Item], Outcome], items: Sequence[Item]) -> Iterator[Outcome]:
    """`call` of every item in a copy of this process, in their order. Raises what `call` raises, and `OverLimit`, in
    the place of the item's outcome."""
    if not items:
        return
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        _copy(call, items, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as outcomes, _ended(process):
        for _ in items:
            yield _received(outcomes, process)


def _copy(call: Callable[[Any], Any], items: Sequence[Any], writing: int) -> None:
    """What the copy does; it never returns, for what stands above it is the business of the process it was made of."""
    try:
        for ignored in CONTINUED:
            signal.signal(ignored, signal.SIG_IGN)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        _limit_memory()
        with os.fdopen(writing, "wb", buffering=0) as outcomes:
            for item in items:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                _send(outcomes, _attempt(call, item))
    finally:
        os._exit(1)


def _attempt(call: Callable[[Any], Any], item: Any) -> bytes:
    try:
        return pickle.dumps((call(item), None))
    except MemoryError:
        return pickle.dumps((None, OverLimit(f"it needs more than {MEMORY // 2**20} MiB of memory")))
    except Exception as error:
        return pickle.dumps((None, error))


def _send(outcomes: Any, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[outcomes.write(rest) :]


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


def _received(outcomes: BinaryIO, process: int) -> Any:
    try:
        outcome, error = pickle.load(outcomes)
    except (EOFError, pickle.UnpicklingError):
        raise OverLimit(_ending(process)) from None
    if error is not None:
        raise error
    return outcome


def _ending(process: int) -> str:
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return f"it takes more than {SECONDS:g} seconds"
    if os.WIFSIGNALED(status):
        return f"the process that did it was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return "the process that did it ended"
