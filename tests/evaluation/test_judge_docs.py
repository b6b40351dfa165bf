"""docs/judge.md: its commands compose, its template is one, and every option and metric it names exists."""

import re

import pytest

from dpo_ref.cli.schemas import CONF
from dpo_ref.component import configuration
from dpo_ref.evaluation.judging.judge import Judge, judge_metrics, label_of
from dpo_ref.evaluation.judging.judges import served
from dpo_ref.evaluation.judging.templates import FOLDER, load_template
from tests.support.command import ROOT, composes
from tests.support.judgments import JUDGMENTS

PAGE = (ROOT / "docs" / "judge.md").read_text()
COMMANDS = re.findall(r"^python evaluate\.py.*", PAGE, re.MULTILINE)


@pytest.fixture(autouse=True)
def _own_template(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_judge.yaml").write_text(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command):
    composes(command)


def test_the_template_of_ones_own():
    verdict = load_template("my_judge.yaml").verdict
    assert label_of(verdict, "It limps.\nBetter: neither") == "neither"
    assert verdict.labels == {"first": 1.0, "second": 0.0, "neither": 0.5}


def test_what_is_named_exists():
    assert len(COMMANDS) >= 7
    assert set(re.findall(r"^\| `(\w+)` \| (?!.*mean)", PAGE, re.MULTILINE)) >= {
        p.stem for p in CONF.glob("judge/*.yaml")
    }
    assert set(re.findall(r"`judge\.(\w+)", PAGE)) <= {*configuration(served)}
    judge = Judge("x", "y", load_template("alpaca_eval"), {}, True, True, lambda *_: iter(()), FOLDER, (1.0, 1.0))
    named = set(re.findall(r"`(judge/\w+)`", PAGE))
    assert named == {k for k in judge_metrics(judge, JUDGMENTS, "b", 0) if k.startswith("judge/")} - {
        "judge/longer_share",
        "judge/num_pairs",
        "judge/num_missing",
    }
