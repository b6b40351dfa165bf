"""Intervals of the studies: by hand, and how often they hold what they are about."""

import math

import numpy as np
import pytest
from scipy.stats import t

from studies.intervals import over_runs, over_runs_and_prompts, within_groups

GROUPS = ["a"] * 3 + ["b"] * 2


def test_runs_vary_about_the_mean_of_their_group():
    values = [1.0, 2.0, 3.0, 10.0, 14.0]  # group means 2 and 12, squares 1 + 0 + 1 + 4 + 4 on 3 degrees of freedom
    interval = over_runs(values, GROUPS)
    assert interval.mean == 6.0
    assert interval.high - interval.mean == pytest.approx(t.ppf(0.975, 3) * math.sqrt(10 / 3 / 5))
    assert interval.mean - interval.low == pytest.approx(interval.high - interval.mean)


def test_a_lone_run_of_each_group_has_no_interval_over_runs():
    assert np.isnan(over_runs([1.0, 2.0], ["a", "b"])[1:]).all()


def test_runs_and_prompts_by_hand():
    """Runs 0 and 2, prompts 0, 3 and 6, nothing else: variances 2 and 9 of their means."""
    values = np.array([[0.0], [2.0]]) + np.array([0.0, 3.0, 6.0])
    interval = over_runs_and_prompts(values, ["a", "a"])
    runs, prompts = 2 / 2, 9 / 3
    degrees = (runs + prompts) ** 2 / (runs**2 / 1 + prompts**2 / 2)
    assert interval.mean == 4.0
    assert interval.high - interval.mean == pytest.approx(t.ppf(0.975, degrees) * 2.0)


def test_what_neither_explains_is_counted_once():
    generator = np.random.default_rng(0)
    rest = generator.normal(size=(400, 300))
    interval = over_runs_and_prompts(rest, ["a"] * 400)
    error = (interval.high - interval.mean) / 1.96
    assert error == pytest.approx(1 / math.sqrt(400 * 300), rel=0.15)  # and not the root of twice that


@pytest.mark.parametrize(("of_runs", "of_prompts"), [(1.0, 0.2), (0.2, 1.0), (0.0, 0.0), (1.0, 1.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(of_runs, of_prompts):
    """Two groups of five runs on 40 prompts, a thousand times: 95 % within three standard errors, or more."""
    generator, held = np.random.default_rng(1), 0
    groups = ["a"] * 5 + ["b"] * 5
    group_means = np.repeat([0.5, -0.5], 5)[:, None]
    for _ in range(1000):
        runs = group_means + of_runs * generator.normal(size=(10, 1))
        values = runs + of_prompts * generator.normal(size=40) + generator.normal(size=(10, 40))
        interval = over_runs_and_prompts(values, groups)
        held += interval.low <= 0 <= interval.high
    assert held / 1000 >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 1000)


def test_the_group_and_no_other_is_taken_out():
    assert within_groups(np.array([1.0, 3.0, 5.0, 10.0, 20.0]), GROUPS).tolist() == [-2, 0, 2, -5, 5]
