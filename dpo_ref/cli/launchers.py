"""The jobs of a sweep in processes that start anew, by what users of Hydra know: `hydra/launcher=joblib` and
`submitit_local` on this machine, `submitit_slurm` on a cluster.

Hydra's plugins of these names are not used, and ours take their places where they are installed: theirs lose the
results of all jobs when the process of one dies, and kill jobs that could save themselves. A job is sent as its
composed configuration. On one machine the processes meet in a folder (`slots.py`). On a cluster a job that gets
SIGUSR1 saves itself and is queued again by submitit; its record then says that it goes on
(`run_folder.left_by_sweep`).
"""

import io
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.types import TaskFunction
from omegaconf import DictConfig

from dpo_ref.cli.side_by_side import JobEnd, Launching, run_hydra_job, why_failed
from dpo_ref.cli.slots import SECONDS_BETWEEN_LOOKS, Slots, slots_for, visible_gpus
from dpo_ref.cli.stopping import raising
from dpo_ref.tracking.terminal import guard_streams, say

ROOT = Path(__file__).parents[2]
JOBLIB, LOCAL, SLURM = "joblib", "submitit_local", "submitit_slurm"  # names on the command line

# --- a job, as it is sent


@dataclass(frozen=True, slots=True)
class SentJob:
    """A job for a process that knows nothing of its sweep."""

    name: str
    config: DictConfig
    task: TaskFunction
    loader: ConfigLoader
    arguments: tuple[str, ...]  # of the sweep's command

    def run(self) -> Any:
        """What the job returns."""
        from dpo_ref.cli import schemas
        from dpo_ref.cli.command_line import config_folders

        sys.argv = list(self.arguments)
        schemas.look_in(config_folders(sys.argv[1:]))
        schemas.register()
        setup_globals()
        return run_hydra_job(self.task, self.loader, self.config)


class _Named(io.TextIOBase):
    """A stream on which a job's name stands before each of its lines; of one drawn over and over, as it was last."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name, self._begun = stream, name, ""

    def write(self, text: str, /) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in (line.rsplit("\r")[-1] for line in lines):
            if line.strip():
                self._stream.write(f"{self._name} | {line}\n")  # at once: others write there too
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Within, what is printed has a job's name before it."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Named(stream, name) for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


def in_slot(slots: Slots, job: SentJob) -> JobEnd:
    """A job in a process of joblib."""
    with _named(job.name):
        return slots.work(job.run)


# --- the launchers


class _Sending(Launching):
    """Runs jobs in processes that start anew. Hydra's callbacks are called in this process, as each job ends."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run every job; what each came to, in their order."""
        names, configs = self.prepared(job_overrides, initial_job_idx)
        arguments = tuple(sys.argv)
        jobs = [
            SentJob(name, config, self.task, self.context.config_loader, arguments)
            for name, config in zip(names, configs, strict=True)
        ]
        returns = [JobReturn(overrides=list(words), status=JobStatus.COMPLETED) for words in job_overrides]
        try:
            for done, (index, end) in enumerate(self.ends(jobs), start=1):
                self.note(configs[index], returns[index], end)
                say(f"{names[index]}: {_in_words(end)}; {done} of {len(jobs)}")
        except ValueError as error:
            sys.exit(f"error: {error}")
        return returns

    @abstractmethod
    def ends(self, jobs: Sequence[SentJob]) -> Iterator[tuple[int, JobEnd]]:
        """What each job came to, as it ends. Raises ValueError for what keeps all from running, KeyboardInterrupt
        after a stop."""


def _in_words(end: JobEnd) -> str:
    if end.stopped:
        return "stopped"
    error = end.error or why_failed(end.value)
    return f"failed: {error}" if error else "done"


def _jobs(count: int) -> str:
    return f"{count} job{'' if count == 1 else 's'}"


