"""Jobs at the same time, each in a process of its own: the launcher `hydra/launcher=side_by_side` of a sweep, and what
runs the evaluations of its policies.

A process is forked for each job, from one that has imported everything and computed nothing: no thread of torch has
started and no GPU was touched there, and a job begins in milliseconds. Jobs get threads so that all of them together
have as many as this process may use cores.

A stop asks every job once, by SIGUSR1, to save itself. Jobs ignore what a terminal sends to all processes at once, so
that a second Ctrl-C, which kills, is not taken for two. Jobs die with the process that started them.
"""

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

from dpo_ref.cli.stopping import raising
from dpo_ref.tracking.side_by_side import JobRow, JobsView, Message, TellingScreen, jobs_view
from dpo_ref.tracking.terminal import guard_streams, say, show_on

IN_EVERY_JOB = (  # what transformers imports when it is first used, which takes longer than a small job's first steps
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)
LAUNCHER = "side_by_side"  # its name on the command line
SECONDS_BETWEEN_LOOKS = 0.25  # at most; sooner where a job tells something, and
SECONDS_AT_LEAST = 0.02  # looking competes with the jobs for the cores


@dataclass(frozen=True, slots=True)
class SideJob:
    """What is shown of a job, and what it does in its process. What it returns is sent to the process that started
    it; `failure` is why that is no success."""

    name: str
    call: Callable[[], Any]
    failure: Callable[[Any], str | None] = lambda value: None


@dataclass(frozen=True, slots=True)
class JobEnd:
    """What a job returned, or why it did not: `stopped` by a signal, else `error`."""

    value: Any = None
    stopped: bool = False
    error: str | None = None


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def at_a_time(n_jobs: int | None, key: str) -> int:
    """How many jobs run at the same time. Raises ValueError for less than one."""
    if n_jobs is not None and n_jobs < 1:
        raise ValueError(f"{key}={n_jobs} must be at least 1; null is one for each core")
    return n_jobs or cores()


def threads_each(n_jobs: int) -> int:
    """Threads of one of so many jobs; no more than OMP_NUM_THREADS where that is set."""
    share = max(1, cores() // n_jobs)
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(wanted)) if wanted.isdigit() and int(wanted) else share


# --- in the process of a job


def _work(call: Callable[[], Any], told: Connection, streams: tuple[int, int], num_threads: int) -> None:
    """Do a job: what it prints goes to `streams`, what it is at and what it came to is told."""
    for descriptor, end in zip((1, 2), streams, strict=True):
        os.dup2(end, descriptor)
        os.close(end)
    sys.stdout, sys.stderr = (open(end, "w", buffering=1, encoding="utf-8", closefd=False) for end in (1, 2))  # noqa: SIM115
    guard_streams()
    _stopped_by_its_parent()
    use_threads(num_threads)
    show_on(TellingScreen(told.send))
    try:
        end = JobEnd(call())
    except KeyboardInterrupt:
        end = JobEnd(stopped=True)
    with suppress(BrokenPipeError):
        told.send(end)


def _stopped_by_its_parent() -> None:
    """Stop when the parent says so, and end with it, as a job does that runs in the sweep's own process."""
    for signum in (signal.SIGINT, signal.SIGHUP):  # of the terminal, which sends them to the parent too
        signal.signal(signum, signal.SIG_IGN)
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, raising)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()


def use_threads(count: int) -> None:
    """Compute with so many threads from here on."""
    import torch

    torch.set_num_threads(count)
    os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(count)  # of what is loaded later


# --- in the process that starts them


HELD_BACK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # while a process is not yet prepared


@dataclass
class _Worker:
    """A job under way, as its parent sees it."""

    index: int
    process: ForkProcess
    told: Connection
    printing: dict[int, Any]  # the descriptors that it prints to, and where that goes
    end: JobEnd | None = None
    begun: dict[int, bytes] = field(default_factory=dict)  # lines that are not whole yet

    def read(self, view: JobsView) -> None:
        """Take what it has told and printed."""
        with suppress(EOFError, OSError):
            while self.told.poll():
                self._take(self.told.recv(), view)
        for descriptor, stream in self.printing.items():
            *lines, rest = (self.begun.get(descriptor, b"") + _read(descriptor)).split(b"\n")
            self.begun[descriptor] = rest
            self._show(lines, stream, view)

    def _take(self, message: "Message | JobEnd", view: JobsView) -> None:
        row = view.rows[self.index]
        if isinstance(message, JobEnd):
            self.end = message
        elif isinstance(message, str):
            row.outcome = message
        else:
            row.progress = message
            view.changed(self.index)

    def _show(self, lines: Sequence[bytes], stream: Any, view: JobsView) -> None:
        for line in lines:
            text = line.decode(errors="replace").rsplit("\r")[-1]  # of a line drawn over and over, as it was last
            if text.strip():
                view.printed(self.index, text, stream)

    def close(self, view: JobsView) -> JobEnd:
        """Read what is left, and say what the job came to."""
        self.process.join()
        self.read(view)
        for descriptor, stream in self.printing.items():
            self._show([self.begun[descriptor]], stream, view)
            os.close(descriptor)
        self.told.close()
        return self.end or JobEnd(error=_death(self.process.exitcode or 0))


