"""Where the jobs of a sweep in processes of their own meet on one machine: how many work at a time, on which GPU, and
until when.
"""

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_ref.cli.side_by_side import JobEnd, cores, threads_each, use_threads
from dpo_ref.cli.stopping import raising
from dpo_ref.tracking.terminal import guard_streams, say

SECONDS_BETWEEN_LOOKS = 0.1

_HELD: dict[Path, int] = {}  # the slots of this process, which has them to its end: a GPU is not changed for another


@dataclass(frozen=True, slots=True)
class Slots:
    """Where the processes of a sweep's jobs meet: a folder of one machine, whose locks the kernel lets go of however a
    process ends. As many work at a time as there are slots, each with so many threads, on the GPU of its slot."""

    folder: Path
    count: int
    threads: int  # of a job
    gpus: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them

    def gpu_of(self, slot: int) -> str | None:
        """The slots' turns go round the GPUs."""
        return self.gpus[slot % len(self.gpus)] if self.gpus else None

    # --- in the process of a job

    def work(self, call: Callable[[], Any]) -> JobEnd:
        """What a job comes to: begun once a slot is free, and not where the sweep has been stopped by then."""
        for signum in (signal.SIGINT, signal.SIGHUP):  # of the terminal, which sends them to the sweep too
            signal.signal(signum, signal.SIG_IGN)
        try:
            with self._under_way():
                if not self._take():
                    return JobEnd(stopped=True)
                return JobEnd(call())
        except KeyboardInterrupt:
            return JobEnd(stopped=True)

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        """Within, a stop of the sweep comes to this process; a process between two jobs has nothing to save."""
        mark = self.folder / f"{os.getpid()}.job"
        for signum in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(signum, raising)
        mark.touch()
        try:
            yield
        finally:
            for signum in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(signum, signal.SIG_IGN)
            mark.unlink(missing_ok=True)

    def _take(self) -> bool:
        """Wait for a slot, and work with what is its; False where the sweep stops."""
        if self.folder not in _HELD:
            threading.Thread(target=self._end_with_sweep, daemon=True).start()
        while not (stopped := self._stop.exists()) and self.folder not in _HELD:
            slot = next(filter(self._lock_slot, range(self.count)), None)
            if slot is None:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                continue
            if (gpu := self.gpu_of(slot)) is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            use_threads(self.threads)
        return not stopped

    def _lock_slot(self, slot: int) -> bool:
        """Take a slot, if it is free; whether this process now has it."""
        lock = os.open(self.folder / f"{slot}.slot", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        _HELD[self.folder] = lock
        return True

    def _end_with_sweep(self) -> None:
        lock = os.open(self._sweep, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_SH)  # which the process of the sweep holds to its end
        os.kill(os.getpid(), signal.SIGKILL)

    def work_apart(self, call: Callable[[], Any]) -> JobEnd:
        """The same in a process that does nothing else."""
        guard_streams()
        return self.work(call)

    # --- in the process of the sweep

    @property
    def _sweep(self) -> Path:
        return self.folder / "sweep"

    @property
    def _stop(self) -> Path:
        return self.folder / "stop"

    def open(self) -> None:
        """Hold the folder, to the end of this process."""
        fcntl.flock(os.open(self._sweep, os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)

    def stop(self, signum: int = signal.SIGUSR1) -> None:
        """Let no further job begin, and send a signal to those under way."""
        self._stop.touch()
        for mark in self.folder.glob("*.job"):
            with suppress(ProcessLookupError):
                os.kill(int(mark.stem), signum)

    @contextmanager
    def stopping(self) -> Iterator[list[int]]:
        """The signals that came: the first has every job save itself. Raises KeyboardInterrupt at the second, once all
        jobs are killed."""
        from dpo_ref.training.run import stop_requests

        over = threading.Event()

        def pass_on(stop: Sequence[int]) -> None:
            while not over.wait(SECONDS_BETWEEN_LOOKS):
                if stop:
                    say("stopping: each job saves itself (a second Ctrl-C kills)")
                    self.stop()
                    return

        with stop_requests() as stop:
            thread = threading.Thread(target=pass_on, args=(stop,), daemon=True)
            thread.start()
            try:
                yield stop
            except BaseException:
                self.stop(signal.SIGKILL)
                raise
            finally:
                over.set()
                thread.join()


def slots_for(n_jobs: int | None, num_jobs: int, gpus: Sequence[str], folder: Path) -> Slots:
    """Slots of `n_jobs` jobs at a time: None is one for each GPU or, without any, each core; -1 one for each core, as
    joblib has it. Raises ValueError for other numbers below one."""
    if n_jobs is not None and n_jobs < 1 and n_jobs != -1:
        raise ValueError(
            f"hydra.launcher.n_jobs={n_jobs} must be at least 1; null is one for each GPU or, without any, for each "
            "core; -1 one for each core"
        )
    count = cores() if n_jobs == -1 else n_jobs or len(gpus) or cores()
    most = min(count, num_jobs)
    return Slots(folder, most, threads_each(most), tuple(gpus))


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    from dpo_ref.distributed import num_gpus

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = num_gpus()
    return (named.split(",") if named else list(map(str, range(count))))[:count]