class _OnThisMachine(_Sending):
    """Runs jobs in slots of this machine."""

    def __init__(self, n_jobs: int | None) -> None:
        super().__init__(n_jobs)
        self._slots: Slots | None = None

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="dpo_ref_sweep_")

    def slots(self, jobs: Sequence[SentJob]) -> Slots:
        """Those of the sweep, which are told. A search launches jobs rung by rung, and never more than at first."""
        if self._slots is None:
            gpus = [] if jobs[0].config.get("device") == "cpu" else visible_gpus()
            self._slots = slots_for(self.n_jobs, len(jobs), gpus, Path(self._folder.name))
            self._slots.open()
        slots = self._slots
        on = f", on GPU {', '.join(slots.gpus)} in turn" if slots.gpus else ""
        threads = f"{slots.threads} thread{'s' if slots.threads > 1 else ''} each"
        say(f"{_jobs(len(jobs))}, {min(slots.count, len(jobs))} at a time, {threads}{on}")
        return slots


class JoblibLaunching(_OnThisMachine):
    """`hydra/launcher=joblib`: joblib's processes (loky), each of which runs one job after the other."""

    def ends(self, jobs: Sequence[SentJob]) -> Iterator[tuple[int, JobEnd]]:
        """As they end. joblib kills all of its processes when one dies: what these were at is an error of each, and
        its checkpoint goes on."""
        from joblib.externals.loky import get_reusable_executor
        from joblib.externals.loky.process_executor import BrokenProcessPool

        slots = self.slots(jobs)
        threads = {"OMP_NUM_THREADS": str(slots.threads)}
        executor = get_reusable_executor(slots.count, initializer=guard_streams, env=threads)
        with slots.stopping() as stop, _shut_down(executor):
            index_of = {executor.submit(in_slot, slots, job): index for index, job in enumerate(jobs)}
            for future in as_completed(index_of):
                try:
                    end = future.result()
                except BrokenProcessPool:
                    end = JobEnd(error=BROKEN)
                yield index_of[future], end
        if stop:
            raise KeyboardInterrupt


@contextmanager
def _shut_down(executor: Any) -> Iterator[None]:
    """At the end its processes, which would keep the memory of their jobs, are gone, at once where something went
    wrong."""
    try:
        yield
    except BaseException:
        executor.shutdown(kill_workers=True)
        raise
    executor.shutdown()


BROKEN = "joblib ends all of its processes when one is killed, as the system does when memory runs out, and one was"


# --- submitit's


SECONDS_BETWEEN_SUBMISSIONS = 0.2  # which submitit waits for too, but with stops held back


OF_ALL_CLUSTERS = (  # options; submitit has those of one behind the cluster's name
    "name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node", "stderr_to_stdout",
)  # fmt: skip


def executor_of(cluster: str, folder: Path, options: Mapping[str, Any]) -> Any:
    """What submits jobs to `local` or `slurm`, their logs in a folder. Raises ValueError where submitit is not
    installed, has no cluster here, or does not take an option."""
    try:
        import submitit
    except ImportError as error:
        raise ValueError(
            f"hydra/launcher=submitit_{cluster} needs submitit: pip install -r requirements-sweeps.txt "
            "(hydra/launcher=side_by_side and joblib need nothing)"
        ) from error
    named = {key if key in OF_ALL_CLUSTERS else f"{cluster}_{key}": value for key, value in options.items()}
    retries = {key: named.pop(key) for key in ("slurm_max_num_timeout",) if key in named}
    try:
        executor = submitit.AutoExecutor(folder, cluster, **retries)
    except RuntimeError as error:
        raise ValueError(
            f"hydra/launcher={SLURM}: there is no srun here; type the command on a machine of the cluster, or try it "
            f"with hydra/launcher={LOCAL}"
        ) from error
    executor.update_parameters(**{key: value for key, value in named.items() if value is not None})
    return executor


def _as_done(sent: Sequence[Any], stop: Sequence[int]) -> Iterator[tuple[int, JobEnd]]:
    """What each of submitit's jobs came to, as it is done, up to a stop."""
    left = dict(enumerate(sent))
    while left and not stop:
        for index in [index for index, job in left.items() if job.done()]:
            yield index, _end_of(left.pop(index))
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _end_of(job: Any) -> Any:
    """What a job of submitit returned; a JobEnd that says where to look, if it could not."""
    from submitit.core.utils import UncompletedJobError

    try:
        return job.task(0).result()  # of a job's ranks the first speaks for all
    except UncompletedJobError:  # of which a failed one is a kind
        return JobEnd(error=f"its process ended without a result: {job.paths.stderr} says why")


