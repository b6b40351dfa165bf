"""`resume_sweep=<folder>` runs what is left of a sweep and nothing else, and takes from it only what was swept."""

import re
import shutil
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from dpo_ref.cli import sweep as end_of_sweep
from dpo_ref.cli.resume_sweep import written_out
from tests.support.command import typed
from tests.support.faults import SMALL, summary
from tests.support.sweeps import short_evaluation  # noqa: F401 (a fixture)

JOBS = ["0_beta-0.1", "1_beta--1", "2_beta-3"]
NO_EVALUATION = SimpleNamespace(run=lambda *_, check: SimpleNamespace(returncode=0))
BESIDE = ["hydra/launcher=side_by_side", "hydra.launcher.n_jobs=2"]


@pytest.fixture(scope="module")
def a_job_failed(tmp_path_factory):
    """A sweep of which one job cannot be run, and what it ended with."""
    folder = tmp_path_factory.mktemp("sweep") / "my sweep"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(end_of_sweep, "subprocess", NO_EVALUATION)
        patch.setattr(end_of_sweep, "print_next", lambda *_: None)
        done = typed("train.py", "-m", *SMALL, "beta=0.1,-1,3", f"hydra.sweep.dir='{folder}'", *BESIDE, "stage=train")
    assert done.returncode == 1, done
    return folder, done


@pytest.fixture
def left(a_job_failed, tmp_path):
    """Of that sweep one job failed and one was never begun."""
    folder = shutil.copytree(a_job_failed[0], tmp_path / "my sweep")
    shutil.rmtree(folder / JOBS[2])
    (folder / JOBS[0] / "config.yaml").unlink()  # whoever looked into the job that is finished would begin it anew
    return folder


def test_a_sweep_with_a_failed_job_names_the_command(a_job_failed):
    folder, done = a_job_failed
    words = [
        "once that is mended, these alone are run by",
        f"  python train.py 'resume_sweep={folder}' {' '.join(BESIDE)}",
    ]
    assert done.stderr.splitlines()[-2:] == words


def test_what_is_left_is_run_and_nothing_else(left):
    record = (left / "multirun.yaml").read_bytes()
    done = typed("train.py", f"resume_sweep={left}")
    assert done.returncode == 1
    told = done.stdout.splitlines()[:4]
    assert told[:3] == [
        "1 of 3 jobs are finished: 0_beta-0.1",
        "  1_beta--1: failed: ValueError: beta=-1.0 must be positive and finite",
        "  2_beta-3: not begun",
    ]
    assert told[3].startswith("2 jobs, 2 at a time")  # by the launcher of the sweep
    assert summary(left / JOBS[2])["status"] == "completed"
    assert not (left / JOBS[0] / "config.yaml").exists()
    assert sorted(path.name for path in left.glob("[0-9]*")) == JOBS
    assert (left / "multirun.yaml").read_bytes() == record
    assert f"python train.py 'resume_sweep={left}'" in done.stderr


def with_record(folder, **words):
    """A record of a sweep like Hydra's."""
    folder.mkdir()
    task = words.get("task", ["beta=0.1,3", "tracking=wandb", "tracking.project=mine"])
    hydra = words.get("hydra", [*BESIDE, "hydra.mode=MULTIRUN", "hydra.launcher._target_=os.system"])
    config = OmegaConf.create({"hydra": {"overrides": {"task": task, "hydra": hydra}}})
    OmegaConf.save(config, folder / "multirun.yaml")
    return folder


