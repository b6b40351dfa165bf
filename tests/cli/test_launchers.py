"""Sweeps by joblib and submitit: the numbers of jobs one after the other, what they share made once, GPUs in turn, a
stop that lets jobs save themselves, and, on a cluster that is pretended, jobs that are queued again."""

import json
import os
import signal
import sys
import time
from functools import cache
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from dpo_ref.cli import sweep as end_of_sweep
from dpo_ref.cli.command_line import check_command_line
from dpo_ref.cli.launchers import SlurmConfig, SlurmLaunching, executor_of
from dpo_ref.cli.slots import Slots, slots_for, visible_gpus
from tests.support.command import ROOT, forked, typed, typed_afresh
from tests.support.faults import SMALL, Typed, same_weights, steps, summary
from tests.support.pretended_slurm import PretendedSlurm
from tests.support.ranks import typed_on_ranks

BETAS = ("0.1", "3")
JOBS = [f"{index}_beta-{beta}" for index, beta in enumerate(BETAS)]
SHARING = [*SMALL, "reference=initial", f"beta={','.join(BETAS)}"]


@pytest.fixture(scope="module", autouse=True)
def without_evaluation():
    """Sweeps that end when their jobs have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(end_of_sweep, "subprocess", SimpleNamespace(run=lambda *_, check: SimpleNamespace(returncode=0)))
        patch.setattr(end_of_sweep, "print_next", lambda *_: None)
        yield


NOTES_MOVES = """
import glob, os, sys, time
tables = os.environ["DPO_REF_CACHE"] + "/reference/"
moves = os.environ["MOVES"]
def note(event, arguments):
    if event == "open" and str(arguments[0]).startswith(tables) and str(arguments[0]).endswith(".lock"):
        os.mkdir(f"{moves}/{os.getpid()}") if not os.path.exists(f"{moves}/{os.getpid()}") else None
    if event == "os.rename" and str(arguments[1]).startswith(tables):
        deadline = time.monotonic() + 20
        while len(glob.glob(f"{moves}/*")) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        with open(f"{moves}.txt", "a") as file:
            file.write(f"{arguments[1]}\\n")
