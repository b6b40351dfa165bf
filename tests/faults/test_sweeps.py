"""A sweep that is killed, stopped, repeated and shared: finished jobs are kept, a failure is never exit status 0."""

import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpo_ref.cli import sweep as end_of_sweep
from tests.support.command import typed
from tests.support.faults import SMALL, Typed, same_weights, steps, summary
from tests.support.sweeps import BETAS, QUICK, jobs, short_evaluation  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow  # `make faults` runs it

LONGER = [*SMALL, "trainer.epochs=2", "trainer.save_every=2"]


def command(folder, *words, betas=BETAS):
    return ["train.py", "-m", *LONGER, f"output_dir={folder}", f"beta={','.join(betas)}", *words]


def table(folder):
    """Job, status and error of each line."""
    return [line.split(",")[:3] for line in (folder / "sweep.csv").read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep that was not stopped, without its evaluation."""
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(end_of_sweep, "subprocess", SimpleNamespace(run=lambda *_, check: SimpleNamespace(returncode=0)))
        done = typed(*command(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def in_its_second_job(tmp_path, folder):
    started = Typed(tmp_path / "first", *command(folder))
    started.until(lambda: steps(jobs(folder)[1]) > 3)
    return started


@pytest.mark.parametrize(
    "signum", [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_stopped_sweep_goes_on_with_the_same_command(whole, tmp_path, signum, tell):
    folder = tmp_path / "sweep"
    first, second, third = jobs(folder)
    started = in_its_second_job(tmp_path, folder)
    started.send(signum)
    stopped = started.end()
    assert not third.exists()
    policy = (first / "policy" / "model.safetensors").stat().st_mtime_ns
    if signum != signal.SIGKILL:
        assert (stopped.returncode, "Traceback" in stopped.stderr) == (130, False)
        again = f"go on with\n  python train.py -m {' '.join(LONGER)} output_dir={folder}"
        assert again in stopped.stderr
    done = typed(*command(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"kept: {first} is completed" in done.stdout
    assert f"going on with {second}" in done.stdout
    assert (first / "policy" / "model.safetensors").stat().st_mtime_ns == policy
    assert [row[:2] for row in table(folder)] == [[job.name, "completed"] for job in jobs(folder)]
    for job, other in zip(jobs(folder), jobs(whole), strict=True):
        assert same_weights(job, other)
        assert summary(job)["identities"] == summary(other)["identities"]
    tell(
        "killed",
        f"{signal.Signals(signum).name} in the second job of a sweep, then the same command",
        seen=stopped.stderr if stopped.stderr else done.stdout.splitlines()[0],
        survived="the finished job; all jobs' final weights equal those of a sweep that was not stopped",
    )


def test_a_sweep_with_a_failed_job_ends_with_its_name_its_error_and_what_to_type(whole, tmp_path, tell):
    folder = shutil.copytree(whole, tmp_path / "sweep")
    betas = (*BETAS, "-1")
    for job in jobs(folder):
        (job / "config.yaml").write_text((job / "config.yaml").read_text().replace(str(whole), str(folder)))
    done = typed(*command(folder, betas=betas))
    assert done.returncode == 1
    assert "error: 1 job of the sweep failed:\n  3_beta--1: failed: ValueError: beta=-1" in done.stderr
    assert f"  python train.py resume_sweep={folder}" in done.stderr
    assert [row[1] for row in table(folder)] == ["completed"] * 3 + ["failed"]
    tell(
        "lost",
        "a sweep in which a job fails",
        seen=done.stderr[done.stderr.index("error: 1 job") :],
        survived="the other jobs and the table; exit status 1",
    )


def test_another_run_in_a_job_s_folder_is_told_and_its_record_survives(whole, tmp_path, tell):
    folder = shutil.copytree(whole, tmp_path / "sweep")
    before = [(job / "summary.json").read_bytes() for job in jobs(folder)]
    done = typed(*command(folder, "optim.lr=0.5"))
    assert done.returncode == 1
    assert f"{jobs(folder)[0]} holds another run, with optim.lr=" in done.stderr
    assert "3 jobs of the sweep failed" in done.stderr
    assert [(job / "summary.json").read_bytes() for job in jobs(folder)] == before
    tell(
        "lost",
        "a sweep with another option into the folder of one that is finished",
        seen=done.stderr[done.stderr.index("error: 3 jobs") :],
        survived="all records byte for byte",
    )


def test_a_second_sweep_in_the_folder_is_told(tmp_path, tell):
    folder = tmp_path / "sweep"
    started = in_its_second_job(tmp_path, folder)
    started.send(signal.SIGSTOP)
    done = typed(*command(folder))
    started.send(signal.SIGKILL)
    started.end()
    assert done.returncode == 1
    assert f"error: {folder} is in use: process {started.process.pid} on" in done.stderr
    assert "Traceback" not in done.stderr
    tell(
        "used silently",
        "the same sweep typed a second time while the first runs",
        seen=done.stderr,
        survived="the first sweep: no job was begun twice",
    )


def test_a_sweep_under_a_default_name_says_what_goes_on_with_it(tmp_path, tell):
    words = ["train.py", "-m", *LONGER, "beta=0.1,0.3", "trainer.epochs=1000"]
    started = Typed(tmp_path, *words)
    started.until(lambda: any(steps(job) > 4 for job in tmp_path.glob("outputs/default/*/0_*")))
    started.send(signal.SIGINT)
    stopped = started.end()
    (folder,) = (path.relative_to(tmp_path) for path in tmp_path.glob("outputs/default/*_sweep"))
    assert f"with output_dir={folder} the same command goes on with it" in stopped.stdout
    assert f"  python {' '.join(words)} output_dir={folder}" in stopped.stderr
    assert not list(Path(tmp_path / folder).glob("1_*"))
    tell(
        "killed",
        "Ctrl-C in a sweep under a default name",
        seen=stopped.stderr,
        survived="its first job, which goes on; the others were not begun",
    )