class LocalLaunching(_OnThisMachine):
    """`hydra/launcher=submitit_local`: a process for each job, which waits for a slot; what jobs print is in files."""

    def __init__(self, n_jobs: int | None, submitit_folder: str, **options: Any) -> None:
        super().__init__(n_jobs)
        self._logs, self._options = Path(submitit_folder), options

    def ends(self, jobs: Sequence[SentJob]) -> Iterator[tuple[int, JobEnd]]:
        """As their processes end."""
        executor, slots = executor_of("local", self._logs, self._options), self.slots(jobs)
        os.environ["PYTHONPATH"] = _with_root(os.environ.get("PYTHONPATH"))
        with slots.stopping() as stop:
            sent = []
            for job in jobs:
                time.sleep(SECONDS_BETWEEN_SUBMISSIONS)
                with _ignored(signal.SIGINT, signal.SIGHUP):
                    sent.append(executor.submit(slots.work_apart, job.run))
            say(f"what they print is in {self._logs}")
            yield from _as_done(sent, ())  # of those that stop too: they save themselves
        if stop:
            raise KeyboardInterrupt


def _with_root(path: str | None) -> str:
    """PYTHONPATH with the folder of this project, wherever a command is typed."""
    return os.pathsep.join([str(ROOT), *filter(None, [path])])


@contextmanager
def _ignored(*signals: int) -> Iterator[None]:
    """Processes that start within ignore these signals: the terminal sends them to the sweep too, which stops them."""
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class OnCluster:
    """A job on a machine of the cluster. submitit calls it, and `checkpoint` for what it queues again."""

    def __call__(self, job: SentJob) -> JobEnd:
        """What it comes to. After SIGUSR1, which says that its time is up or that others go first, it saves itself and
        is queued again; then this does not return."""
        import submitit

        guard_streams()
        if submitit.JobEnvironment().num_tasks > 1:  # as torchrun starts the processes of one run
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        queue_again = signal.getsignal(signal.SIGUSR1)
        signal.signal(signal.SIGTERM, raising)
        try:
            return JobEnd(job.run())
        except KeyboardInterrupt:
            # Training ignores it once it was told by it to save itself (`training/run.py`).
            if signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN and callable(queue_again):
                queue_again(signal.SIGUSR1, None)
            return JobEnd(stopped=True)

    def checkpoint(self, job: SentJob) -> Any:
        """The same job: its folder says how far it is."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, job)


class SlurmLaunching(_Sending):
    """`hydra/launcher=submitit_slurm`: an array of jobs on a SLURM cluster. This process waits for them."""

    def __init__(self, submitit_folder: str, **options: Any) -> None:
        super().__init__(None)
        self._logs, self._options = Path(submitit_folder).absolute(), options

    def executor(self, **changed: Any) -> Any:
        """What submits the jobs, with options `changed`. Raises ValueError where that cannot be."""
        options = {**self._options, **changed}
        setup = [
            f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}",
            "export SUBMITIT_PREEMPT_SIGNAL=USR1",
        ]
        if options["cpus_per_task"] is not None:
            setup.append(f"export OMP_NUM_THREADS={options['cpus_per_task']}")
        options["setup"] = [*setup, *(options["setup"] or [])]
        # requeue: SLURM too may queue a job again, whose machine fails or whose place others need
        ours = {"requeue": True, "signal": f"USR1@{options['signal_delay_s']}"}
        options["additional_parameters"] = ours | dict(options["additional_parameters"])
        return executor_of("slurm", self._logs, options)

    def ends(self, jobs: Sequence[SentJob]) -> Iterator[tuple[int, JobEnd]]:
        """As the cluster says. A stop cancels them, but for a connection that is lost."""
        executor = self.executor()
        with _cancelling() as (sent, stop):
            sent += executor.map_array(OnCluster(), jobs)
            say(f"{_jobs(len(jobs))} queued, {sent[0].job_id} the first; what they print is in {self._logs}")
            yield from _as_done(sent, stop)

    def run(self, command: Sequence[str]) -> int:
        """The exit status of a command that runs as one job of the same kind, 1 where that has none; shows what it
        printed."""
        executor = self.executor(nodes=1, tasks_per_node=1)
        with _cancelling() as (sent, stop):
            sent.append(executor.submit(subprocess.call, list(command)))
            say(f"as job {sent[0].job_id} of the cluster; what it prints is in {sent[0].paths.stdout}")
            while not sent[0].done() and not stop:
                time.sleep(SECONDS_BETWEEN_LOOKS)
        print(sent[0].stdout() or "", flush=True)
        end = _end_of(sent[0])
        if isinstance(end, int):
            return end
        say(f"the command failed: {end.error}")
        return 1


def run_on_cluster(launcher: DictConfig, command: Sequence[str]) -> int:
    """The exit status of a command that runs as a job with a launcher's options; shows what it printed."""
    options = {str(key): value for key, value in launcher.items() if key != "_target_"}
    return SlurmLaunching(**options).run(command)