sys.addaudithook(note)
"""  # as sitecustomize.py: which tables processes put into the cache, the first once another is about to make the same


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """The same sweep one job after the other and by launchers of this machine, each when it is asked for; what was
    put into the cache."""
    root = tmp_path_factory.mktemp("sweeps")
    (root / "sitecustomize.py").write_text(NOTES_MOVES)

    @cache
    def by(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(root))
            patch.setenv("DPO_REF_CACHE", str(root / f"cache of {name}"))
            patch.setenv("MOVES", str(root / f"moves of {name}"))
            (root / f"moves of {name}").mkdir()
            words = [f"hydra/launcher={name}", *(["hydra.launcher.n_jobs=2"] if name != "basic" else [])]
            done = typed("train.py", "-m", *SHARING, f"output_dir={root / name}", *words)
            assert done.returncode == 0, done
            (root / f"{name}.txt").write_text(done.stdout)
        return root / name

    return by


LAUNCHERS = ["joblib", "submitit_local"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_jobs_are_those_of_a_sweep_that_runs_them_one_after_the_other(sweeps, launcher):
    for job in JOBS:
        assert summary(sweeps(launcher) / job)["status"] == "completed"
        assert same_weights(sweeps(launcher) / job, sweeps("basic") / job)
    told = sweeps(launcher).with_suffix(".txt").read_text()
    assert "2 jobs, 2 at a time, 1 thread each\n" in told
    assert "; 2 of 2\n" in told


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_what_jobs_share_is_made_by_one_of_them(sweeps, launcher):
    root = sweeps(launcher).parent
    made = (root / f"moves of {launcher}.txt").read_text().splitlines()
    assert len(list((root / f"moves of {launcher}").iterdir())) == 2  # both came to it before it was there
    assert made == [str(path) for path in (root / f"cache of {launcher}" / "reference").glob("*/*.safetensors")]
    assert len(made) == 1


@pytest.mark.slow
def test_names_stand_before_what_the_jobs_of_joblib_print(sweeps):
    told = sweeps("joblib").with_suffix(".txt").read_text()
    for beta in BETAS:
        assert f"beta={beta} | data: 32 groups to train on, 8 held out\n" in told
        assert f"beta={beta}: done; " in told


@pytest.mark.slow
def test_what_submitit_writes_lies_in_the_folder_of_the_sweep(sweeps):
    logs = sorted(path.name for path in (sweeps("submitit_local") / ".submitit").iterdir())
    assert [name.partition("_")[2] for name in logs] == 2 * ["0_log.err", "0_log.out", "0_result.pkl", "submitted.pkl"]
    assert not list(sweeps("submitit_local").glob("**/%j"))


# --- how many, and on which GPU


def test_how_many_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def count_and_threads(n_jobs, gpus, num_jobs=100):
        slots = slots_for(n_jobs, num_jobs, gpus, tmp_path)
        return slots.count, slots.threads

    assert count_and_threads(None, []) == (16, 1)
    assert count_and_threads(None, ["0", "1", "2", "3"]) == (4, 4)
    assert count_and_threads(8, ["0", "1", "2", "3"]) == (8, 2)
    assert count_and_threads(-1, ["0"]) == (16, 1)
    assert count_and_threads(None, [], num_jobs=3) == (3, 5)
    for refused in (0, -2):
        with pytest.raises(ValueError, match=rf"hydra\.launcher\.n_jobs={refused} must be at least 1"):
            slots_for(refused, 2, [], tmp_path)


def test_the_gpus_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr("dpo_ref.distributed.num_gpus", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8a,7")
    assert visible_gpus() == ["5", "GPU-8a"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == ["0", "1"]


def note_gpu(slots, folder, index):
    def work():
        (folder / f"{index} {time.monotonic()} {os.environ['CUDA_VISIBLE_DEVICES']} begins").touch()
        time.sleep(0.4)
        (folder / f"{index} {time.monotonic()} {os.environ['CUDA_VISIBLE_DEVICES']} ends").touch()

    slots.work(work)


def test_jobs_wait_for_a_slot_and_have_its_gpu(tmp_path):
    slots, notes = Slots(tmp_path, 3, 1, ("4", "6")), tmp_path / "notes"
    slots.open()
    notes.mkdir()
    processes = []
    for index in range(6):
        (tmp_path / str(index)).mkdir()
        processes.append(forked(tmp_path / str(index), note_gpu, slots, notes, index))
    for process in processes:
        process.join(timeout=30)
        assert process.exitcode == 0
    events = sorted((path.name.split() for path in notes.iterdir()), key=lambda event: float(event[1]))
    running, at_once = [], []
    for _, _, gpu, what in events:
        running.append(gpu) if what == "begins" else running.remove(gpu)
        at_once.append(sorted(running))
    assert len(events) == 12
    assert all(len(gpus) <= 3 and gpus.count("4") <= 2 and gpus.count("6") <= 1 for gpus in at_once)
    assert ["4", "4", "6"] in at_once


# --- what is typed


def test_ours_are_found_where_plugins_of_these_names_are_installed(tmp_path, monkeypatch):
    plugin = tmp_path / "hydra_plugins" / "zz_joblib"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text(
        "from hydra.core.config_store import ConfigStore\n"
        "for name in ('joblib', 'submitit_local', 'submitit_slurm'):\n"
        "    ConfigStore.instance().store(group='hydra/launcher', name=name, node={'_target_': 'theirs'})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu"]
    done = typed_afresh("train.py", *words, "--cfg", "hydra", "-p", "hydra.launcher")
    assert done.returncode == 0, done
    assert "Warning" not in done.stderr
    for told in ("hydra_plugins.submitit.SlurmLauncher", "partition: gpu", "signal_delay_s: 120"):
        assert told in done.stdout, done


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["hydra/launcher=joblib", "hydra.launcher.n_job=2"], "did you mean hydra.launcher.n_jobs?"),
        (["hydra/launcher=joblib", "hydra.launcher.partition=gpu"], "known: hydra.launcher."),
        (["hydra/launcher=submitit_slurm", "hydra.launcher.gpus=2"], "did you mean hydra.launcher.qos?|known: hydra"),
    ],
)
def test_an_option_of_another_launcher_is_refused(words, refusal):
    with pytest.raises(ValueError, match=refusal):
        check_command_line(words, "train")


def test_without_submitit_the_remedy_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"submitit_local needs submitit: pip install -r requirements-sweeps\.txt"):
        executor_of("local", tmp_path, {})
    assert "submitit" in (ROOT / "requirements-sweeps.txt").read_text()


# --- on a cluster


def options(folder, **given):
    config = vars(SlurmConfig()) | {"submitit_folder": str(folder), "name": "train"} | given
    return {key: value for key, value in config.items() if key != "_target_"}


def test_without_a_cluster_the_remedy_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"there is no srun here; .*hydra/launcher=submitit_local"):
        SlurmLaunching(**options(tmp_path)).executor()


def test_the_script_for_sbatch(monkeypatch, tmp_path):
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    given = options(
        tmp_path / "logs", partition="gpu", gpus_per_node=4, tasks_per_node=4, timeout_min=90,
        setup=["module load cuda"], additional_parameters={"mail-type": "END"},
    )  # fmt: skip
    executor = SlurmLaunching(**given).executor()
    script = executor._executor._make_submission_file_text("python job", "0")
    asked = {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")}
    assert {
        "job-name=train", "partition=gpu", "nodes=1", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=8",
        "time=90", "signal=USR1@120", "requeue", "open-mode=append", "mail-type=END",
        f"output={tmp_path}/logs/%j_0_log.out",
    } <= asked, script  # fmt: skip
    setup = script[script.index("# setup") : script.index("# command")].splitlines()
    assert setup[1:5] == [
        f"export PYTHONPATH={ROOT}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export SUBMITIT_PREEMPT_SIGNAL=USR1",  # by which submitit knows that the job is to be queued again
        "export OMP_NUM_THREADS=8",
        "module load cuda",
    ]
    assert executor._executor.max_num_timeout == 20


LONGER = [*SMALL, "trainer.epochs=20", "trainer.save_every=10"]
OF_LONGER = [f"{index}_beta-{beta}" for index, beta in enumerate(("0.1", "0.3", "3"))]


def long_sweep(folder, launcher):
    share = "cpus_per_task=1" if launcher == "submitit_slurm" else "n_jobs=2"
    launched = [f"hydra/launcher={launcher}", f"hydra.launcher.{share}"]
    return ["train.py", "-m", *LONGER, "beta=0.1,0.3,3", f"output_dir={folder}", *launched]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    done = typed(*long_sweep(folder, "side_by_side"))
    assert done.returncode == 0, done
    return folder


def with_two_under_way(tmp_path, folder, launcher):
    started = Typed(tmp_path / "shell", *long_sweep(folder, launcher), before=lambda: os.setpgid(0, 0))
    begun = [folder / job for job in OF_LONGER]
    started.until(lambda: sum(steps(job) > 3 for job in begun) == 2)
    return started, [job for job in begun if steps(job) > 3]


def worker_of(job):
    return json.loads((job / ".lock").read_text())["pid"]


def gone(process):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def assert_resumes(folder, whole, *words):
    done = typed("train.py", f"resume_sweep={folder}", *words)
    assert done.returncode == 0, done
    assert all(same_weights(folder / job, whole / job) for job in OF_LONGER)
    return done


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_stop_lets_each_job_save_itself_and_resume_sweep_goes_on(whole, tmp_path, launcher):
    folder = tmp_path / "sweep"
    started, begun = with_two_under_way(tmp_path, folder, launcher)
    workers = list(map(worker_of, begun))
    os.killpg(started.process.pid, signal.SIGINT)  # as a terminal does
    stopped = started.end()
    assert (stopped.returncode, "Traceback" in stopped.stderr) == (130, False), stopped
    assert all(map(gone, workers))
    assert [summary(job)["status"] for job in begun] == ["interrupted"] * 2
    assert sum((folder / job / "config.yaml").exists() for job in OF_LONGER) == 2
    assert f"go on with\n  python {' '.join(long_sweep(folder, launcher))}" in stopped.stderr
    done = assert_resumes(folder, whole, "hydra/launcher=side_by_side")
    assert "0 of 3 jobs are finished\n" in done.stdout
    assert done.stdout.count("going on with") == 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_one_at_a_time_and_rung_by_rung(tmp_path, launcher):
    search = ["+search=halving", "search.rungs=2", "search.eta=2", "trainer.eval_every=3", "trainer.epochs=3"]
    launched = [f"hydra/launcher={launcher}", "hydra.launcher.n_jobs=1"]
    done = typed("train.py", "-m", *SHARING, *search, *launched, f"output_dir={tmp_path / 'sweep'}")
    assert done.returncode == 0, done
    assert "2 jobs, 1 at a time" in done.stdout
    assert "1 job, 1 at a time" in done.stdout
    assert sorted(summary(tmp_path / "sweep" / job)["status"] for job in JOBS) == ["completed", "stopped"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_second_stop_kills_the_jobs(tmp_path, launcher):
    folder = tmp_path / "sweep"
    started, begun = with_two_under_way(tmp_path, folder, launcher)
    workers = list(map(worker_of, begun))
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)  # as one that does not come to save itself
    os.killpg(started.process.pid, signal.SIGINT)
    started.until(lambda: "stopping" in (started.folder / "out").read_text())
    os.killpg(started.process.pid, signal.SIGINT)
    stopped = started.end()
    assert (stopped.returncode, "Traceback" in stopped.stderr) == (130, False), stopped
    assert all(map(gone, workers))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_jobs_do_not_outlive_a_sweep_that_is_killed(tmp_path, launcher):
    started, begun = with_two_under_way(tmp_path, tmp_path / "sweep", launcher)
    workers = list(map(worker_of, begun))
    started.send(signal.SIGKILL)
    started.end()
    assert all(map(gone, workers))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "why", "others"),
    [
        ("joblib", "joblib ends all of its processes when one is killed", []),
        ("submitit_local", "its process ended without a result: ", ["completed"] * 2),
    ],
)
def test_a_job_that_is_killed_is_told_and_resume_sweep_goes_on(whole, tmp_path, launcher, why, others):
    folder = tmp_path / "sweep"
    started, (first, *_) = with_two_under_way(tmp_path, folder, launcher)
    os.kill(worker_of(first), signal.SIGKILL)
    done = started.end()
    assert done.returncode == 1, done
    assert why in done.stderr
    assert f"  python train.py resume_sweep={folder} hydra/launcher={launcher} hydra.launcher.n_jobs=2" in done.stderr
    completed = [
        job for job in OF_LONGER if (folder / job).exists() and summary(folder / job)["status"] == "completed"
    ]
    assert len(completed) == len(others)
    assert_resumes(folder, whole, "hydra/launcher=side_by_side")


# --- a cluster that is pretended


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    return PretendedSlurm(tmp_path, monkeypatch)


@pytest.mark.slow
def test_a_job_whose_time_is_up_is_queued_again_and_goes_on(whole, slurm, tmp_path):
    folder = tmp_path / "sweep"
    started = Typed(tmp_path / "shell", *long_sweep(folder, "submitit_slurm"))
    started.until(lambda: steps(folder / OF_LONGER[0]) > 3)
    slurm.send("100_0", signal.SIGUSR1)
    done = started.end()
    assert done.returncode == 0, done
    assert slurm.requeued == ["100_0"]
    log = (folder / ".submitit" / "100_0_0_log.out").read_text()
    assert log.index("stopped at step") < log.index(f"going on with {folder / OF_LONGER[0]}, which is interrupted")
    assert all(same_weights(folder / job, whole / job) for job in OF_LONGER)
    assert (folder / "sweep.csv").is_file()  # by a job of its own
    assert slurm.state("101") == "COMPLETED"


@pytest.mark.slow
def test_tasks_of_a_job_are_the_ranks_of_its_run(slurm, tmp_path):
    """Stopped together, queued again and gone on with; the evaluation is one task."""
    folder, run = tmp_path / "sweep", [*SMALL, "trainer.epochs=10", "beta=0.3"]
    words = ["parallel=ddp", "hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=2"]
    started = Typed(tmp_path / "shell", "train.py", "-m", *run, "seed=1,2", *words, f"output_dir={folder}")
    started.until(lambda: steps(folder / "0_seed-1") > 3)
    slurm.send("100_0", signal.SIGUSR1)
    done = started.end()
    assert done.returncode == 0, done
    assert slurm.requeued == ["100_0"]
    assert [summary(folder / job)["status"] for job in ("0_seed-1", "1_seed-2")] == ["completed"] * 2
    assert (folder / "sweep.csv").is_file()
    log = (folder / ".submitit" / "100_0_0_log.out").read_text()
    assert log.index("stopped at step") < log.index(f"going on with {folder / '0_seed-1'}, which is interrupted")
    alone = typed("train.py", *run, "seed=1", f"output_dir={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone
    assert steps(folder / "0_seed-1") == steps(tmp_path / "alone")
    ours, theirs = (
        load_file(job / "policy" / "model.safetensors") for job in (folder / "0_seed-1", tmp_path / "alone")
    )
    assert max((ours[name] - value).abs().max() for name, value in theirs.items()) < 1e-4


def test_torchrun_starts_one_run_and_no_sweep(tmp_path):
    first, other = typed_on_ranks(tmp_path, 2, "train.py", "-m", *SMALL, "beta=0.1,1", "parallel=ddp")
    assert first.returncode == other.returncode == 1
    assert "torchrun starts the ranks of one run, and -m asks for several" in first.stderr
    assert other.stderr == ""


@pytest.mark.slow
def test_a_stop_cancels_the_jobs_of_a_cluster(whole, slurm, tmp_path):
    folder = tmp_path / "sweep"
    started = Typed(tmp_path / "shell", *long_sweep(folder, "submitit_slurm"))
    started.until(lambda: all(steps(folder / job) > 3 for job in OF_LONGER))
    started.send(signal.SIGINT)
    stopped = started.end()
    assert (stopped.returncode, "Traceback" in stopped.stderr) == (130, False), stopped
    for index in range(3):
        deadline = time.monotonic() + 20
        while slurm.state(f"100_{index}") != "COMPLETED" and time.monotonic() < deadline:
            time.sleep(0.05)
    assert [summary(folder / job)["status"] for job in OF_LONGER] == ["interrupted"] * 3
    assert slurm.requeued == []
    refused = typed("train.py", f"resume_sweep={folder}")
    assert "the sweep ran on a cluster: add hydra/launcher=submitit_slurm" in refused.stderr
    assert_resumes(folder, whole, "hydra/launcher=side_by_side")
