"""Commands that are killed -9 again and again, at moments drawn at random, and typed again until they end.

Every attempt is a copy of the tests' process, which has imported everything and composed the configuration: a kill
costs neither.
"""

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.command import Done, composed
from tests.support.faults import Typed, run_composed

CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}  # audit events of what alters a folder
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CLOCK = ("throughput", "memory", "seconds")  # in the names of numbers that are not the same twice


class FileOperations:
    """Counts, in the process that `watch` is called in, the files below a folder that are opened to be written, moved,
    deleted or brought to the disk; in place of the `last` of them the process kills itself."""

    def __init__(self, folder: Path, last: int | None = None) -> None:
        self.folder, self.last, self._count = str(folder), last, RawValue("l", 0)

    @property
    def count(self) -> int:
        return self._count.value

    def watch(self) -> None:
        to_disk = os.fsync

        def fsync(file: Any) -> None:
            self._note()
            to_disk(file)

        os.fsync = fsync
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in CHANGES or (event == "open" and (arguments[2] or 0) & WRITES)
        if writes and str(arguments[0]).startswith(self.folder):
            self._note()

    def _note(self) -> None:
        self._count.value += 1
        if self._count.value == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Work:
    """What is typed in a folder, and what is there afterwards.

    `words` of a folder are the command's, or those that go on with what a killed one left; `phase` says what was under
    way when it was killed, by what it had written; `outcome` is everything that must be equal to that of a command
    that was not killed. `busy` is whether the phase that kills are aimed at is under way.
    """

    words: Callable[[Path], list[str]]
    phase: Callable[[Path], str]
    outcome: Callable[[Path], Any]
    busy: Callable[[Path], bool]


def _typed(work: Work, folder: Path, shell: Path, watch: Callable[[], None] = lambda: None) -> Typed:
    """An attempt, with the cache that lies in its folder."""

    def prepare() -> None:
        os.environ["DPO_REF_CACHE"] = str(folder / "cache")
        watch()

    words = work.words(folder)
    if "-m" in words:
        return Typed(shell, *words, before=prepare)
    composed(*words[1:], kind=Path(words[0]).stem)  # here, for all copies of this process
    return Typed(shell, *words, before=prepare, enter=run_composed)


class Whole(NamedTuple):
    """A command that was not killed: what it came to, its seconds and its file operations."""

    outcome: Any
    seconds: float
    operations: int


def whole(work: Work, folder: Path) -> Whole:
    """Let it come to its end."""
    operations, begun = FileOperations(folder), time.monotonic()
    done = _typed(work, folder, folder / "shell", operations.watch).end()
    assert done.returncode == 0, done
    return Whole(work.outcome(folder), time.monotonic() - begun, operations.count)


# A moment of death: starts an attempt in a folder, with what lies there for its shell, and waits until it has ended.
Death = Callable[[Work, Path, Path], Done]


def _at_a_time(seconds: float, work: Work, folder: Path, shell: Path) -> Done:
    attempt = _typed(work, folder, shell)
    attempt.process.join(timeout=seconds)
    attempt.send_if_alive(signal.SIGKILL)
    return attempt.end()


def _in_an_operation(number: int, work: Work, folder: Path, shell: Path) -> Done:
    return _typed(work, folder, shell, FileOperations(folder, number).watch).end()


def _in_its_phase(seconds: float, work: Work, folder: Path, shell: Path) -> Done:
    attempt = _typed(work, folder, shell)
    while attempt.process.is_alive() and not work.busy(folder):
        time.sleep(0.001)
    attempt.process.join(timeout=seconds)
    attempt.send_if_alive(signal.SIGKILL)
    return attempt.end()


def deaths(chance: random.Random, uninterrupted: Whole) -> Iterator[Death]:
    """By turns in the phase at hand, at a time, and in place of a file operation, all at random."""
    while True:
        yield partial(_in_its_phase, chance.uniform(0, 0.1))
        yield partial(_at_a_time, chance.uniform(0, uninterrupted.seconds))
        yield partial(_in_an_operation, chance.randint(1, uninterrupted.operations))


def ends_after(work: Work, folder: Path, moments: Iterator[Death], most: int) -> Counter[str]:
    """Type the command until it ends by itself, its first attempts killed; how many were killed in which phase."""
    phases: Counter[str] = Counter()
    for attempt in range(most):
        done = next(moments)(work, folder, folder / f"shell {attempt}")
        if done.returncode != -signal.SIGKILL:
            assert done.returncode == 0, done
            return phases
        phases[phase := work.phase(folder)] += 1
        if phase.startswith("after"):
            break
    done = _typed(work, folder, folder / "shell").end()
    assert done.returncode == 0, done
    return phases


def without_clock(numbers: dict[str, Any]) -> dict[str, Any]:
    """Those that are the same twice."""
    return {key: value for key, value in numbers.items() if not any(word in key for word in CLOCK)}
