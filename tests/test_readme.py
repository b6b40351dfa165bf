"""Every command of the README composes, its refusals are real, its code works, its lists are complete, the way through
the code that docs/architecture.md shows is there, and tables of all pages are whole."""

import re
import shlex

import pytest
import torch

from dpo_ref.cli import schemas
from dpo_ref.objectives import interface
from dpo_ref.types import PairLogps
from tests.support.command import ROOT, composes, train

README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
COMMANDS = sorted(set(re.findall(r"^python (?:train|evaluate)\.py.*?(?=\s+#|$)", README, re.MULTILINE)))
REFUSALS = re.findall(r"^\$ python train\.py (.*)\n(error: .*)$", README, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command):
    composes(command)


def test_there_are_commands_of_every_sort():
    assert len(COMMANDS) >= 12
    assert any("-m " in command for command in COMMANDS)
    assert len(REFUSALS) == 2


@pytest.mark.parametrize(("arguments", "message"), REFUSALS)
def test_refusals_are_as_shown(arguments, message):
    try:
        shown = train(*shlex.split(arguments), "tracking=none").stderr.strip()
    except ValueError as error:  # the command line itself
        shown = f"error: {error}"
    assert shown == message


def test_the_table_of_groups_is_complete():
    rows = dict(re.findall(r"^\| `(\w+)=` \|.*\| (.*) \|$", README, re.MULTILINE))
    assert set(rows) == set(schemas.groups())
    for group, choices in rows.items():
        assert set(re.findall(r"`(\w+)`", choices)) == {path.stem for path in schemas.CONF.glob(f"{group}/*.yaml")}, (
            group
        )


def test_the_objective_that_is_added_works():
    """Margins 0.2 and 1.4 at beta 0.1: losses 0.8 squared and 0."""
    code = re.search(r"```python\n(def truncated_quadratic.*?)```", README, re.DOTALL).group(1)
    space = {name: getattr(interface, name) for name in ("KLStrength", "Preference")} | {"PairLogps": PairLogps}
    exec(code, space)
    sizes = torch.ones(2, dtype=torch.long)
    policy = PairLogps(torch.tensor([1.0, 10.0]), torch.tensor([-1.0, -4.0]), sizes, sizes, sizes, sizes)
    zeros = PairLogps(torch.zeros(2), torch.zeros(2), sizes, sizes, sizes, sizes)
    objective = interface.bind(space["truncated_quadratic"], beta=0.1)
    torch.testing.assert_close(objective.function(policy, zeros).losses, torch.tensor([0.64, 0.0]))
    assert objective.uses_reference


def test_the_layout_names_files_that_exist():
    block = README.split("## How it works")[1].split("```")[1]
    names = re.findall(r"[\w]+(?:\.py|/)", block)
    missing = [n for n in names if not (ROOT / n).exists() and not (ROOT / "dpo_ref" / n).exists()]
    assert not [n for n in missing if n not in ("benchmarks/", "docs/")]


def test_the_stops_of_the_way_to_dpo_exist():
    """A stop is a file and what it defines; there are at most eight rows, and `FusedLoss` inside one of them."""
    stops = re.findall(r"`([\w/]+\.py): (?:(\w+)\.)?(\w+)`", ARCHITECTURE)
    assert 8 <= len(stops) <= 9
    for file, owner, name in stops:
        path = ROOT / file if (ROOT / file).exists() else ROOT / "dpo_ref" / file
        source = path.read_text()
        assert re.search(rf"^ *(def|class) {name}\b", source, re.MULTILINE), (file, name)
        assert not owner or re.search(rf"^class {owner}\b", source, re.MULTILINE), (file, owner)


def test_the_method_is_shown_as_it_is():
    shown = re.search(r"```python\n(.*?)```", ARCHITECTURE, re.DOTALL).group(1)
    assert shown in (ROOT / "dpo_ref" / "training" / "trainer.py").read_text()


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.name
)
def test_a_table_is_one(page):
    """Its first line is followed by one of dashes: rows below an empty line would be shown as text."""
    lines = page.read_text().splitlines()
    begun = [i for i, line in enumerate(lines) if line.startswith("|") and not (i and lines[i - 1].startswith("|"))]
    assert not [lines[i] for i in begun if not re.fullmatch(r"[|\s:-]+", lines[i + 1])]
