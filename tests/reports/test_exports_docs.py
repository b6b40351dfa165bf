"""docs/exports.md: its commands compose, its table is complete, and every option it names exists."""

import json
import re

import pytest

from dpo_ref.cli.schemas import CONF
from dpo_ref.component import configuration
from dpo_ref.reports.exports import RewardedPairs, alpaca_eval, rewardbench
from tests.support.command import ROOT, composes
from tests.support.evaluations import pair

PAGE = (ROOT / "docs" / "exports.md").read_text()
COMMANDS = re.findall(r"^python evaluate\.py.*", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command):
    composes(command)


def test_what_is_named_exists():
    table = PAGE.split("| `export=` |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == {p.stem for p in CONF.glob("export/*.yaml")}
    assert set(re.findall(r"`export\.(\w+)`", PAGE)) == {*configuration(alpaca_eval)}
    keys = set(re.search(r"Rows are `\{(.*?)\}`", PAGE)[1].split(", "))
    row = json.loads(rewardbench(RewardedPairs("r", "d", [pair()])).text)
    assert set(row) - keys == {"model", "origin"}
