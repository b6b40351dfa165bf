"""Runs that go on otherwise than they were planned: longer, with another data file."""

import json
import shutil

import pytest

from tests.support.checkpoints import lines
from tests.support.command import train
from tests.support.model_folders import model_folder, pairs_file, words_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("going_on")
    model_folder(folder / "model")
    pairs_file(folder / "pairs.jsonl")
    return folder


@pytest.mark.parametrize(("schedule", "told"), [("cosine", True), ("constant", False)])
def test_a_longer_run_says_what_becomes_of_its_learning_rate(folder, tmp_path, schedule, told):
    run, more = tmp_path / "run", ["trainer.max_steps=4", "trainer.epochs=10", f"optim.schedule={schedule}"]
    first = train(*words_for(folder / "model", folder / "pairs.jsonl", run, *more))
    assert first.returncode == 0, first.stderr
    done = train(f"resume={run}", "trainer.max_steps=8", "tracking=none")
    assert done.returncode == 0, done.stderr
    rates = [f"{row['train/lr']:.1e}" for row in lines(run) if "train/lr" in row]
    said = [line for line in done.stdout.splitlines() if "schedule" in line]
    line = f"the schedule is stretched from 4 to 8 steps: the learning rate was {rates[3]} at step 4 and is {rates[4]}"
    assert said == ([f"{line} at step 5"] if told else [])


def test_other_data_under_the_same_name_is_refused(folder, tmp_path):
    data, run = tmp_path / "live.jsonl", tmp_path / "run"
    shutil.copy(folder / "pairs.jsonl", data)
    words = ["objective=simpo", "trainer.max_steps=1", "optim.schedule=constant"]
    first = train(*words_for(folder / "model", data, run, *words))
    assert first.returncode == 0, first.stderr
    pairs_file(data, seed=1)
    done = train(f"resume={run}", "trainer.max_steps=2", "tracking=none")
    assert done.returncode == 1
    assert "data was" in done.stderr
    assert done.stderr.count("\n") == 1
    assert json.loads((run / "summary.json").read_text())["steps"] == 1
