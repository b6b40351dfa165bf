"""Win rates from preferences, as AlpacaEval defines them, and how sure one can be of them.

A preference is P(policy wins) in [0, 1]: 1 a win, 0.5 a tie, nan where the judge gave none. AlpacaEval writes it as a
number in [1, 2], 2 a win of the evaluated model; `from_alpaca` reads that. All rates here are shares, not percent.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Num

from dpo_ref.evaluation.statistics.estimates import (
    NUM_RESAMPLES,
    bootstrap_interval,
    clustered_mean,
    fit_logistic,
    owners,
    percentile_interval,
    resampled_counts,
    sigmoid,
)
from dpo_ref.generation.records import Generation

LEGACY_TIE = 0.0  # how old AlpacaEval files write 1.5


def alpaca_share(preference: float | int | None) -> float:
    """One of AlpacaEval's preferences as P(policy wins); None and nan are missing, which is nan.

    Raises ValueError for anything that is not in [1, 2] and is not the legacy tie 0.
    """
    if preference is None or math.isnan(preference):
        return math.nan
    if preference != LEGACY_TIE and not 1 <= preference <= 2:
        raise ValueError(f"preference={preference:g} is not in 1..2 (2: the evaluated model wins)")
    return 0.5 if preference == LEGACY_TIE else preference - 1.0


def from_alpaca(preferences: Sequence[float | int | None]) -> Float[np.ndarray, " N"]:
    """AlpacaEval's preferences as P(policy wins), each by `alpaca_share`."""
    return np.array([alpaca_share(preference) for preference in preferences], dtype=np.float64)


def check_preferences(preferences: Float[np.ndarray, " N"]) -> None:
    """Raise ValueError, naming the row, for a preference outside [0, 1]."""
    wrong = (preferences < 0) | (preferences > 1)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"row {row + 1}: preference={preferences[row]:g} is not in [0, 1]; from_alpaca reads AlpacaEval's 1..2"
        )


class AlpacaWinRate(NamedTuple):
    """AlpacaEval's figures, the rates as shares; those of nothing compared are nan.

    `standard_error` takes prompts to be independent: s.d. (n - 1) over the square root of n.
    """

    win_rate: float
    standard_error: float
    discrete_win_rate: float
    n_wins: int
    n_wins_base: int
    n_draws: int
    n_total: int
    n_missing: int


def alpaca_win_rate(preferences: Float[np.ndarray, " N"]) -> AlpacaWinRate:
    """Win rate, standard error and discrete win rate (every preference counts as win, tie or loss) as AlpacaEval
    (Dubois et al. 2024, arXiv:2404.04475) computes them; missing preferences are left out and counted."""
    check_preferences(preferences)
    shares = preferences[~np.isnan(preferences)]
    total = len(shares)
    wins, losses = int((shares > 0.5).sum()), int((shares < 0.5).sum())
    draws = total - wins - losses
    return AlpacaWinRate(
        win_rate=float(shares.mean()) if total else float("nan"),
        standard_error=float(shares.std(ddof=1) / np.sqrt(total)) if total > 1 else float("nan"),
        discrete_win_rate=(wins + draws / 2) / total if total else float("nan"),
        n_wins=wins,
        n_wins_base=losses,
        n_draws=draws,
        n_total=total,
        n_missing=len(preferences) - total,
    )


def _resampled_means(values: Float[np.ndarray, " N"], clusters: Sequence[Hashable], seed: int) -> np.ndarray:
    owner = owners(clusters)
    sums, sizes = np.bincount(owner, weights=values), np.bincount(owner).astype(np.float64)
    resamples = resampled_counts(len(sizes), seed)
    return np.concatenate([counts @ sums / (counts @ sizes) for counts in resamples])


