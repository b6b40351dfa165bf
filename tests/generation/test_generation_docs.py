"""docs/generation.md: its commands compose, and every option and choice it names exists."""

import re

import pytest

from dpo_ref.cli.schemas import CONF
from dpo_ref.component import configuration
from dpo_ref.generation.prompt_sets import alpaca_eval
from dpo_ref.generation.sampling import transformers
from dpo_ref.generation.served import served
from dpo_ref.models.server import KEY
from tests.support.command import ROOT, composes

PAGE = (ROOT / "docs" / "generation.md").read_text()
COMMANDS = re.findall(r"^python evaluate\.py.*", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command):
    composes(command)


@pytest.mark.parametrize("group", ["generation", "prompts"])
def test_the_table_of_choices_is_complete(group):
    table = PAGE.split(f"| `{group}=` |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == {p.stem for p in CONF.glob(f"{group}/*.yaml")}


def test_what_is_named_exists():
    options = {*configuration(transformers), *configuration(served)}
    assert set(re.findall(r"`generation\.(\w+)", PAGE)) <= options
    assert set(re.findall(r"`prompts\.(\w+)`", PAGE)) <= {*configuration(alpaca_eval)}
    assert KEY in PAGE
