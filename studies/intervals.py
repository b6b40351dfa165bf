"""Intervals of means over runs and prompts, both of which are a sample of what might have been."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import t

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def within_groups(values: Float[np.ndarray, "U ..."], groups: Sequence[str]) -> Float[np.ndarray, "U ..."]:
    """Values less the mean of their group."""
    centred = np.array(values, dtype=np.float64)
    for group in set(groups):
        rows = [index for index, name in enumerate(groups) if name == group]
        centred[rows] -= centred[rows].mean(axis=0)
    return centred


def _interval(mean: float, variance: float, degrees: float, level: float) -> Interval:
    half = float(t.ppf((1 + level) / 2, max(degrees, 1.0))) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half)


def over_runs(values: Sequence[float], groups: Sequence[str], level: float = LEVEL) -> Interval:
    """The mean of a number of each run, with Student's t; runs of one group (an initial policy) vary about the group's
    own mean, so the interval is for these groups. A lone run of every group has no interval: its ends are nan."""
    array = np.asarray(values, dtype=np.float64)
    degrees = len(array) - len(set(groups))
    if degrees < 1:
        return Interval(float(array.mean()), math.nan, math.nan)
    variance = float(np.square(within_groups(array, groups)).sum()) / degrees / len(array)
    return _interval(float(array.mean()), variance, degrees, level)


def over_runs_and_prompts(values: Float[np.ndarray, "U P"], groups: Sequence[str], level: float = LEVEL) -> Interval:
    """The mean of a number of each of U runs on each of the same P prompts.

    Runs and prompts are crossed: with x = group + run + prompt + rest, the mean of run means has the variance
    s²(runs) / U + s²(prompts) / P - s²(rest) / (U P), where s² are the variances of run means within their groups, of
    prompt means, and of what neither explains; it is no less than either of the first two. Degrees of freedom are
    Satterthwaite's (1946) of these two. With one run of every group only prompts vary.
    """
    num_runs, num_prompts = values.shape
    mean, prompt_means = float(values.mean()), values.mean(axis=0)
    of_prompts = float(prompt_means.var(ddof=1)) / num_prompts
    degrees = num_runs - len(set(groups))
    if degrees < 1:
        return _interval(mean, of_prompts, num_prompts - 1, level)
    of_runs = float(np.square(within_groups(values.mean(axis=1), groups)).sum()) / degrees / num_runs
    rest = within_groups(values - prompt_means, groups)
    of_rest = float(np.square(rest - rest.mean(axis=1, keepdims=True)).sum()) / (degrees * (num_prompts - 1))
    variance = max(of_runs + of_prompts - of_rest / (num_runs * num_prompts), of_runs, of_prompts)
    parts = of_runs**2 / degrees + of_prompts**2 / (num_prompts - 1)
    return _interval(mean, variance, variance**2 / parts if parts else math.inf, level)
