"""Evaluation while training: options that cannot be meant, and the commands of its page."""

import re
import shlex

import pytest

from tests.support.command import ROOT, resolved, train
from tests.support.training_evaluation import SMALL

REFUSED = {
    "stop": (["trainer.stop_when_degenerate=true"], "trainer.stop_when_degenerate=true has no effect without"),
    "option": (["evaluation.num_prompts=8"], "evaluation.num_prompts has no effect without evaluation.every="),
    "scorer": (["scorer@evaluation.scorer=gold"], "scorer@evaluation.scorer has no effect without evaluation.every="),
    "threshold": (["degeneration.max_seq_rep_4=0.1"], "degeneration.max_seq_rep_4 has no effect without"),
    "zero": (["evaluation.every=0"], "evaluation.every=0 must be at least 1; null leaves it out"),
    "share": (["evaluation.every=5", "degeneration.min_ended_share=2"], "it must lie in [0, 1]"),
    "misspelt": (["evaluation.evry=5"], "did you mean evaluation.every?"),
    "bandit": (["bandit=arms", "evaluation.every=5"], "evaluation.every=5 has no effect on a bandit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_remedy(case):
    overrides, message = REFUSED[case]
    with pytest.raises(ValueError) as error:
        resolved(*overrides)
    assert message in str(error.value)


STOPS = ["evaluation.every=5", "trainer.stop_when_degenerate=true"]
NOT_STARTED = {
    "no prompts": (["data.num_test_prompts=0", "evaluation.every=5"], "the data has no held-out prompts to answer"),
    "no room": (["data.max_length=60", "evaluation.every=5", "evaluation.max_new_tokens=58"], "no held-out prompt"),
    "never in time": (["evaluation.every=12", "trainer.stop_when_degenerate=true"], "the run has 12 steps"),
    "cut from the start": ([*STOPS, "evaluation.max_new_tokens=3"], "degenerate before any training: only"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_STARTED)
def test_not_started_with_the_remedy(case, tmp_path):
    overrides, message = NOT_STARTED[case]
    options = [option for option in SMALL if option.partition("=")[0] != overrides[0].partition("=")[0]]
    done = train(*options, *overrides, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert message in done.stderr
    assert "train/loss" not in done.stdout


PAGE = (ROOT / "docs" / "training_evaluation.md").read_text()
COMMANDS = re.findall(r"^python train\.py (.*?)(?:\s+#.*)?$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_compose(command):
    overrides = [word for word in shlex.split(command) if word != "-m"]
    if not overrides[0].startswith("resume="):
        resolved(*overrides)


def test_the_page_shows_commands():
    assert len(COMMANDS) >= 5
