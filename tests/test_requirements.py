"""requirements.lock is what requirements.txt asks for, all of it and nothing else; its licences are known.

Without a network: what the installed packages require is compared with what is locked.
"""

import json
import re
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.audit import verdict
from tests.support.command import ROOT
from tests.support.licences import UNKNOWN, rows
from tests.support.lock import LOCK, pins, requirements

PINS = pins()
HERE = {pin.name: pin for pin in PINS if not pin.requirement.marker or pin.requirement.marker.evaluate()}
DIRECT = requirements(ROOT / "requirements.txt")
WITH_CUDA = re.compile(r"(nvidia|cuda)-.*|triton")  # what the locked build of torch brings and one for CPUs lacks


def applying(required: list[str], extras: set[str]) -> list[Requirement]:
    """The requirements that hold on this machine."""
    environments = [{"extra": extra} for extra in extras | {""}]
    parsed = [Requirement(line) for line in required]
    return [line for line in parsed if not line.marker or any(line.marker.evaluate(values) for values in environments)]


def needed() -> dict[str, list[Requirement]]:
    """What the installed packages require, beginning with requirements.txt: the requirements of each by its name."""
    everything: dict[str, list[Requirement]] = {}
    waiting = list(DIRECT.values())
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement in everything.setdefault(name, []):
            continue
        everything[name].append(requirement)
        waiting += applying(distribution(name).requires or [], requirement.extras)
    return everything


def test_every_package_has_hashes():
    assert len(PINS) > 80
    assert [pin.name for pin in PINS if not pin.hashes] == []
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for pin in PINS for digest in pin.hashes)


def test_every_requirement_is_locked_within_its_range():
    for pin in PINS:
        assert DIRECT.get(pin.name, pin.requirement).specifier.contains(pin.version), pin.name
    assert {pin.name for pin in PINS if "-r requirements.txt" in pin.via} == set(DIRECT)


def test_what_packages_require_is_locked_and_suits_them():
    for name, required in needed().items():
        for requirement in required:
            assert name in HERE, f"{requirement}: not locked"
            assert requirement.specifier.contains(HERE[name].version, prereleases=True), requirement


def test_nothing_is_locked_that_nothing_needs():
    """By what the lock says of its graph, and by what is installed here."""
    reached, waiting = set(), ["-r requirements.txt"]
    while waiting:
        user = waiting.pop()
        users = [pin.name for pin in PINS if user in pin.via and pin.name not in reached]
        reached.update(users)
        waiting += users
    assert {pin.name for pin in PINS} == reached
    assert [name for name in set(HERE) - set(needed()) if not WITH_CUDA.fullmatch(name)] == []


def test_the_tests_run_with_what_is_locked():
    """Different may be: the build of torch, which for CPUs has a name of its own, and what the other build brings."""
    for name, pin in HERE.items():
        try:
            installed = distribution(name).version
        except PackageNotFoundError:
            assert WITH_CUDA.fullmatch(name), f"{name} is not installed; type `make install-dev`"
            continue
        assert installed.removesuffix("+cpu" if name == "torch" else "") == pin.version, name


def test_no_index_is_named():
    lines = LOCK.read_text().splitlines()
    assert [line for line in lines if "://" in line or "--index" in line or "--find" in line] == []


def test_every_locked_package_has_a_licence_on_the_page():
    licences = rows()
    assert set(licences) == {(pin.name, pin.version) for pin in PINS}, "type `make licences`"
    without = {name: words for (name, _), words in licences.items() if words.startswith("unknown")}
    assert without == {name: f"unknown: {reason}" for name, reason in UNKNOWN.items()}


LOOKED_UP = {"name": "a", "version": "1", "vulns": []}
SKIPPED = {"name": "b", "skip_reason": "not there"}
VULNERABLE = {"name": "c", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"], "aliases": []}]}


@pytest.mark.parametrize(
    ("packages", "status", "line"),
    [
        ([LOOKED_UP], 0, "1 of 1 packages were looked up"),
        ([LOOKED_UP, SKIPPED], 3, "not checked: 1 packages, as b: not there"),
        ([SKIPPED, VULNERABLE], 1, "c 1: CVE-1, mended in 2"),
    ],
)
def test_an_audit_passes_only_where_everything_was_looked_up(packages, status, line):
    code, lines = verdict(json.dumps({"dependencies": packages}), "")
    assert code == status
    assert line in lines


def test_an_audit_without_an_answer_is_none():
    assert verdict("", "Traceback\nConnectionError: refused\n") == (
        3,
        ["not checked: the service that knows vulnerabilities did not answer (ConnectionError: refused)"],
    )