@contextmanager
def _cancelling() -> Iterator[tuple[list[Any], list[int]]]:
    """The cluster's jobs, and the signals that came. Raises KeyboardInterrupt after a stop, once these are cancelled:
    those that train save themselves. A lost connection to the machine where the sweep was typed cancels none."""
    from dpo_ref.training.run import stop_requests

    sent: list[Any] = []
    with stop_requests() as stop:
        yield sent, stop
    if stop and signal.SIGHUP not in stop:
        for job in sent:
            job.cancel(check=False)
        say("the jobs are cancelled on the cluster; those that train save themselves")
    if stop:
        raise KeyboardInterrupt


# --- their options


LOGS = "${hydra.sweep.dir}/.submitit"


@dataclass
class JoblibConfig:
    """`hydra/launcher=joblib`."""

    _target_: str = "hydra_plugins.joblib.JoblibLauncher"
    n_jobs: int | None = None  # at a time; null: one for each GPU or, without any, each core; -1: one for each core


@dataclass
class LocalConfig:
    """`hydra/launcher=submitit_local`."""

    _target_: str = "hydra_plugins.submitit.LocalLauncher"
    n_jobs: int | None = None  # as joblib's
    submitit_folder: str = LOGS
    timeout_min: int = 43_200  # minutes that a job may take, its wait for others included
    stderr_to_stdout: bool = False


@dataclass
class SlurmConfig:
    """`hydra/launcher=submitit_slurm`: options of submitit, of which most are those of sbatch."""

    _target_: str = "hydra_plugins.submitit.SlurmLauncher"
    submitit_folder: str = LOGS  # on a disk that all machines see
    name: str = "${hydra.job.name}"
    timeout_min: int = 240  # minutes; a job that needs more goes on where it was
    signal_delay_s: int = 120  # seconds before that in which it saves itself
    max_num_timeout: int = 20  # times that it is queued again because its time was up
    array_parallelism: int = 256  # jobs at a time
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int | None = 1
    gpus_per_task: int | None = None
    cpus_per_task: int | None = 8
    cpus_per_gpu: int | None = None
    mem_gb: int | None = None
    mem_per_gpu: str | None = None
    mem_per_cpu: str | None = None
    partition: str | None = None
    qos: str | None = None
    account: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    gres: str | None = None
    comment: str | None = None
    stderr_to_stdout: bool = False
    setup: list[str] | None = None  # lines of the script before the job's
    additional_parameters: dict[str, Any] = field(default_factory=dict)  # of sbatch


OPTIONS = {JOBLIB: JoblibConfig, LOCAL: LocalConfig, SLURM: SlurmConfig}


def register() -> None:
    """Store the launchers' options, in the places of what plugins of these names have stored when Hydra found them."""
    Plugins.instance()
    for name, options in OPTIONS.items():
        ConfigStore.instance().store(group="hydra/launcher", name=name, node=options, provider="dpo_ref")
