"""Environments that lack what is usually there: a locale, a home, a temporary folder, a terminal, a cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import ROOT

pytestmark = pytest.mark.slow  # a process that imports everything anew for each; `make faults` runs it

DATA = ["data.num_pairs=16", "data.num_eval_pairs=4", "data.num_test_prompts=4", "trainer.batch_size=8"]
TRAIN = ["train.py", "model=lab_tiny", "tracking=none", "trainer.max_steps=2", *DATA]
EVALUATE = ["evaluate.py", "tracking=none", "generation.max_new_tokens=8", "diagnostic=none"]
USUAL = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": os.defpath, "LANG": "C.UTF-8", "TERM": "xterm"}
NOWHERE = "/proc/nowhere"  # a folder that nobody can make, root included


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command as a service or a batch system starts it: no terminal, no input, nothing but this environment."""
    command = [sys.executable, *arguments]
    none = subprocess.DEVNULL
    return subprocess.run(
        command, cwd=ROOT, env=environment, stdin=none, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The variables of an ordinary environment, and the run that was trained in it."""
    home = tmp_path_factory.mktemp("home")
    done = run(USUAL | {"HOME": str(home)}, *TRAIN, f"output_dir={home / 'run'}")
    assert done.returncode == 0, done.stderr
    cache = home / ".cache" / "dpo_ref"
    assert (cache / "tokens").is_dir()
    return USUAL | {"HOME": str(home), "DPO_REF_CACHE": str(cache)}, home / "run"


def weights(folder: Path) -> bytes:
    return (folder / "policy" / "model.safetensors").read_bytes()


def next_command(done: subprocess.CompletedProcess[str]) -> str:
    return next(line for line in done.stdout.splitlines() if "evaluate.py policy=" in line)


LACKING = {
    "a home that cannot be written, and a cache elsewhere": {"HOME": NOWHERE},
    "a temporary folder that is not there": {"TMPDIR": NOWHERE},
    "a dumb terminal of 40 columns": {"TERM": "dumb", "COLUMNS": "40"},
}


@pytest.mark.parametrize("name", LACKING)
def test_a_run_needs_nothing_of_it(name, usual, tmp_path, tell):
    environment, ordinary = usual
    trained = run(environment | LACKING[name], *TRAIN, f"output_dir={tmp_path / 'run'}")
    assert trained.returncode == 0, trained.stderr
    assert weights(tmp_path / "run") == weights(ordinary)
    tell("untidy", name, seen=next_command(trained), survived="the run; equal final weights")


def test_a_run_and_its_evaluation_in_an_empty_environment(usual, tmp_path, tell):
    """As a batch system may start it: no locale, no home, no temporary folder, no terminal."""
    environment, ordinary = usual
    kept = ("PATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "DPO_REF_CACHE")
    empty = {name: environment[name] for name in kept} | {"LC_ALL": "C", "TMPDIR": NOWHERE}
    trained = run(empty, *TRAIN, f"output_dir={tmp_path / 'run'}")
    assert trained.returncode == 0, trained.stderr
    assert weights(tmp_path / "run") == weights(ordinary)
    evaluated = run(empty, *EVALUATE, f"policy={tmp_path / 'run'}")
    assert evaluated.returncode == 0, evaluated.stderr
    assert (trained.stdout + trained.stderr + evaluated.stdout + evaluated.stderr).isascii()
    assert (tmp_path / "run" / "evaluation" / "evaluation.json").exists()
    fault = "an empty environment: no locale, no home, no temporary folder, no terminal"
    tell("untidy", fault, seen=next_command(trained), survived="the run and its evaluation; equal final weights")


CACHES = {
    "a home that cannot be written": ({"HOME": NOWHERE, "DPO_REF_CACHE": ""}, f"{NOWHERE}/.cache/dpo_ref"),
    "a cache below a file": ({"DPO_REF_CACHE": "/dev/null/kept"}, "/dev/null/kept"),
    "a cache that may only be read": ({"DPO_REF_CACHE": "/proc/self"}, "/proc/self"),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_that_cannot_be_written_is_told(name, usual, tmp_path, tell):
    changed, folder = CACHES[name]
    done = run(usual[0] | changed, *TRAIN, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: the cache {folder} cannot be written: ")
    assert "set DPO_REF_CACHE" in line
    tell("untidy", name, seen=line, survived="nothing was trained")
