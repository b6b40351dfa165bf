"""Means with honest uncertainty. Prompts are the unit: samples of one prompt are not independent of each other."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

NUM_RESAMPLES = 4000


class Estimate(NamedTuple):
    """A mean and its standard error; the error is nan where there is one cluster only."""

    mean: float
    se: float


def clustered_mean(values: Sequence[float] | Float[np.ndarray, " N"], clusters: Sequence[Hashable]) -> Estimate:
    """The mean of all values, with the cluster-robust standard error (Miller 2024, arXiv:2411.00640) times the usual
    C / (C - 1) for C clusters; nan for no values.

    With equally many values per cluster this is the standard error of the mean of cluster means.
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) == 0:
        return Estimate(float("nan"), float("nan"))
    places = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    owner = np.array([places[cluster] for cluster in clusters])
    mean = array.mean()
    residuals = np.bincount(owner, weights=array - mean)
    count = len(residuals)
    if count < 2:
        return Estimate(float(mean), float("nan"))
    variance = np.square(residuals).sum() / len(array) ** 2 * count / (count - 1)
    return Estimate(float(mean), float(np.sqrt(variance)))


def bootstrap_interval(values: Float[np.ndarray, " P"], seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of P independent values (Efron 1979); seeded."""
    generator = np.random.default_rng(seed)
    rows = max(1, 2**22 // len(values))  # resamples at once: the index table stays below 32 MiB
    means = [
        values[generator.integers(len(values), size=(min(rows, NUM_RESAMPLES - done), len(values)))].mean(axis=1)
        for done in range(0, NUM_RESAMPLES, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
