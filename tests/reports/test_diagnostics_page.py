"""docs/diagnostics.md: its commands compose, the options and metrics it names exist, its numbers were measured."""

import json
import re

import pytest

from dpo_ref.component import configuration
from dpo_ref.evaluation.diagnostics.diagnose import tokens
from dpo_ref.evaluation.results import Thresholds
from tests.support.command import ROOT, composes

PAGE = (ROOT / "docs" / "diagnostics.md").read_text()
COMMANDS = re.findall(r"^python evaluate\.py.*", PAGE, re.MULTILINE)
MEASURED = json.loads((ROOT / "benchmarks" / "results" / "diagnostics.json").read_text())
RUNS = [MEASURED[name] for name in ("degenerate", "healthy")]
TABLE = re.findall(r"^\| `(.+)` \| (−?[\d.]+)(?: ± ([\d.]+))? \| (−?[\d.]+)(?: ± ([\d.]+))? \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command, tmp_path, monkeypatch):
    """The files of pairs that they name are there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llmbar").mkdir()
    row = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})
    for path in ("llmbar/Natural.json", "my_pairs.jsonl"):
        (tmp_path / path).write_text(row + "\n")
    composes(command)


def test_options_and_metrics_exist():
    assert len(COMMANDS) >= 4
    assert set(re.findall(r"diagnostic\.(\w+)", PAGE)) == {*configuration(tokens)}
    assert set(re.findall(r"degeneration\.(\w+)", PAGE)) == {*vars(Thresholds())}
    named = set(re.findall(r"`((?:eos|kl|tokens|entropy|displacement|logratios|rewards)/\w+)`", PAGE))
    assert len(named) > 20
    assert named <= {*RUNS[0]["metrics"]}


@pytest.mark.parametrize(("key", "first", "first_se", "second", "second_se"), TABLE, ids=[row[0] for row in TABLE])
def test_the_table_is_what_was_measured(key, first, first_se, second, second_se):
    for run, shown, error in zip(RUNS, (first, second), (first_se, second_se), strict=True):
        decimals = len(shown.partition(".")[2])
        for text, name in ((shown, key), (error, f"{key}_se")):
            assert not text or text.replace("−", "-") == f"{run['metrics'][name]:.{decimals}f}"


def test_the_degenerate_one_was_called_so():
    assert len(TABLE) > 15
    assert f"*{RUNS[0]['degenerate'][0]}*" in PAGE.replace("\n", " ")
    assert RUNS[1]["degenerate"] == []
