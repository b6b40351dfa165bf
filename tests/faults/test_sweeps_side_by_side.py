"""Sweeps whose jobs run side by side, stopped and killed as a whole and one by one: as sweeps that run their jobs one
after the other, and nothing outlives its sweep."""

import os
import re
import signal
import sys
import time
from types import SimpleNamespace

import pytest

from dpo_ref.cli import sweep as end_of_sweep
from tests.support.command import forked, typed, typed_here
from tests.support.faults import SMALL, Typed, same_weights, steps, summary
from tests.support.sweeps import BETAS, QUICK, jobs, short_evaluation  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow  # `make faults` runs it

BESIDE = ["hydra/launcher=side_by_side", "hydra.launcher.n_jobs=2"]
LONGER = [*SMALL, "trainer.epochs=20", "trainer.save_every=10"]


def command(folder, *words, betas=BETAS):
    return ["train.py", "-m", *LONGER, *BESIDE, f"output_dir={folder}", f"beta={','.join(betas)}", *words]


def states(folder):
    """Job and status of each line of the table."""
    return [tuple(line.split(",")[:2]) for line in (folder / "sweep.csv").read_text().splitlines()[1:]]


def with_two_under_way(tmp_path, folder):
    started = Typed(tmp_path / "shell", *command(folder))
    started.until(lambda: all(steps(job) > 3 for job in jobs(folder)[:2]))
    return started


def worker_of(job):
    """The process that holds a job's folder."""
    return int(re.search(r'"pid": (\d+)', (job / ".lock").read_text())[1])


def is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def gone(process):
    deadline = time.monotonic() + 10
    while is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_alive(process)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep that was not stopped, without its evaluation."""
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(end_of_sweep, "subprocess", SimpleNamespace(run=lambda *_, check: SimpleNamespace(returncode=0)))
        done = typed(*command(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def assert_goes_on(folder, whole):
    done = typed(*command(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(folder) == [(job.name, "completed") for job in jobs(folder)]
    assert all(same_weights(job, other) for job, other in zip(jobs(folder), jobs(whole), strict=True))
    return done


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_lets_each_job_save_itself_and_the_same_command_goes_on(whole, tmp_path, signum, tell):
    folder = tmp_path / "sweep"
    started = with_two_under_way(tmp_path, folder)
    workers = list(map(worker_of, jobs(folder)[:2]))
    started.send(signum)
    stopped = started.end()
    assert (stopped.returncode, "Traceback" in stopped.stderr) == (130, False), stopped
    assert not any(map(is_alive, workers))
    assert stopped.stdout.count("stopped at step") == 2
    assert [summary(job)["status"] for job in jobs(folder)[:2]] == ["interrupted"] * 2
    assert not jobs(folder)[2].exists()
    assert f"go on with\n  python {' '.join(command(folder))}" in stopped.stderr
    assert_goes_on(folder, whole)
    tell(
        "killed",
        f"{signal.Signals(signum).name} in a sweep whose jobs run side by side, then the same command",
        seen=stopped.stderr,
        survived="both jobs that were under way; all jobs' final weights equal those of a sweep that was not stopped",
    )


def test_a_second_stop_kills_all_jobs(tmp_path, tell):
    folder = tmp_path / "sweep"
    started = with_two_under_way(tmp_path, folder)
    workers = list(map(worker_of, jobs(folder)[:2]))
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)  # as one that does not come to save itself
    started.send(signal.SIGINT)
    started.until(lambda: "stopping" in (started.folder / "out").read_text())
    started.send(signal.SIGINT)
    stopped = started.end()
    assert (stopped.returncode, "Traceback" in stopped.stderr) == (130, False)
    assert all(map(gone, workers))
    tell(
        "killed",
        "Ctrl-C twice in a sweep whose jobs run side by side and do not stop",
        seen=stopped.stderr,
        survived="no process of a job",
    )


def test_jobs_do_not_outlive_a_sweep_that_is_killed(whole, tmp_path, tell):
    folder = tmp_path / "sweep"
    started = with_two_under_way(tmp_path, folder)
    workers = list(map(worker_of, jobs(folder)[:2]))
    started.send(signal.SIGKILL)
    started.end()
    assert all(map(gone, workers))
    done = assert_goes_on(folder, whole)
    tell(
        "killed",
        "SIGKILL of a sweep whose jobs run side by side, then the same command",
        seen=next(line for line in done.stdout.splitlines() if "going on with" in line),
        survived="no process of a job; all jobs' final weights equal those of a sweep that was not stopped",
    )


def test_a_job_that_is_killed_is_its_own_failure(whole, tmp_path, tell):
    folder = tmp_path / "sweep"
    started = with_two_under_way(tmp_path, folder)
    first, *others = jobs(folder)
    os.kill(worker_of(first), signal.SIGKILL)
    done = started.end()
    assert done.returncode == 1
    words = "its process was killed by SIGKILL, as the system does when memory runs out"
    assert f"error: 1 job of the sweep failed:\n  {first.name}: failed: {words}" in done.stderr
    assert states(folder) == [(first.name, "failed"), *((job.name, "completed") for job in others)]
    assert summary(first)["error"] == words
    assert_goes_on(folder, whole)
    tell(
        "killed",
        "SIGKILL of one of the jobs that run side by side",
        seen=done.stderr[done.stderr.index("error: 1 job") :],
        survived="the other jobs and the table; exit status 1; the same command goes on with the one that was killed",
    )


def test_a_job_that_fails_is_a_row_and_its_error_is_under_its_name(tmp_path, tell):
    folder, betas = tmp_path / "sweep", ("0.1", "-1")
    done = typed(*command(folder, "trainer.max_steps=2", betas=betas))
    assert done.returncode == 1
    assert "beta=-1  | error: beta=-1.0 must be positive" in done.stderr
    assert re.search(r"^beta=-1  \| failed after 0:\d\d  beta=-1.0 must be positive", done.stdout, re.M)
    assert "error: 1 job of the sweep failed:\n  1_beta--1: failed: ValueError: beta=-1" in done.stderr
    assert states(folder) == [("0_beta-0.1", "completed"), ("1_beta--1", "failed")]
    tell(
        "lost",
        "a sweep in which one of the jobs that run side by side fails",
        seen=done.stderr[done.stderr.index("error: 1 job") :],
        survived="the other jobs and the table; exit status 1",
    )


def onto(descriptor, *arguments):
    os.dup2(descriptor, 1)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    typed_here(*arguments)


def into_a_pipe_that_nobody_reads(*arguments):
    reading, writing = os.pipe()
    os.close(reading)
    onto(writing, *arguments)


def onto_a_full_disk(*arguments):
    onto(os.open("/dev/full", os.O_WRONLY), *arguments)


@pytest.mark.parametrize("terminal", [into_a_pipe_that_nobody_reads, onto_a_full_disk])
def test_a_sweep_goes_on_without_a_terminal(tmp_path, terminal, tell):
    folder = tmp_path / "sweep"
    process = forked(tmp_path, terminal, *command(folder, "trainer.max_steps=2"))
    process.join(timeout=120)
    assert process.exitcode == 0, (tmp_path / "err").read_text()
    assert states(folder) == [(job.name, "completed") for job in jobs(folder)]
    tell(
        "untidy",
        f"the output of a sweep whose jobs run side by side goes {terminal.__name__.replace('_', ' ')}",
        seen=(tmp_path / "err").read_text() or "nothing",
        survived="every job and the table; exit status 0",
    )
