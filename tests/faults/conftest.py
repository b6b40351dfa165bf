"""Faults: what is done to the software, what its user then sees, and what survives.

Each test ends by telling its row; `make reliability` runs all of them and writes docs/reliability.md of the rows.
"""

import re
import signal
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

from tests.faults.guards import read_guards
from tests.support.command import train
from tests.support.faults import SMALL

# Whoever starts the tests in the background, or with nohup, lets them ignore these, and commands inherit that.
for stopping in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(stopping) is signal.SIG_IGN:
        signal.signal(stopping, signal.SIG_DFL)

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
SECTIONS = {
    "let in": "What strangers bring",
    "lost": "What could be lost",
    "used silently": "What is broken and looks whole",
    "killed": "Killed, stopped, and gone on with",
    "service": "Services that fail",
    "untidy": "Everything else that goes wrong",
}
FOLDERS = re.compile(r"/\S*?/pytest-of-[^/\s]+/pytest-\d+(/popen-gw\d+)?")  # that pytest makes for tests
Section = Literal["let in", "lost", "used silently", "killed", "service", "untidy"]


class Row(NamedTuple):
    section: str
    fault: str  # what was done
    seen: str  # what the user saw
    survived: str  # what was still there, or what did not happen


@pytest.fixture
def tell(record_property, tmp_path) -> Callable[..., None]:
    """Called at the end of a test: what was done, what was seen (of the real output: its line that matters), what
    survived."""

    def _tell(section: Section, fault: str, *, seen: str, survived: str) -> None:
        seen = FOLDERS.sub("…", seen.replace(str(tmp_path), "…"))
        seen = re.sub(r"\s+", " ", seen).strip()
        record_property("fault", list(Row(section, fault, seen, survived)))

    return _tell


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run to evaluate, of which tests take copies."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert train(*SMALL, "data.num_test_prompts=10", "trainer.max_steps=2", f"output_dir={run}").returncode == 0
    return run


def pytest_addoption(parser):
    parser.addoption("--reliability", action="store_true", help=f"write the rows of all faults to {PAGE.name}")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, exitstatus, config):
    in_worker = hasattr(config, "workerinput")  # of xdist, which has seen a part of the tests alone
    if in_worker or not config.getoption("--reliability", default=False):
        return
    if exitstatus:
        terminalreporter.line(f"{PAGE.name} stays as it is: a fault was let in")
        return
    rows = [
        (Row(*value), report.nodeid.split("::")[0] + "::" + report.nodeid.split("::")[-1].partition("[")[0])
        for report in terminalreporter.stats["passed"]
        for name, value in report.user_properties
        if name == "fault"
    ]
    PAGE.write_text(page_of(rows))
    terminalreporter.line(f"wrote {len(rows)} rows to {PAGE.name}")


INTRODUCTION = """# What was done to it, and what survived

Every row is a test of `tests/faults`; this page is written by `make reliability` from a run of all of them, in which
each passed. "Seen" is the line that was printed, shortened paths aside. `make faults` runs them.

## What is promised

For each promise the tests that keep it: each fails when a line of code that it watches is taken out. `make guards`
takes out one after the other (`tests/faults/guards.toml`) and sees to that.
"""


def page_of(rows: list[tuple[Row, str]]) -> str:
    """docs/reliability.md: a table for each section."""
    order = list(SECTIONS)
    rows = sorted(rows, key=lambda row: (order.index(row[0].section), row[1], row[0].fault))
    parts = [INTRODUCTION + _promises()]
    for section, group in groupby(rows, key=lambda row: row[0].section):
        lines = [f"## {SECTIONS[section]}", "", "| done | seen | survived | test |", "|---|---|---|---|"]
        for row, test in group:
            cells = [row.fault, row.seen, row.survived, f"`{test.removeprefix('tests/faults/')}`"]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _promises() -> str:
    rows = ["", "| promise | in | kept by |", "|---|---|---|"]
    for promise, guards in groupby(read_guards(), key=lambda guard: guard.promise):
        watched = list(guards)
        files, tests = ({f"`{guard[at].removeprefix('../')}`": None for guard in watched} for at in (1, 4))
        rows.append(f"| {promise} | {', '.join(files)} | {', '.join(tests)} |")
    return "\n".join(rows) + "\n"
