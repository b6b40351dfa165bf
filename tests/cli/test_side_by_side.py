"""Jobs side by side: the numbers of jobs one after the other, what they share made once, and what is shown of them."""

import csv
import json
import re
import time
from functools import partial
from types import SimpleNamespace

import pytest

from dpo_ref.cli import sweep as end_of_sweep
from dpo_ref.cli.side_by_side import SideJob, at_a_time, cores, run_side_by_side, swept_names, threads_each
from dpo_ref.cli.sweep import print_next
from dpo_ref.files.cache import made_by_one
from dpo_ref.tracking.side_by_side import Activity, JobProgress, JobRow, seconds_left
from dpo_ref.tracking.terminal import progress, say
from tests.support.command import forked, typed, typed_afresh
from tests.support.faults import SMALL, same_weights
from tests.support.kills import without_clock
from tests.support.pictures import undrawn
from tests.support.pseudo_terminal import at_terminal

QUICK = ["generation.max_new_tokens=8", "generation.samples_per_prompt=1"]
BESIDE = ["hydra/launcher=side_by_side", "hydra.launcher.n_jobs=2"]
JOBS = ["0_beta-0.1", "1_beta-3"]
EVALUATED = ["evaluation.every=2", "evaluation.num_prompts=2", "evaluation.max_new_tokens=4"]


def sweep(folder, *words):
    """A sweep with its evaluation, which imports nothing again."""
    with pytest.MonkeyPatch.context() as patch, undrawn():
        run = SimpleNamespace(run=lambda command, check: typed(*command[1:], *QUICK))
        patch.setattr(end_of_sweep, "subprocess", run)
        return typed("train.py", "-m", *SMALL, *EVALUATED, f"output_dir={folder}", "beta=0.1,3", *words)


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """Twice side by side, and one after the other; and what the first printed."""
    root = tmp_path_factory.mktemp("sweeps")
    done = {
        name: sweep(root / name, *words) for name, words in {"first": BESIDE, "second": BESIDE, "serial": []}.items()
    }
    assert [each.returncode for each in done.values()] == [0, 0, 0], done
    return root, done["first"]


def numbers(job):
    """Of every step and of the evaluation, but for those of the clock."""
    rows = [without_clock(json.loads(line)) for line in (job / "metrics.jsonl").read_text().splitlines()]
    return rows, json.loads((job / "evaluation" / "evaluation.json").read_text())["metrics"]


@pytest.mark.parametrize("pair", [("first", "second"), ("serial", "first")])
def test_the_same_sweep_gives_equal_numbers_however_its_jobs_run(sweeps, pair):
    one, other = (sweeps[0] / name for name in pair)
    for job in JOBS:
        assert same_weights(one / job, other / job)
        assert numbers(one / job) == numbers(other / job)
        answers = [(root / job / "evaluation" / "generations.jsonl").read_bytes() for root in (one, other)]
        assert answers[0] == answers[1]
    assert (one / "sweep.csv").read_text() == (other / "sweep.csv").read_text()


def test_a_row_is_for_each_job_with_its_results(sweeps):
    rows = list(csv.DictReader((sweeps[0] / "first" / "sweep.csv").read_text().splitlines()))
    assert [(row["job"], row["status"]) for row in rows] == [(job, "completed") for job in JOBS]
    assert all(row["winrate/initial"] for row in rows)


def test_another_sweep_is_named_unless_it_is_this_one(sweeps, capsys):
    for words, said in ([["-m"], 1], [["-m", "data.length_bias=0"], 0]):
        print_next(sweeps[0] / "first", words, ["data.length_bias=0"])
        out = capsys.readouterr().out
        assert out.count("another sweep, with data.length_bias=0") == said
        assert out.count("two seeds more") == 1


def test_each_job_has_its_name_before_what_it_says_and_one_line_at_its_end(sweeps):
    out = sweeps[1].stdout
    assert re.search(r"^2 jobs, 2 at a time, 1 thread each", out, re.M)
    for name in ("beta=0.1", "beta=3  "):
        assert re.search(rf"^{name} \| gold \d\.\d+  \d+\.\d tokens  KL 0\.00  \(before training\)$", out, re.M)
        assert len(re.findall(rf"^{name} \| done after \d:\d\d  .*train/loss 0\.6931 -> ", out, re.M)) == 1
    assert len(re.findall("groups to train on", out)) == 1  # what all jobs say is said once
    assert out.count("evaluate.py policy=") == 1  # what to type next is said at the end of the sweep


