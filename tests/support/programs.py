"""Programs of benchmarks/, as a fixture that imports them."""

import importlib
import sys

import pytest

from tests.support.command import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def program(monkeypatch):
    """Imports a program of benchmarks/, which is let go again with what it imports from there."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)
