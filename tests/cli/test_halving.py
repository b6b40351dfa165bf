"""Successive halving: which cells go on and where rungs lie, by hand; and real searches: what goes on is the run of a
sweep without a search, bit for bit, however it was stopped, and the optimiser steps are counted."""

import importlib
import json
import math
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest

from dpo_ref.cli import sweep as end_of_sweep
from dpo_ref.cli.halving import SearchPlan, Standing, announced, going_on, halving, plan_of
from dpo_ref.cli.sweep import print_next
from dpo_ref.evaluation.sweep import cells as cells_of
from dpo_ref.evaluation.sweep import collect
from tests.support.command import ROOT, resolved, train, typed
from tests.support.faults import SMALL, Typed, same_weights, summary
from tests.support.kills import without_clock
from tests.support.pictures import undrawn

# --- where the rungs are, and who goes on


def steps(num_steps, every, **options):
    return halving(num_steps, every, metric="eval/loss", rung=1, **options).steps


def test_rungs_lie_at_powers_of_eta_where_the_metric_is_measured():
    assert steps(270, 10, eta=3, rungs=3) == (30, 90, 270)
    assert steps(256, 16, eta=3, rungs=3) == (32, 80, 256)  # of 28.4 and 85.3
    assert steps(256, 16, eta=2, rungs=4) == (32, 64, 128, 256)
    assert steps(20, 8, eta=4, rungs=2) == (8, 20)  # 5 would be before the first evaluation


@pytest.mark.parametrize(("num_steps", "every"), [(12, 8), (12, 12), (27, 20)])
def test_rungs_that_would_be_one_are_refused(num_steps, every):
    with pytest.raises(
        ValueError, match=rf"is measured every {every}: lower trainer\.eval_every, or take fewer rungs"
    ):
        steps(num_steps, every, eta=3, rungs=3)


def test_where_a_run_ends_for_now():
    first, last = (halving(270, 10, metric="eval/loss", rung=rung).ends_at for rung in (1, 3))
    assert (first.step, first.metric, first.option) == (30, "eval/loss", "search.rung")
    assert last is None


def cells(*values):
    return [Standing((str(index),), value) for index, value in enumerate(values)]


def named(standings):
    return [int(standing.cell[0]) for standing in standings]


def test_the_best_share_goes_on_best_first():
    values = (0.5, 0.9, 0.1, 0.7, 0.9)
    assert named(going_on(cells(*values), "higher", 2)) == [1, 4, 3]  # 5 / 2, rounded up; of equal ones the earlier
    assert named(going_on(cells(*values), "lower", 3)) == [2, 0]
    assert named(going_on(cells(0.3), "lower", 3)) == [0]


def test_degenerate_cells_come_last_and_those_without_a_number_never():
    degenerate = Standing(("3",), 0.9, sound=False)
    assert named(going_on([degenerate, *cells(math.nan, 0.1, 0.2)], "higher", 1)) == [2, 1, 3]
    assert named(going_on(cells(math.nan, math.nan, 0.2), "higher", 2)) == [2]
    assert going_on(cells(math.nan), "higher", 2) == []


def test_a_grid_of_five_by_five_costs_at_most_two_and_a_half_of_its_rows():
    """25, 9 and 3 jobs, of which those that go on make 60 and 180 steps more: 750 + 540 + 540; a row of five whole
    runs makes 1,350."""
    plan = SearchPlan("eval/loss", "lower", eta=3, rungs=3, steps=steps(270, 10))
    assert announced(plan, 25, 25).endswith(
        "25 jobs to step 30, 9 jobs to step 90, 3 jobs to step 270: 1,830 optimiser steps of the 6,750 of the whole "
        "grid"
    )
    assert 1830 <= 2.5 * 5 * 270
    assert "50 jobs to step 30, 18 jobs to step 90, 6 jobs to step 270: 3,660" in announced(plan, 50, 25)  # two seeds


# --- real searches, on 12 steps of a tiny model


LONGER = [*SMALL, "data.num_pairs=96", "trainer.eval_every=2", "evaluation.every=2", "evaluation.num_prompts=2",
          "evaluation.max_new_tokens=4"]  # fmt: skip
GRID = ["optim.lr=1e-4,1e-2", "beta=0.1,1"]
JOBS = ["0_beta-0.1_optim.lr-0.0001", "1_beta-1_optim.lr-0.0001", "2_beta-0.1_optim.lr-0.01", "3_beta-1_optim.lr-0.01"]
QUICK = ["generation.max_new_tokens=4", "generation.samples_per_prompt=1", "diagnostic=none"]
BY_ACCURACY = "search.metric=eval/rewards/accuracies"
SEARCH = ["+search=halving", BY_ACCURACY]
BESIDE = ["hydra/launcher=side_by_side", "hydra.launcher.n_jobs=2"]