def _read(descriptor: int) -> bytes:
    """All that is there; others may go on holding the other end, such as processes that a job has started."""
    pieces = []
    with suppress(BlockingIOError):
        while piece := os.read(descriptor, 1 << 16):
            pieces.append(piece)
    return b"".join(pieces)


def _death(code: int) -> str:
    if code >= 0:
        return f"its process ended with status {code}"
    memory = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
    return f"its process was killed by {signal.Signals(-code).name}{memory}"


def _start(index: int, job: SideJob, num_threads: int) -> _Worker:
    told, telling = connection.Pipe(duplex=False)
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    for descriptor in (out, err):
        os.set_blocking(descriptor, False)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # what is buffered would be written by both
    arguments = (job.call, telling, (out_end, err_end), num_threads)
    process = get_context("fork").Process(target=_work, args=arguments)
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
    telling.close()
    for end in (out_end, err_end):  # so that they are nobody's but the job's
        os.close(end)
    return _Worker(index, process, told, {out: sys.stdout, err: sys.stderr})


class _Pool:
    """Jobs that wait, run and have ended."""

    def __init__(
        self, jobs: Sequence[SideJob], most: int, view: JobsView, ended: Callable[[int, JobEnd], None]
    ) -> None:
        self._jobs, self._most, self._view, self._ended = jobs, most, view, ended
        self._waiting = list(range(len(jobs)))
        self._running: list[_Worker] = []
        self.ends = [JobEnd(stopped=True) for _ in jobs]
        self._stopping = False

    def run(self, stop: Sequence[int]) -> None:
        """Until all have ended, or, once a signal is in `stop`, those that run."""
        while self._running or (self._waiting and not stop):
            self._fill(stop)
            connection.wait([w.told for w in self._running] + self._descriptors(), SECONDS_BETWEEN_LOOKS)
            for worker in self._running:
                worker.read(self._view)
            if stop and not self._stopping:
                self._ask_to_stop()
            for worker in [worker for worker in self._running if worker.process.exitcode is not None]:
                self._close(worker)
            self._view.refresh()
            time.sleep(SECONDS_AT_LEAST)

    def kill(self) -> None:
        """End those that run at once."""
        for worker in self._running:
            worker.process.kill()
        for worker in list(self._running):
            self._close(worker)

    def _descriptors(self) -> list[int]:
        return [descriptor for worker in self._running for descriptor in worker.printing]

    def _fill(self, stop: Sequence[int]) -> None:
        while self._waiting and len(self._running) < self._most and not stop:
            index = self._waiting.pop(0)
            row = self._view.rows[index]
            row.state, row.began = "running", time.monotonic()
            self._running.append(_start(index, self._jobs[index], threads_each(self._most)))

    def _ask_to_stop(self) -> None:
        self._stopping = True
        say("stopping: each job saves itself (a second Ctrl-C kills)")
        for worker in self._running:
            with suppress(ProcessLookupError):
                os.kill(worker.process.pid or 0, signal.SIGUSR1)

    def _close(self, worker: _Worker) -> None:
        self._running.remove(worker)
        end, row = worker.close(self._view), self._view.rows[worker.index]
        self.ends[worker.index] = end
        self._ended(worker.index, end)
        _settle(row, end, self._jobs[worker.index])
        self._view.changed(worker.index)


def _settle(row: JobRow, end: JobEnd, job: SideJob) -> None:
    error = end.error or (None if end.stopped else job.failure(end.value))
    row.took = time.monotonic() - row.began
    row.state = "stopped" if end.stopped else "failed" if error else "done"
    row.outcome = error or row.outcome


