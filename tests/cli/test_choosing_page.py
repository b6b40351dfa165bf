"""docs/choosing.md: its commands compose, and every option, file and picture that it names exists."""

import re

import pytest

from dpo_ref.cli.halving import halving
from dpo_ref.component import configuration
from tests.support.command import ROOT, composes

PAGE = (ROOT / "docs" / "choosing.md").read_text()
COMMANDS = re.findall(r"^(?:OMP_NUM_THREADS=1 )?(python (?:train|evaluate)\.py.*?)(?=\s+#|$)", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command):
    composes(command)


def test_the_table_of_options_is_complete():
    named = set(re.findall(r"^\| `search\.(\w+)` \|", PAGE, re.MULTILINE))
    assert named == {*configuration(halving)} - {"rung"}  # which the search sets
    defaults = {name: parameter.default for name, parameter in configuration(halving).items()}
    assert (defaults["eta"], defaults["rungs"]) == (3, 3)
    assert "rounded up (3)" in PAGE
    assert "is the end (3)" in PAGE


def test_what_is_named_exists():
    links = re.findall(r"\]\((\w+\.md|images/\w+\.png)\)", PAGE)
    assert len(links) >= 4
    assert [link for link in links if not (ROOT / "docs" / link).is_file()] == []
    assert all((ROOT / program).is_file() for program in re.findall(r"benchmarks/\w+\.py", PAGE))
