"""Means with honest uncertainty, and what bootstraps are made of. Prompts are the unit: samples of one prompt are not
independent of each other.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

NUM_RESAMPLES_OF_MEANS = 4000


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
    indices = {cluster: index for index, cluster in enumerate(dict.fromkeys(clusters))}
    owner = np.array([indices[cluster] for cluster in clusters])
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
        values[generator.integers(len(values), size=(min(rows, NUM_RESAMPLES_OF_MEANS - start), len(values)))].mean(
            axis=1
        )
        for start in range(0, NUM_RESAMPLES_OF_MEANS, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# --- bootstrap over clusters
# (Efron 1979; Davison and Hinkley 1997, section 3.8): whole prompts are drawn with replacement, each with everything
# that was measured on it.


NUM_RESAMPLES = 2000
LARGEST_CHUNK = 2**22  # numbers held at once


def owners(clusters: Sequence[Hashable]) -> Int[np.ndarray, " N"]:
    """The index of each value's cluster, counted by first appearance."""
    indices = {cluster: index for index, cluster in enumerate(dict.fromkeys(clusters))}
    return np.array([indices[cluster] for cluster in clusters], dtype=np.int64)


def resampled_counts(
    num_clusters: int, seed: int, width: int = 1, num_resamples: int = NUM_RESAMPLES
) -> Iterator[Float[np.ndarray, "B C"]]:
    """How often each of C clusters is drawn in each resample, some resamples at a time; seeded.

    `width` is how many numbers the caller holds per cluster and resample. The draws do not depend on it.
    """
    generator = np.random.default_rng(seed)
    rows = max(1, LARGEST_CHUNK // (num_clusters * width))
    for start in range(0, num_resamples, rows):
        size = min(rows, num_resamples - start)
        draws = generator.integers(num_clusters, size=(size, num_clusters))
        indices = (draws + num_clusters * np.arange(size)[:, None]).ravel()
        yield np.bincount(indices, minlength=size * num_clusters).reshape(size, num_clusters).astype(np.float64)


def percentile_interval(values: Float[np.ndarray, " B"], level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrapped values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# --- logistic regression
# On shares in [0, 1], for many weightings of the same rows at once: what bootstraps need.


RIDGE = 0.01  # precision of a normal prior with s.d. 10 on log-odds: too weak to see, and keeps every estimate finite
MAX_STEPS = 200
TOLERANCE = 1e-9  # last step in a coefficient; convergence is quadratic, so the error is far below it


def sigmoid(logits: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0, -logits))


def fit_logistic(
    features: Float[np.ndarray, "#B N D"],
    shares: Float[np.ndarray, "#B N"],
    weights: Float[np.ndarray, "B N"],
    ridge: float = RIDGE,
) -> Float[np.ndarray, "B D"]:
    """Coefficients that maximise sum_n w_n [s_n log p_n + (1 - s_n) log(1 - p_n)] - ridge / 2 |c|^2 with
    p = sigmoid(features @ c), in each of B weightings; no intercept.

    Newton steps damped by log(1 + d) / d, d being the largest change of a logit, which never overshoot for this loss
    (Sun and Tran-Dinh 2019, arXiv:1703.04599). Raises ValueError for a ridge of 0 or less, without which the maximum
    may lie at infinity.
    """
    if ridge <= 0:
        raise ValueError(f"ridge={ridge} must be positive")
    coefficients = np.zeros((len(weights), features.shape[-1]))
    transposed = np.swapaxes(features, -1, -2)
    for _ in range(MAX_STEPS):
        p = sigmoid((features @ coefficients[..., None])[..., 0])
        gradient = (transposed @ (weights * (p - shares))[..., None])[..., 0] + ridge * coefficients
        hessian = (transposed * (weights * p * (1 - p))[:, None]) @ features + ridge * np.eye(features.shape[-1])
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        change = np.abs((features @ step[..., None])[..., 0]).max(axis=-1, keepdims=True)
        damping = np.log1p(change) / np.maximum(change, 1e-300)
        step = step * np.where(change > 0, damping, 1.0)
        coefficients = coefficients - step
        if np.abs(step).max() < TOLERANCE:
            return coefficients
    raise ArithmeticError(f"logistic regression has not converged after {MAX_STEPS} steps")
