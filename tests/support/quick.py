"""Which of the cases of a test `make test` runs."""

import pytest


def only(cases, *quick):
    """The cases, of which those that are not named are run by hand."""
    return [case if case in quick else _by_hand(case) for case in cases]


def _by_hand(case):
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
