"""Disks without room, each a small tmpfs where one kind of file is written: told by name, and once there is room the
command that is typed goes on to the same end."""

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.test_kills import end_of_run, records_of, run_of
from tests.support import on_policy
from tests.support.command import Done
from tests.support.evaluate_command import QUICK
from tests.support.faults import SMALL, Typed
from tests.support.judge_server import JudgeServer
from tests.support.lab_models import large_in_a_moment  # noqa: F401
from tests.support.loopback import surroundings  # noqa: F401
from tests.support.pictures import undrawn

pytestmark = pytest.mark.slow  # `make faults` runs it

ROOM = "64m"


def mounted(folder: Path, size: str, *options: str) -> subprocess.CompletedProcess:
    words = ["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *options)), "tmpfs", str(folder)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.fixture
def disk():
    """Makes a folder a disk of its own; where mounting is not permitted there is no test."""
    folders = []

    def small(folder: Path, size: str, *options: str) -> None:
        folder.mkdir(parents=True)
        if (done := mounted(folder, size, *options)).returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        folders.append(folder)

    yield small
    for folder in folders:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def with_cache(folder: Path) -> Path:
    """A folder whose cache is empty."""
    (folder / "cache").mkdir(parents=True, exist_ok=True)
    return folder


def typed_in(folder: Path, words: list[str]) -> Done:
    shell = folder.with_name(f"{folder.name} shell {len(list(folder.parent.iterdir()))}")
    return Typed(shell, *words, before=lambda: os.environ.update(DPO_REF_CACHE=str(folder / "cache"))).end()


def one_sentence(done: Done) -> str:
    assert done.returncode == 1, done
    assert "Traceback" not in done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line and "status could not be written either" not in line]
    (sentence,) = lines
    return sentence


class Full(NamedTuple):
    """What is typed, where the small disk is, its size, what must be named, and what is typed once there is room."""

    words: Callable[[Path], list[str]]
    place: str
    size: str
    named: str
    again: Callable[[Path], list[str]]


def begins(*words):
    return lambda folder: ["train.py", *words, f"output_dir={run_of(folder)}"]


def resumes(folder):
    return ["train.py", f"resume={run_of(folder)}", "tracking=none"]


SHORT = begins(*SMALL, "trainer.save_every=2")
LONG = begins(*SMALL, "trainer.epochs=12")
ROUNDS = begins(*on_policy.SMALL, "objective=ppo_clip", "data.samples_per_prompt=2", "trainer.save_every=1")
TRAINING = {
    "a checkpoint": Full(
        SHORT, "run", "300k", "the checkpoint of step 2 was not written to {run}/checkpoints", resumes
    ),
    "a later checkpoint": Full(SHORT, "run", "1200k", "the checkpoint of step 4 was not written to {run}", resumes),
    "the policy": Full(begins(*SMALL), "run", "1100k", "the policy was not written to {run}/policy", resumes),
    "metrics.jsonl": Full(LONG, "run", "24k", "{run}/metrics.jsonl cannot be written (No space", resumes),
    "the reference table": Full(SHORT, "cache/reference", "4k", "{cache}/reference/", SHORT),
    "the token cache": Full(SHORT, "cache/tokens", "16k", "{cache}/tokens/", SHORT),
    "the samples of a round": Full(ROUNDS, "run/rounds", "12k", "{run}/rounds/", resumes),
    "the record of which runs use the cache": Full(SHORT, "cache/runs", "4k", "{cache}/runs/", SHORT),
}


@pytest.mark.parametrize("name", TRAINING)
def test_no_room_while_training(name, disk, tmp_path, tell):
    case, folder = TRAINING[name], tmp_path / "here"
    disk(folder / case.place, case.size)
    with_cache(folder)
    if case.place == "cache/runs":
        (folder / "cache/runs/others").write_bytes(b"x" * 4096)
    seen = one_sentence(typed_in(folder, case.words(folder)))
    assert case.named.format(run=run_of(folder), cache=folder / "cache") in seen
    assert "resume=" in seen
    assert not mounted(folder / case.place, ROOM, "remount").returncode
    done = typed_in(folder, case.again(folder))
    assert done.returncode == 0, done
    assert "damaged" not in done.stdout
    other = with_cache(tmp_path / "other")
    assert typed_in(other, case.words(other)).returncode == 0
    assert end_of_run(run_of(folder)) == end_of_run(run_of(other))
    tell(
        "lost",
        f"no room on the disk for {name}",
        seen=seen,
        survived="what was there before; once there is room: metrics, weights, moments, random states equal",
    )