def test_where_nothing_is_left_it_evaluates_or_says_so(a_job_failed, tmp_path, monkeypatch):
    folder = shutil.copytree(a_job_failed[0], tmp_path / "sweep")
    shutil.rmtree(folder / JOBS[1])
    (folder / JOBS[2]).rename(folder / "1_beta-3")
    record = OmegaConf.load(folder / "multirun.yaml")
    record.hydra.overrides.task = [re.sub("^beta=.*", "beta=0.1,3", word) for word in record.hydra.overrides.task]
    OmegaConf.save(record, folder / "multirun.yaml")
    evaluated = typed("train.py", f"resume_sweep={folder}")
    assert evaluated.returncode == 0, evaluated
    assert "nothing is left to train; what has not been evaluated is now\nevaluating the sweep" in evaluated.stdout
    assert (folder / "sweep.csv").is_file()
    assert "two seeds more, which join these:" in evaluated.stdout
    assert "hydra/sweeper" not in evaluated.stdout
    again = typed("train.py", f"resume_sweep={folder}", "hydra/launcher=joblib")
    assert again.returncode == 0, again
    assert again.stdout.splitlines() == [
        "2 of 2 jobs are finished: 0_beta-0.1, 1_beta-3",
        f"nothing is left to do: {folder / 'report.html'} has the results",
    ]
    (folder / "sweep.csv").unlink()  # as where the evaluation was killed before its table
    monkeypatch.setattr(end_of_sweep, "subprocess", NO_EVALUATION)
    assert "nothing is left to train; " in typed("train.py", f"resume_sweep={folder}").stdout


def test_the_command_is_the_sweep_s_with_what_is_typed_in_its_place(tmp_path):
    folder = with_record(tmp_path / "sweep")
    end = ["hydra/sweeper=unfinished", f"hydra.sweep.dir='{folder}'"]
    swept = ["beta=0.1,3", "tracking=wandb", "tracking.project=mine"]
    assert written_out(["beta=1"]) == ["beta=1"]
    assert written_out([f"resume_sweep={folder}"]) == ["-m", *swept, *BESIDE, *end]
    typed_words = ["--config-dir", "mine", f"resume_sweep={folder}", "-m", "hydra/launcher=joblib", "tracking=none"]
    assert written_out(typed_words) == [
        *("--config-dir", "mine", "-m", "beta=0.1,3"),
        *("hydra/launcher=joblib", "tracking=none", *end),
    ]


def test_a_search_goes_on_by_its_own_sweeper(tmp_path):
    folder = with_record(tmp_path / "sweep", task=["+search=halving", "beta=0.1,3"])
    assert "hydra/sweeper=unfinished" not in written_out([f"resume_sweep={folder}"])


@pytest.mark.parametrize(
    "word", ["beta=3", "seed=1", "output_dir=elsewhere", "hydra.sweep.dir=elsewhere", "resume=run"]
)
def test_what_would_change_the_jobs_is_refused(tmp_path, word):
    folder = with_record(tmp_path / "sweep")
    with pytest.raises(SystemExit, match=f"error: {word} would change what the sweep runs; .* another folder"):
        written_out([f"resume_sweep={folder}", word])


def test_a_folder_that_is_no_sweep_is_refused(a_job_failed, tmp_path):
    with pytest.raises(SystemExit, match=r"is no sweep's folder, as it has no multirun\.yaml; give the folder"):
        written_out([f"resume_sweep={tmp_path}"])
    run = a_job_failed[0] / JOBS[0]
    with pytest.raises(SystemExit, match=f"it is a run's: resume={run} goes on with that"):
        written_out([f"resume_sweep={run}"])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"task": ["objective._target_=os.system"]}, "which is no option of a run"),
        ({"task": ["beta=${oc.env:HOME}"]}, "which is no option of a run"),
        ({"task": ["objective=dpo,../../mine"]}, "which is no name of a file in conf/"),
        ({"hydra": ["hydra.sweeper.params.beta='${oc.env:HOME}'"]}, "which is no option of a run"),
        ({"task": None}, "is not Hydra's record of a sweep"),
        (
            {"hydra": ["hydra/launcher=submitit_slurm"]},
            "the sweep ran on a cluster: add hydra/launcher=submitit_slurm",
        ),
    ],
)
def test_a_record_composes_nothing_but_options(tmp_path, words, why):
    folder = with_record(tmp_path / "sweep", **words)
    with pytest.raises(SystemExit, match=re.escape(why)):
        written_out([f"resume_sweep={folder}"])