def swept(folder, *words):
    """A sweep with its evaluation, which imports nothing again."""
    with pytest.MonkeyPatch.context() as patch, undrawn():
        run = SimpleNamespace(run=lambda command, check: typed(*command[1:], *QUICK))
        patch.setattr(end_of_sweep, "subprocess", run)
        return typed("train.py", "-m", *LONGER, *GRID, f"output_dir={folder}", *words)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The grid without a search."""
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    done = swept(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The grid searched, and what that printed."""
    folder = tmp_path_factory.mktemp("searched") / "sweep"
    done = swept(folder, *SEARCH)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def lines(job):
    return [without_clock(json.loads(line)) for line in (job / "metrics.jsonl").read_text().splitlines()]


def made(job):
    """Optimiser steps, counted by the lines that each left."""
    return sum("train/loss" in row for row in lines(job))


def best_of(whole, jobs, step):
    """The jobs by held-out accuracy after a step, best first, by the numbers of the sweep without a search."""
    values = {
        job: next(row for row in lines(whole / job) if row["step"] == step and "eval/rewards/accuracies" in row)
        for job in jobs
    }
    return sorted(jobs, key=lambda job: -values[job]["eval/rewards/accuracies"])


def test_the_best_of_each_rung_go_on_and_steps_are_saved(whole, searched):
    folder, printed = searched
    second = best_of(whole, JOBS, 2)[:2]
    (last,) = best_of(whole, [job for job in JOBS if job in second], 4)[:1]
    assert {job: made(folder / job) for job in JOBS} == {
        job: 12 if job == last else 4 if job in second else 2 for job in JOBS
    }
    assert "4 jobs to step 2, 2 jobs to step 4, 1 job to step 12: 20 optimiser steps of the 48" in printed
    assert "the search made 20 optimiser steps; all 4 jobs to their ends would make 48" in printed


def test_what_goes_on_is_the_run_of_a_sweep_without_a_search(whole, searched):
    for job in JOBS:
        ours = lines(searched[0] / job)
        assert ours == lines(whole / job)[: len(ours)]  # the schedule of the learning rate among them
    (winner,) = (job for job in JOBS if made(searched[0] / job) == 12)
    assert same_weights(searched[0] / winner, whole / winner)


def test_the_record_says_by_which_rung_and_metric_a_job_was_stopped(searched):
    for job in JOBS:
        record, steps_made = summary(searched[0] / job), made(searched[0] / job)
        rung = {2: 1, 4: 2, 12: 3}[steps_made]
        assert (record["status"], record["stopped_by"]) == (
            ("completed", None) if rung == 3 else ("stopped", "search.rung")
        )
        search = record["search"]
        assert (search["metric"], search["better"], search["of"], search["num_steps"]) == (
            "eval/rewards/accuracies", "higher", 3, 12,
        )  # fmt: skip
        assert [each["step"] for each in search["rungs"]] == [2, 4, 12][:rung]
        measured = {row["step"]: row[search["metric"]] for row in lines(searched[0] / job) if search["metric"] in row}
        assert [each["value"] for each in search["rungs"]] == [measured[step] for step in [2, 4, 12][:rung]]


def test_those_left_behind_are_no_failures_and_are_not_compared(searched):
    jobs = {job.name: job for job in collect(searched[0])}
    behind = [job for job in jobs.values() if job.left_behind]
    assert len(behind) == 3
    assert not any(job.finished or job.evaluation for job in behind)
    assert all(
        re.match(r"stopped at step [24] of 12, rung [12] of 3: eval/rewards/accuracies 0\.", job.state)
        for job in behind
    )
    (row,) = [
        line for line in (searched[0] / "sweep.csv").read_text().splitlines() if line.startswith(f"{behind[-1].name},")
    ]
    assert ",stopped," in row