@pytest.mark.parametrize("place", ["run", "cache"])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 8, 10, 12])
def test_no_room_for_names(place, count, disk, tmp_path, tell):
    """A disk may have bytes and no inodes; then folders are what cannot be made."""
    folder = tmp_path / "here"
    disk(folder / place, ROOM, f"nr_inodes={count}")
    with_cache(folder)
    done = typed_in(folder, SHORT(folder))
    if done.returncode:
        seen = one_sentence(done)
        assert str(folder / place) in seen
        assert "No space left on device" in seen
        assert "resume=" in seen or "output_dir" in seen or "DPO_REF_CACHE" in seen
        assert not mounted(folder / place, ROOM, "remount", "nr_inodes=10000").returncode
        again = resumes if (run_of(folder) / "config.yaml").is_file() else SHORT
        assert typed_in(folder, again(folder)).returncode == 0
        tell("lost", f"a disk with {count} inodes for the {place}", seen=seen, survived="what was there before")


# --- evaluations


def prepared(folder: Path, trained: Path) -> Path:
    with_cache(folder)
    shutil.copytree(trained, run_of(folder), dirs_exist_ok=True)
    return folder


def evaluates(*more):
    return lambda folder: ["evaluate.py", f"policy={run_of(folder)}", *QUICK, *more]


EVALUATIONS = {
    "answers under way": ("run/evaluation", "8k", "evaluation/generations-"),
    "the answers at last": ("run/evaluation", "28k", "evaluation/generations."),
    "measurements and diagnosis": ("run/evaluation", "60k", "evaluation/"),
    "the report": ("run/evaluation", "160k", "evaluation/report.html was not written"),
    "the baseline's answers": ("cache/evaluations", "12k", "cache/evaluations/"),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_no_room_for_an_evaluation(name, trained, disk, tmp_path, tell):
    place, size, named = EVALUATIONS[name]
    folder, words = tmp_path / "here", evaluates()
    disk(folder / place, size)
    prepared(folder, trained)
    with undrawn():
        seen = one_sentence(typed_in(folder, words(folder)))
        assert f"{folder}/{named if place.startswith('cache') else f'run/{named}'}" in seen
        assert not mounted(folder / place, ROOM, "remount").returncode
        done = typed_in(folder, words(folder))
        assert done.returncode == 0, done
        assert all("sampled again" in line for line in done.stdout.splitlines() if "damaged" in line)
        other = prepared(tmp_path / "other", trained)
        assert typed_in(other, words(other)).returncode == 0
    assert records_of(folder) == records_of(other)
    tell(
        "lost",
        f"no room on the disk for {name} of an evaluation",
        seen=seen,
        survived="the stages before; once there is room the same command goes on to equal records",
    )


@pytest.mark.parametrize("size", ["4k", "8k", "44k", "64k"])
def test_no_room_for_the_judges_answers(size, trained, disk, tmp_path, monkeypatch, tell):
    """From a disk on which SQLite can do nothing to one that is full after some answers."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-real-key-0123456789")
    folder = tmp_path / "here"
    disk(folder / "cache", size)
    prepared(folder, trained)
    for name in ("evaluations", "tokens", "groups", "reference"):
        (tmp_path / "roomy" / name).mkdir(parents=True)
        (folder / "cache" / name).symlink_to(tmp_path / "roomy" / name)
    with JudgeServer() as server, undrawn():
        asks = ["judge=alpaca_eval", "judge.model=big", f"judge.base_url={server.url}", "judge.max_workers=2"]
        words = evaluates("diagnostic=none", *asks)
        seen = one_sentence(typed_in(folder, words(folder)))
        assert f"{folder}/cache/judge_answers.sqlite was not written: " in seen
        kept, asked = server.answered.total(), partial(sum, server.asked.values())
        assert not mounted(folder / "cache", ROOM, "remount").returncode
        done = typed_in(folder, words(folder))
        assert done.returncode == 0, done
        before_other = asked()
        other = prepared(tmp_path / "other", trained)
        assert typed_in(other, words(other)).returncode == 0
        assert before_other <= asked() - before_other + kept
    assert records_of(folder) == records_of(other)
    tell(
        "lost",
        f"no room on a disk of {size} for the judge's answers",
        seen=seen,
        survived="the answers that were stored; once there is room the same command goes on to equal judgments",
    )


def test_no_room_for_a_model_of_the_lab(disk, large_in_a_moment, tmp_path, tell):  # noqa: F811
    short, folder, other = begins(*SMALL, "model.path=lab:large"), tmp_path / "here", with_cache(tmp_path / "other")
    disk(folder / "cache" / "models", "100k")
    seen = one_sentence(typed_in(folder, short(folder)))
    assert f"{folder}/cache/models/lab-large-" in seen
    assert "was not written" in seen
    assert not mounted(folder / "cache" / "models", ROOM, "remount").returncode
    assert typed_in(folder, short(folder)).returncode == 0
    assert typed_in(other, short(other)).returncode == 0
    assert end_of_run(run_of(folder)) == end_of_run(run_of(other))
    tell("lost", "no room on the disk for a model of the lab", seen=seen, survived="built once there is room; equal")