@pytest.mark.slow
def test_a_job_of_two_threads_ends(tmp_path, monkeypatch):
    """Forked from a process that has no threads of its own yet: see tests/test_layers.py."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    words = [*SMALL, "beta=1", "hydra/launcher=side_by_side", f"output_dir={tmp_path / 'sweep'}", *BESIDE[:1]]
    done = typed_afresh("train.py", "-m", *words, "hydra.launcher.n_jobs=1")
    assert done.returncode == 0, done.stderr
    if cores() > 1:
        assert "1 job, 1 at a time, 2 threads each" in done.stdout


def test_names_are_what_tells_jobs_apart():
    jobs = [["+experiment=demo", "beta=0.1", "seed=0"], ["+experiment=demo", "beta=3", "seed=0"]]
    assert swept_names(jobs) == ["beta=0.1", "beta=3"]
    assert swept_names([["model=lab"]]) == ["model=lab"]
    assert swept_names([["reference.path=lab\\:strong"]]) == ["reference.path=lab:strong"]
    assert swept_names([["beta=1", "hydra.sweep.subdir=0_a"], ["beta=2", "hydra.sweep.subdir=1_b"]]) == [
        "beta=1",
        "beta=2",
    ]


def test_how_many_jobs_and_threads(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert at_a_time(None, "n_jobs") == 8
    assert [threads_each(n) for n in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads_each(2) == 1
    with pytest.raises(ValueError, match="n_jobs=0 must be at least 1"):
        at_a_time(0, "n_jobs")


def test_jobs_beside_a_policy_have_no_effect():
    done = typed("evaluate.py", "policy=lab:tiny", "n_jobs=2")
    assert done.returncode == 1
    assert "n_jobs has no effect" in done.stderr


def running(done: int, seconds: float) -> JobProgress:
    """A job that began its 10 steps so many seconds before 100."""
    return JobProgress((Activity("training", 10, 0, done, 100.0 - seconds, takes_most=True),))


def test_time_left_is_that_of_the_last_job_to_end():
    fast = JobRow("a", "running", began=90.0, progress=running(5, 10))  # 10 s left of 20
    slow = JobRow("b", "running", began=70.0, progress=running(5, 30))  # 30 s left of 60
    waiting = [JobRow("c"), JobRow("d")]  # 40 s each, as the mean of both
    assert seconds_left([fast, slow], 2, 100.0) == 30
    assert seconds_left([fast, slow, *waiting], 2, 100.0) == 70  # c from 10 to 50, d from 30 to 70
    assert seconds_left(waiting, 2, 100.0) is None
    starting = JobRow("e", "running", began=95.0)  # nothing known: as long as the other
    assert seconds_left([fast, starting], 2, 100.0) == 15


def make(folder, entry):
    with made_by_one(entry):
        if not entry.exists():
            time.sleep(0.3)
            entry.mkdir()
            (folder / f"made {time.monotonic()}").touch()


def test_what_several_lack_is_made_by_one_of_them(tmp_path):
    entry = tmp_path / "cache" / "tokens" / "abc"
    processes = []
    for name in "ab":
        (tmp_path / name).mkdir()
        processes.append(forked(tmp_path / name, make, tmp_path, entry))
    for process in processes:
        process.join(timeout=20)
        assert process.exitcode == 0
    assert len(list(tmp_path.glob("made *"))) == 1
    assert [path.name for path in entry.parent.iterdir()] == ["abc"]


def busy(name):
    for step in progress(range(3), f"counting \x1b[5m{name}"):
        say(f"\x1b]0;mine\x07{name} says {step}", "all say this")
        time.sleep(0.6)  # a frame must come in between, on a busy machine too


def test_on_a_terminal_all_jobs_are_one_display_below_what_they_say():
    jobs = [SideJob(f"job={name}", partial(busy, name)) for name in ("x", "\x1b[2Jy")]
    screen = at_terminal(lambda: run_side_by_side(jobs, 2), columns=100)
    assert screen.returncode == 0
    assert re.search(r"^job=x {8}━+╺?━* counting \\x1b\[5mx +1/3", screen.shown, re.M)
    assert r"job=x        | \x1b]0;mine\x07x says 2" in screen.shown
    assert screen.shown.count("| all say this") == 3
    assert re.search(r"2 done\njob=x +━+ done +\d:\d\d *\njob=\\x1b\[2Jy ━+ done +\d:\d\d *\s*$", screen.shown)
    assert all(b"\x1b" + code not in screen.sent for code in (b"[2J", b"]0;", b"[5m"))
