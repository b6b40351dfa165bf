"""`train.py stage=check` as a user types it: what it says of a run is what the run then does, and nothing is left."""

import json
import platform
import re

import pytest

from tests.support.cache import empty_cache
from tests.support.command import train
from tests.support.on_policy import SMALL as ON_POLICY
from tests.support.pages import parsed
from tests.support.pictures import undrawn
from tests.support.quick import only
from tests.support.ranks import typed_on_ranks

DATA = ["data.num_pairs=64", "data.num_eval_pairs=16", "data.num_test_prompts=4"]
SMALL = ["stage=check", "model=lab_tiny", "tracking=none", "trainer.batch_size=8"]


def checked(folder, *words):
    with undrawn():
        done = train(*SMALL, *words, f"output_dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def line(said, name):
    """What stands beside a name on the screen."""
    return re.search(rf"^  {name} +(.*)$", said, re.MULTILINE)[1]


def test_what_is_said_is_what_the_run_does(tmp_path, monkeypatch):
    """Groups, steps, rows to score; afterwards they are scored."""
    cache = empty_cache(monkeypatch, tmp_path / "cache")
    said = checked(tmp_path / "check", *DATA)
    assert not (cache / "reference").exists()
    assert [path.name for path in (tmp_path / "check").iterdir()] == ["check.html"]
    assert line(said, "data") == "64 groups to train on, 16 held out"
    assert line(said, "table") == "not there; 80 groups to score"
    assert line(said, "trained").startswith("88,656 of 88,656 parameters")
    page = parsed((tmp_path / "check" / "check.html").read_text())
    assert page.fetched == []
    assert "8 of 8 groups" in page.texts  # steps
    run = ["model=lab_tiny", "tracking=none", "trainer.batch_size=8", *DATA, f"output_dir={tmp_path / 'run'}"]
    assert train(*run).returncode == 0
    steps = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("train/loss" in step for step in steps) == 8
    assert line(checked(tmp_path / "again", *DATA), "table") == "80 of 80 groups are in the cache"


def test_what_is_wrong_is_said_the_costliest_first(tmp_path):
    """A learning rate a hundred times what the model stands, a beta that saturates, half of the data never seen."""
    words = ["optim.lr=3e-2", "beta=3", "reference=none", "trainer.max_steps=2"]
    said = checked(tmp_path, *DATA, *words)
    warnings = said.partition("warnings, the costliest first:")[2].strip().splitlines()
    assert warnings[0].startswith("optim.lr=0.03 is 100 times")
    assert "saturated at beta=3" in warnings[1]
    assert any("visit 25%" in warning for warning in warnings)
    text = (tmp_path / "check.html").read_text()
    assert '<p class="alert">optim.lr=0.03' in text
    assert "reference=initial" in text


FAMILIES = {
    "sft": ["objective=sft", *DATA],
    "kto": ["objective=kto", *DATA],
    "reward_model": ["objective=reward_model", *DATA],
    "live": ["reference=moving", *DATA],
    "other": ["reference=other", "reference.path=lab:foreign", *DATA],
    "adapter": ["reference=adapter_base", "model.lora_rank=4", *DATA],
    "on_policy": [*ON_POLICY, "objective=ipo_sum"],
    "advantages": [*ON_POLICY, "objective=grpo"],
}


@pytest.mark.parametrize("family", only(FAMILIES, *list(FAMILIES)[:3], "on_policy"))
def test_every_kind_of_run_can_be_checked(family, tmp_path):
    said = checked(tmp_path, *FAMILIES[family])
    assert "groups a second" in line(said, "speed")
    assert "steps" in line(said, "time")
    assert ("sampling" in line(said, "time")) == (family in ("on_policy", "advantages"))
    parsed((tmp_path / "check.html").read_text())


@pytest.mark.parametrize("parallel", only(["ddp", "fsdp"], "fsdp"))
def test_ranks_speak_for_themselves(parallel, tmp_path, monkeypatch):
    """Two ranks are one run, of which each has its line; what they need and send follows the formulas."""
    empty_cache(monkeypatch, tmp_path / "cache")
    words = [*SMALL, *DATA, "trainer.batch_size=7", f"parallel={parallel}", f"output_dir={tmp_path / 'out'}"]
    first, other = typed_on_ranks(tmp_path / "ranks", 2, "train.py", *words)
    assert (first.returncode, other.returncode) == (0, 0), first.stderr + other.stderr
    assert other.stdout == ""
    assert line(first.stdout, "data") == "64 groups to train on, 16 held out"
    assert line(first.stdout, "table") == "not there; 80 groups to score"
    said = line(first.stdout, "ranks")
    assert said.startswith("2; the slowest, rank ")
    embedding_and_norm = 882 * 48 + 48  # gathered once, the layers twice; gradients once; half of all of it is there
    sent = {"ddp": 4 * 88_656, "fsdp": 4 * (3 * 88_656 - embedding_and_norm) / 2}[parallel]
    assert f"a rank sends {sent / 1e6:.1f} MB a step" in said
    rows = parsed((tmp_path / "out" / "check.html").read_text()).texts
    assert rows.count(f"{platform.node()}, CPU") == 2
    assert ("gathered of other ranks" in rows) == (parallel == "fsdp")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["check.html"]


def test_a_bandit_has_nothing_to_check(tmp_path):
    done = train("stage=check", "bandit=arms", f"output_dir={tmp_path / 'out'}")
    assert done.returncode == 1
    assert "stage=check has no effect on a bandit" in done.stderr


def test_what_a_run_would_be_refused_for_is_refused(tmp_path):
    done = train(*SMALL, "data=jsonl", f"data.path={tmp_path / 'nowhere.jsonl'}", f"output_dir={tmp_path / 'out'}")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "nowhere.jsonl does not exist" in done.stderr
    assert not (tmp_path / "out").exists()
