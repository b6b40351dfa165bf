"""Clocks that jump while a command runs: back three days, forward a year. Time that passes is measured by another
clock, and what bears a date is neither trusted nor lost."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_ref.cli import cache as cache_command
from dpo_ref.files.writing import sweep_abandoned
from tests.faults.test_kills import end_of_run
from tests.support.command import ROOT, train, typed
from tests.support.faults import SMALL, steps

# In the interpreter of a typed command: from when a file is there, its clock is another. Only the kernel could do it
# for everybody, and for every process of the machine.
SITE = """
import datetime, os, time

JUMP, MARK = float(os.environ["JUMP"]), os.environ["MARK"]
real, real_ns, Before = time.time, time.time_ns, datetime.datetime
shift = lambda: JUMP if os.path.exists(MARK) else 0.0
time.time = lambda: real() + shift()
time.time_ns = lambda: real_ns() + int(shift() * 1e9)

class Instances(type):
    def __instancecheck__(cls, value):
        return isinstance(value, Before)

class Jumping(Before, metaclass=Instances):
    @classmethod
    def now(cls, tz=None):
        return Before.fromtimestamp(time.time(), tz)

datetime.datetime = Jumping
"""
DAY = 86_400
JUMPS = {"back three days": -3 * DAY, "forward a year": 365 * DAY}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(*OPTIONS, f"output_dir={run}").returncode == 0
    return run


OPTIONS = [*SMALL, "trainer.epochs=20", "trainer.save_minutes=0.002", "trainer.keep_checkpoints=null"]


def without_checkpoints(run):
    """What is equal although checkpoints are made by the clock."""
    end = end_of_run(run)
    end["tensors"] = {
        name: value
        for name, value in end["tensors"].items()
        if name.startswith(("checkpoints/step-00000080", "policy"))
    }
    return end


@pytest.mark.slow
@pytest.mark.parametrize("name", JUMPS)
def test_a_clock_that_jumps_while_training(name, whole, tmp_path, tell):
    (tmp_path / "sitecustomize.py").write_text(SITE)
    run, mark = tmp_path / "run", tmp_path / "jumped"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "JUMP": str(JUMPS[name]), "MARK": str(mark)}
    command = [sys.executable, "train.py", *OPTIONS, f"output_dir={run}"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while steps(run) < 4 and process.poll() is None:
        time.sleep(0.001)
    mark.touch()
    jumped_at = steps(run)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert without_checkpoints(run) == without_checkpoints(whole)
    saved = [int(path.name[-8:]) for path in run.glob("checkpoints/step-*")]
    after = [step for step in saved if jumped_at + 1 < step < 80]
    assert 1 <= len(after) < 70  # by time that passes: neither none nor one after each step
    assert not re.search(r"took -|-\d+:\d\d", out)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(value > 0 for row in rows for key, value in row.items() if "throughput" in key)
    seen = next((line for line in out.splitlines() if "took" in line), "nothing")  # of what ends within two seconds
    tell(
        "untidy",
        f"the clock jumps {name} in step {jumped_at}",
        seen=seen,
        survived=f"{len(after)} checkpoints of trainer.save_minutes after it; equal metrics, weights, random states",
    )


def test_a_lock_from_the_future_holds_nobody(tmp_path, tell):
    run = tmp_path / "run"
    run.mkdir()
    holder = {"pid": 1, "host": "elsewhere", "since": "2999-01-01 00:00:00+00:00", "work": None}
    (run / ".lock").write_text(json.dumps(holder))
    done = train(*SMALL, "trainer.max_steps=1", f"output_dir={run}")
    assert done.returncode == 0, done.stderr
    assert not (run / ".lock").exists()
    tell("untidy", "a lock stamped in the future by a process that is no more", seen="nothing", survived="the run")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Entries used a year ahead, now and forty days ago, and what processes that are no more left half-made."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    ages = {"ahead": -365, "now": 0, "old": 40, f".half.{dead.pid}": -365, f".fresh.{dead.pid}": 0}
    for name, days in ages.items():
        entry = tmp_path / "cache" / "reference" / name
        entry.mkdir(parents=True)
        (entry / "rows").write_bytes(b"rows")
        for path in (entry / "rows", entry):
            os.utime(path, (time.time() - days * DAY,) * 2)
    monkeypatch.setenv("DPO_REF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def names(cache: Path):
    return {path.name.partition(".")[0] or path.name.split(".")[1] for path in (cache / "reference").iterdir()}


def test_a_cache_from_the_future_is_pruned_as_if_used_now(cache, tell):
    listing = typed("dpo_ref/cli/cache.py").stdout
    assert "-" not in re.sub(r"─|dpo_ref|pytest-\S+", "", listing.partition("ahead")[2].splitlines()[0])
    assert "40 days ago" in listing
    done = typed("dpo_ref/cli/cache.py", "prune", "older_than=30d", "yes=true")
    assert done.returncode == 0, done.stderr
    assert names(cache) == {"ahead", "now", "fresh"}
    assert typed("dpo_ref/cli/cache.py", "prune", "to=0kB", "yes=true").returncode == 0
    assert not cache_command.entries(cache)
    tell(
        "untidy",
        "a cache that was filled before the clock went back a year, pruned by age",
        seen=done.stdout,
        survived="what was used last; no negative age; pruning by size takes it as any other",
    )


def test_an_entry_that_goes_while_the_cache_is_looked_through_is_no_error(cache, monkeypatch, tell):
    """Another process moves what it made to its place, or prunes, between the listing of a folder and of what is in
    it."""
    going, scan = cache / "reference" / "old", os.scandir

    def scandir(path):
        if path in (going, str(going)):
            shutil.rmtree(going, ignore_errors=True)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    cache_command.look_after_cache()
    assert names(cache) == {"ahead", "now", "fresh"}
    tell("untidy", "an entry of the cache that goes while it is looked through", seen="nothing", survived="the others")


def test_what_was_left_half_made_in_the_future_is_swept(cache, tell):
    sweep_abandoned(cache)
    assert names(cache) == {"ahead", "now", "old", "fresh"}
    tell(
        "untidy",
        "half-made files stamped in the future",
        seen="nothing",
        survived="swept; fresh ones stay for their owner",
    )