def cluster_interval(values: Float[np.ndarray, " N"], clusters: Sequence[Hashable], seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over all values, clusters drawn whole; nan for no values."""
    if len(values) == 0:
        return float("nan"), float("nan")
    return percentile_interval(_resampled_means(values, clusters, seed))


class PairedDifference(NamedTuple):
    """Mean of one model's preferences less another's on the same prompts, with cluster-robust error and interval."""

    mean: float
    se: float
    low: float
    high: float
    num_compared: int


def paired_difference(
    ours: Float[np.ndarray, " N"], theirs: Float[np.ndarray, " N"], clusters: Sequence[Hashable], seed: int
) -> PairedDifference:
    """How much higher one win rate is than another against the same baseline, row by row on the same prompts; rows
    that either lacks are left out. Prompts that are hard for both cancel, so this is sharper than two intervals."""
    check_preferences(ours)
    check_preferences(theirs)
    gaps = ours - theirs
    present = ~np.isnan(gaps)
    prompts = _where(clusters, present)
    mean, low_high = clustered_mean(gaps[present], prompts), cluster_interval(gaps[present], prompts, seed)
    return PairedDifference(mean.mean, mean.se, *low_high, int(present.sum()))


def _where(clusters: Sequence[Hashable], present: Bool[np.ndarray, " N"]) -> list[Hashable]:
    return [cluster for cluster, keep in zip(clusters, present, strict=True) if keep]


def preference_metrics(
    preferences: Float[np.ndarray, " N"],
    policy_lengths: Num[np.ndarray, " N"],
    baseline_lengths: Num[np.ndarray, " N"],
    clusters: Sequence[Hashable],
    seed: int,
) -> dict[str, float]:
    """All that a set of judged pairs says, as flat metrics; lengths in characters, `clusters` the prompts' names.

        win_rate (_se _low _high)            cluster-robust error, 95 % bootstrap interval over prompts
        discrete_win_rate, ties              wins + ties / 2; share of preferences of exactly one half
        win_rate_longer, win_rate_shorter (_se), longer_share   where the policy's answer is the longer, the shorter
        length_difference (_se)              mean of policy - baseline
        length_adjusted (_low _high), length_effect    `length_adjusted`; not AlpacaEval's LC win rate
        num_compared, num_missing            rows with a preference, and without

    Missing preferences (nan) are left out everywhere but in `num_missing`; what cannot be measured is nan. Raises
    ValueError for a preference outside [0, 1].
    """
    plain = alpaca_win_rate(preferences)
    present = ~np.isnan(preferences)
    values, prompts = preferences[present], _where(clusters, present)
    gaps = (policy_lengths - baseline_lengths)[present].astype(np.float64)
    low, high = cluster_interval(values, prompts, seed)
    adjusted = length_adjusted(preferences, policy_lengths, baseline_lengths, clusters, seed)
    means = {"win_rate": clustered_mean(values, prompts), "length_difference": clustered_mean(gaps, prompts)}
    for name, mask in (("longer", gaps > 0), ("shorter", gaps < 0)):
        means[f"win_rate_{name}"] = clustered_mean(values[mask], _where(prompts, mask))
    return {
        **{name: estimate.mean for name, estimate in means.items()},
        **{f"{name}_se": estimate.se for name, estimate in means.items()},
        "win_rate_low": low,
        "win_rate_high": high,
        "discrete_win_rate": plain.discrete_win_rate,
        "ties": plain.n_draws / plain.n_total if plain.n_total else float("nan"),
        "longer_share": float((gaps > 0).mean()) if plain.n_total else float("nan"),
        "length_adjusted": adjusted.win_rate,
        "length_adjusted_low": adjusted.low,
        "length_adjusted_high": adjusted.high,
        "length_effect": adjusted.length_effect,
        "num_compared": float(plain.n_total),
        "num_missing": float(plain.n_missing),
    }


# --- paired win rate of one policy's scored answers against another's on the same prompts


class WinRate(NamedTuple):
    """Share of comparisons won, ties counted half; its 95 % interval; the share of ties; how many prompts."""

    mean: float
    low: float
    high: float
    ties: float
    num_prompts: int


class _Scored(NamedTuple):
    draw: tuple[int, int]  # seed and sample: equal ones shared their random numbers
    score: float


def _by_prompt(generations: Sequence[Generation], scores: Sequence[float]) -> dict[str, list[_Scored]]:
    by_prompt: dict[str, list[_Scored]] = defaultdict(list)
    for generation, score in zip(generations, scores, strict=True):
        by_prompt[generation.question].append(_Scored((generation.seed, generation.sample_index), score))
    return by_prompt


def _comparisons(ours: list[_Scored], theirs: list[_Scored]) -> Float[np.ndarray, " C"]:
    """1 for a win, 0.5 for a tie, 0 for a loss, over pairs of one prompt's answers."""
    pairs = [(a, b) for a in ours for b in theirs]
    independent = [(a, b) for a, b in pairs if a.draw != b.draw] or pairs
    signs = np.sign([a.score - b.score for a, b in independent])
    return (signs + 1) / 2


def win_rate(
    generations: Sequence[Generation],
    scores: Sequence[float],
    baseline: Sequence[Generation],
    baseline_scores: Sequence[float],
    seed: int,
) -> WinRate:
    """How often the policy's answer scores above the baseline's to the same prompt.

    With several samples per prompt every pair of answers counts, except pairs that were drawn with the same random
    numbers (same seed and sample): two similar policies give those alike, while a win rate is about independent
    answers. Every prompt weighs the same; the interval is a bootstrap over prompts. With one sample each and one seed
    there is no other pair: sample the baseline with another seed to have independent answers.
    Raises ValueError where the prompts differ.
    """
    ours, theirs = _by_prompt(generations, scores), _by_prompt(baseline, baseline_scores)
    if ours.keys() != theirs.keys() or not ours:
        shared = len(ours.keys() & theirs.keys())
        raise ValueError(
            f"a win rate is paired by prompt, but only {shared} prompts are shared by the policy's {len(ours)} and "
            f"the baseline's {len(theirs)}; generate both from the same prompts"
        )
    compared = [_comparisons(answers, theirs[prompt]) for prompt, answers in ours.items()]
    shares = np.array([values.mean() for values in compared])
    ties = float(np.mean([(values == 0.5).mean() for values in compared]))
    low, high = bootstrap_interval(shares, seed)
    return WinRate(float(shares.mean()), low, high, ties, len(shares))


# --- a win rate as it might be if both answers were equally long
# For prompts and baselines of one's own. This is not AlpacaEval's length-controlled win rate (`length_control.py`): it
# knows neither the difficulty of the instructions nor what padding did to a fixed baseline. docs/winrates.md says how
# far the two lie apart.


class LengthAdjusted(NamedTuple):
    """The adjusted win rate in [0, 1] with its 95 % interval, and the length effect: log-odds at a tanh of 1."""

    win_rate: float
    low: float
    high: float
    length_effect: float


NOT_MEASURED = LengthAdjusted(*[math.nan] * 4)


def _features(differences: Float[np.ndarray, " N"], weights: Float[np.ndarray, "B N"]) -> Float[np.ndarray, "B N 2"]:
    """One, and tanh of the difference over its standard deviation in each weighting."""
    total = weights.sum(axis=1)
    means = weights @ differences / total
    squares = (weights * np.square(differences - means[:, None])).sum(axis=1)
    deviations = np.sqrt(squares / np.maximum(total - 1, 1))
    safe = np.where(deviations > 0, deviations, 1.0)
    scaled = np.where(deviations[:, None] > 0, np.tanh(differences / safe[:, None]), 0.0)
    return np.stack([np.ones_like(scaled), scaled], axis=-1)


def length_adjusted(
    preferences: Float[np.ndarray, " N"],
    policy_lengths: Num[np.ndarray, " N"],
    baseline_lengths: Num[np.ndarray, " N"],
    clusters: Sequence[Hashable],
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> LengthAdjusted:
    """sigmoid(a) of the regression logit P(policy wins) = a + b tanh(d / s.d.(d)), where d is the policy's length less
    the baseline's, in any unit; the interval is a bootstrap over clusters that repeats everything.

    Preferences are P(policy wins) in [0, 1], nan where missing. A weak ridge (`estimates.RIDGE`) keeps a and b finite
    where one side always wins. nan where nothing was compared, and where all answers are longer by one same amount,
    so that length cannot be told from quality.
    """
    present = ~np.isnan(preferences)
    shares, owner = preferences[present], owners([c for c, keep in zip(clusters, present, strict=True) if keep])
    differences = (policy_lengths - baseline_lengths)[present].astype(np.float64)
    if len(shares) == 0 or (differences[0] != 0 and np.ptp(differences) == 0):
        return NOT_MEASURED
    whole = np.ones((1, len(shares)))
    fitted = fit_logistic(_features(differences, whole), shares[None], whole)
    intercepts = []
    num_clusters = int(owner.max()) + 1
    width = 8 * math.ceil(len(shares) / num_clusters)
    for counts in resampled_counts(num_clusters, seed, width, num_resamples):
        weights = counts[:, owner]
        intercepts.append(fit_logistic(_features(differences, weights), shares[None], weights)[:, 0])
    low, high = percentile_interval(sigmoid(np.concatenate(intercepts)))
    return LengthAdjusted(sigmoid(fitted[:, 0]).item(), low, high, fitted[0, 1].item())