def run_side_by_side(
    jobs: Sequence[SideJob], most: int, ended: Callable[[int, JobEnd], None] = lambda index, end: None
) -> list[JobEnd]:
    """Run jobs, at most so many at a time, and show them; what each came to, in their order. `ended` is called with
    each as it ends. Raises KeyboardInterrupt once all have ended after a stop, and at once after a second one, which
    kills them."""
    from dpo_ref.training.run import stop_requests

    for module in IN_EVERY_JOB:
        import_module(module)
    gc.freeze()  # what is there stays: jobs that looked at it for garbage would each copy all of it
    view = jobs_view([job.name for job in jobs], most)
    pool = _Pool(jobs, most, view, ended)
    with view, stop_requests() as stop, _killing(pool):
        pool.run(stop)
    if stop:
        raise KeyboardInterrupt
    return pool.ends


@contextmanager
def _killing(pool: _Pool) -> Iterator[None]:
    """No job outlives what went wrong here, or a second stop."""
    try:
        yield
    except BaseException:
        pool.kill()
        raise


# --- the jobs of a sweep


class Launching(Launcher):
    """Runs the jobs of a multirun side by side (Hydra finds it by `hydra_plugins/`). Hydra's callbacks are called in
    this process, once for each job."""

    def __init__(self, n_jobs: int | None) -> None:
        self.n_jobs = n_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """What Hydra hands over before the sweep."""
        self.context, self.task, self._config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run every job; what each came to, in their order."""
        try:
            most = min(at_a_time(self.n_jobs, "hydra.launcher.n_jobs"), len(job_overrides))
        except ValueError as error:
            sys.exit(f"error: {error}")
        names, configs = self.prepared(job_overrides, initial_job_idx)
        calls = [partial(run_hydra_job, self.task, self.context.config_loader, config) for config in configs]
        jobs = [SideJob(name, call, why_failed) for name, call in zip(names, calls, strict=True)]
        returns = [JobReturn(overrides=list(words), status=JobStatus.COMPLETED) for words in job_overrides]
        threads = threads_each(most)
        say(
            f"{len(jobs)} job{'s' if len(jobs) > 1 else ''}, {most} at a time, {threads} thread"
            f"{'s' if threads > 1 else ''} each; the time left is told once jobs train"
        )
        run_side_by_side(jobs, most, lambda index, end: self.note(configs[index], returns[index], end))
        return returns

    def prepared(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> tuple[list[str], list[DictConfig]]:
        """What is shown of each job, and its configuration, with its folder."""
        setup_globals()
        loader, jobs = self.context.config_loader, enumerate(job_overrides, initial_job_idx)
        configs = [job_config(loader, self._config, index, words) for index, words in jobs]
        alone = [Path(config.hydra.runtime.output_dir).name for config in configs[:1]]
        return swept_names(job_overrides) if len(configs) > 1 else alone, configs

    def note(self, config: DictConfig, job: JobReturn, end: JobEnd) -> None:
        """Tell Hydra's callbacks what a job came to."""
        from dpo_ref.cli.train import STOPPED, Ended

        job.return_value = STOPPED if end.stopped else Ended(1, end.error) if end.error else end.value
        self.context.callbacks.on_job_end(config=config, job_return=job)


def job_config(loader: ConfigLoader, sweep: DictConfig, index: int, overrides: Sequence[str]) -> DictConfig:
    """The configuration of a sweep's job, with its folder."""
    config = loader.load_sweep_config(sweep, list(overrides))
    with read_write(config.hydra), open_dict(config.hydra):
        config.hydra.job.id = config.hydra.job.num = index
        config.hydra.runtime.output_dir = os.path.abspath(Path(config.hydra.sweep.dir, config.hydra.sweep.subdir))
    return config


def run_hydra_job(task: TaskFunction, loader: ConfigLoader, config: DictConfig) -> Any:
    """What a job returns, in its process."""
    done = run_job(
        task_function=task,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
        hydra_context=HydraContext(loader, Callbacks()),
    )
    return done.return_value


def why_failed(returned: Any) -> str | None:
    """Why a job failed that could say so."""
    from dpo_ref.cli.train import Ended

    return returned.error if isinstance(returned, Ended) else None


def swept_names(jobs: Sequence[Sequence[str]]) -> list[str]:
    """What tells each job of a sweep from the others: the words that not all of them have, but for Hydra's own."""
    shared = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    own = [[word.lstrip("+").replace("\\:", ":") for word in words if word not in shared] for words in jobs]
    return [" ".join(word for word in words if not word.startswith("hydra.")) or "the job" for words in own]


@dataclass
class SideBySideConfig:
    """`hydra/launcher=side_by_side`."""

    _target_: str = "hydra_plugins.side_by_side.SideBySideLauncher"
    n_jobs: int | None = None  # at the same time; null: as many as this process may use cores


def register() -> None:
    """Store the launcher's options."""
    ConfigStore.instance().store(group="hydra/launcher", name=LAUNCHER, node=SideBySideConfig, provider="dpo_ref")
