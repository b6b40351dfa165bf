"""Sweeps of three small jobs in the faults' tests, with an evaluation at their end that takes no time."""

from types import SimpleNamespace

import pytest

from dpo_ref.cli import sweep as end_of_sweep
from tests.support.command import typed
from tests.support.pictures import undrawn

BETAS = ("0.1", "0.3", "3")
QUICK = ["generation.max_new_tokens=4", "generation.samples_per_prompt=1", "scorer=none", "diagnostic=none"]


@pytest.fixture(autouse=True)
def short_evaluation(monkeypatch):
    """The evaluation at a sweep's end without pictures, of short answers, and without importing all again."""
    run = SimpleNamespace(run=lambda command, check: typed(*command[1:], *QUICK))
    monkeypatch.setattr(end_of_sweep, "subprocess", run)
    with undrawn():
        yield


def jobs(folder, betas=BETAS):
    """The folders of a sweep's jobs."""
    return [folder / f"{index}_beta-{beta}" for index, beta in enumerate(betas)]