def test_the_same_command_changes_nothing(searched, tmp_path):
    folder = shutil.copytree(searched[0], tmp_path / "sweep")
    for job in JOBS:
        config = folder / job / "config.yaml"
        config.write_text(re.sub("^# digest.*\n", "", config.read_text().replace(str(searched[0]), str(folder))))
    before = {job: (folder / job / "metrics.jsonl").read_bytes() for job in JOBS}
    done = swept(folder, *SEARCH)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {job: (folder / job / "metrics.jsonl").read_bytes() for job in JOBS} == before
    assert "going on with" not in done.stdout


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_side_by_side_and_without_it_the_rest_goes_to_its_end(
    whole, searched, tmp_path
):
    folder = tmp_path / "sweep"
    started = Typed(tmp_path / "first", "train.py", "-m", *LONGER, *GRID, f"output_dir={folder}", *SEARCH)
    started.until(lambda: any(made(folder / job) > 2 for job in JOBS if (folder / job / "metrics.jsonl").exists()))
    started.send(signal.SIGKILL)
    started.end()
    done = swept(folder, *SEARCH, *BESIDE)
    assert done.returncode == 0, done.stdout + done.stderr
    for job in JOBS:
        assert lines(folder / job) == lines(searched[0] / job)
        assert same_weights(folder / job, searched[0] / job)
    done = swept(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    for job in JOBS:
        assert lines(folder / job) == lines(whole / job)
        assert same_weights(folder / job, whole / job)
    assert not any(job.left_behind for job in collect(folder))


def test_a_job_that_is_resumed_by_hand_goes_to_its_end(whole, searched, tmp_path):
    job = next(job for job in JOBS if made(searched[0] / job) == 2)
    run = shutil.copytree(searched[0] / job, tmp_path / "run")
    done = train(f"resume={run}", "tracking=none")
    assert done.returncode == 0, done.stdout + done.stderr
    assert same_weights(run, whole / job)
    assert summary(run)["status"] == "completed"
    assert summary(run)["search"] is None


def test_what_to_type_next_leaves_the_search_out(searched, capsys):
    print_next(searched[0], ["-m", *LONGER, *GRID, *SEARCH, f"output_dir={searched[0]}"], [])
    alone, rest = (line for line in capsys.readouterr().out.splitlines() if " train.py -m" in line)
    (winner,) = (job for job in collect(searched[0]) if job.finished)
    values = dict(word.partition("=")[::2] for word in winner.words)
    assert f"optim.lr={values['optim.lr']}" in alone
    assert f"beta={values['beta']}" in alone
    assert alone.endswith("seed=1,2")
    assert rest.endswith(f"output_dir={searched[0]}")
    assert " optim.lr=1e-4,1e-2 " in rest
    assert "search" not in alone.replace(str(searched[0]), "") + rest.replace(str(searched[0]), "")


def test_the_program_that_replays_searches_finds_what_the_search_found(whole, searched, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    program = importlib.import_module("halving")
    ended, share, at = program.search(cells_of(collect(whole)), "eval/rewards/accuracies", 3, 3)
    (winner,) = (job for job in JOBS if made(searched[0] / job) == 12)
    assert [cell.jobs[0].name for cell in ended] == [winner]
    assert (share, at) == (20 / 48, (2, 4, 12))
    for name in ("halving", "common"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_a_job_that_fails_is_out_and_is_named(tmp_path):
    folder = tmp_path / "sweep"
    words = [word for word in GRID if not word.startswith("beta=")]
    with pytest.MonkeyPatch.context() as patch:
        run = SimpleNamespace(run=lambda command, check: SimpleNamespace(returncode=0))
        patch.setattr(end_of_sweep, "subprocess", run)
        done = typed("train.py", "-m", *LONGER, *words, "beta=-1,0.1", f"output_dir={folder}", *SEARCH, *BESIDE)
    assert done.returncode == 1
    assert (
        "error: 2 jobs of the sweep failed:\n  0_beta--1_optim.lr-0.0001: failed: ValueError: beta=-1" in done.stderr
    )
    assert re.search(r"^rung 1 of 3, step 2: 2 of 4 cells go on, by eval/rewards/accuracies$", done.stdout, re.M)
    assert re.search(r"^optim\.lr=0\.01 beta=0\.1 +\| .*stopped at step 2 of 12", done.stdout, re.M)
    assert sorted(made(job) for job in folder.glob("*_beta-0.1_*")) == [4, 12]


@pytest.mark.slow
def test_a_grid_of_five_by_five_really_costs_no_more(tmp_path):
    folder = tmp_path / "sweep"
    words = [*SMALL, "data.num_pairs=216", "trainer.eval_every=3", f"output_dir={folder}", "+search=halving"]
    words += ["optim.lr=1e-4,3e-4,1e-3,3e-3,1e-2", "beta=0.1,0.3,1,3,10"]
    with pytest.MonkeyPatch.context() as patch:
        run = SimpleNamespace(run=lambda command, check: SimpleNamespace(returncode=0))
        patch.setattr(end_of_sweep, "subprocess", run)
        done = typed("train.py", "-m", *words)
    assert done.returncode == 0, done.stderr
    counts = [made(job) for job in folder.glob("*_beta-*")]
    assert sorted(counts) == [3] * 16 + [9] * 6 + [27] * 3
    assert sum(counts) == 183 <= 2.5 * 5 * 27


# --- what is refused, before any job begins


UNLOOKED = {
    "eta": (["search.eta=1"], "search.eta=1 must be at least 2"),
    "rungs": (["search.rungs=1"], "search.rungs=1 must be at least 2"),
    "no metric": (["search.metric=eval/accuracy"], "search.metric=eval/accuracy is none that training measures"),
    "no direction": (["search.metric=evaluation/kl/initial"], "has no better direction"),
    "another scorer's": (["search.metric=evaluation/mine/mean"], "is not measured in these runs; near it are"),
    "other units": (["search.metric=eval/loss"], "search.metric=eval/loss is in other units at another beta"),
    "seldom": (["trainer.eval_every=8", BY_ACCURACY], r"is measured every 8: lower trainer\.eval_every"),
    "only at the ends": (["trainer.eval_every=null", BY_ACCURACY], "add trainer.eval_every=<optimiser steps>"),
    "nothing held out": (["data.num_eval_pairs=0", BY_ACCURACY], "nothing is held out: add data.eval_fraction=0.1"),
    "no prompts": (["data.num_test_prompts=0", "search.metric=evaluation/gold/mean"], "nothing is held out"),
    "another stage": (["stage=check"], "compares training runs of a model"),
}


@pytest.mark.parametrize("case", UNLOOKED)
def test_refused_by_a_look_at_the_data(case):
    overrides, message = UNLOOKED[case]
    keys = {override.partition("=")[0] for override in overrides}
    words = [word for word in LONGER if word.partition("=")[0] not in keys]
    with pytest.raises(ValueError, match=message):
        plan_of(resolved(*words, "+search=halving", *overrides), ["optim.lr", "beta"])


def test_without_a_metric_the_one_that_tells_most_is_taken():
    words = [word for word in LONGER if not word.startswith("evaluation.")]
    assert plan_of(resolved(*LONGER, "+search=halving"), ["beta"]).metric == "evaluation/gold/mean"
    unscored = [*LONGER, "scorer@evaluation.scorer=none"]
    assert plan_of(resolved(*unscored, "+search=halving"), ["beta"]).metric == "eval/rewards/accuracies"
    assert plan_of(resolved(*words, "+search=halving"), ["beta"]).metric == "eval/rewards/accuracies"
    sft = [
        "model.path=lab:tiny",
        "objective=sft",
        "data=lab_sft",
        "data.num_examples=96",
        "trainer.eval_every=1",
        "trainer.batch_size=8",
    ]
    assert plan_of(resolved(*sft, "+search=halving"), ["optim.lr"]).metric == "eval/loss"


TYPED = {
    "looked at": (["search.eta=1"], "search.eta=1 must be at least 2"),
    "not looked at": (["data.num_eval_pairs=0", BY_ACCURACY], "nothing is held out"),
    "its own rung": (["search.rung=2"], "search.rung=2: the search says itself how far a job trains"),
    "swept": (["search.eta=2,3"], "search.eta=2,3: a search has one search.eta"),
    "every job": (["beta=-1,-2"], "beta=-1"),
}


@pytest.mark.parametrize("case", TYPED)
def test_refused_with_one_sentence_before_any_job_begins(case, tmp_path):
    overrides, message = TYPED[case]
    done = typed("train.py", "-m", *LONGER, *GRID, "+search=halving", *overrides, f"output_dir={tmp_path / 'sweep'}")
    assert done.returncode == 1
    assert message in done.stderr, done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("sweep/*_*"))


def test_nothing_to_compare_is_refused(tmp_path):
    alone = train(*LONGER, "+search=halving", f"output_dir={tmp_path / 'run'}")
    assert "+search=halving compares the jobs of a sweep: add -m" in alone.stderr
    with pytest.raises(
        ValueError, match=r"search\.eta=2 has no effect without a search: add \+search=halving, and -m"
    ):
        resolved(*LONGER, "search.eta=2")
    one = typed("train.py", "-m", *LONGER, "+search=halving", "beta=0.1", f"output_dir={tmp_path / 'sweep'}")
    assert "nothing is swept: add several values of a key" in one.stderr


def test_the_search_is_a_part_of_the_run_that_is_checked():
    run = resolved(*LONGER, "+search=halving", "search.eta=2", "search.metric=eval/loss")
    assert run.search.options == {"metric": "eval/loss", "eta": 2, "rungs": 3, "rung": None}
    assert resolved(*LONGER).search is None
