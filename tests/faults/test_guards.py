"""The list of guards follows the code; `make guards` shows that the tests would see them gone."""

import ast
from pathlib import Path

import pytest

from tests.faults.guards import ROOT, read_guards, taken_out

GUARDS = read_guards()


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: f"{guard.file}:{guard.guard.strip()[:40]}")
def test_a_guard_stands_once_in_its_file_and_has_a_test(guard):
    text = (ROOT / "dpo_ref" / guard.file).read_text()
    assert text.count(guard.guard) == 1
    ast.parse(text.replace(guard.guard, guard.without))
    name, _, test = guard.test.partition("::")
    assert f"\ndef {test}(" in (Path(__file__).parent / name).read_text()


def test_a_guard_that_was_taken_out_is_put_back(tmp_path):
    path = tmp_path / "dpo_ref" / GUARDS[0].file
    path.parent.mkdir(parents=True)
    path.write_text(f"def f():\n{GUARDS[0].guard}\n")
    with taken_out(GUARDS[0], tmp_path):
        assert path.read_text() == f"def f():\n{GUARDS[0].without}\n"
    assert path.read_text() == f"def f():\n{GUARDS[0].guard}\n"
