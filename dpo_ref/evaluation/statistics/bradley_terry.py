"""Bradley–Terry strengths (Bradley and Terry 1952; Zermelo 1929) of several models from pairwise preferences."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from dpo_ref.evaluation.statistics.comparisons import check_preferences
from dpo_ref.evaluation.statistics.estimates import RIDGE, fit_logistic, owners, percentile_interval, resampled_counts


@dataclass(frozen=True, slots=True)
class ModelStrength:
    """A model's log-odds of beating the anchor, or an average model where there is none, and 95 % interval."""

    model: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class BradleyTerry:
    """Strengths in order, strongest first.

    `groups` are models in order of strength, split where the stronger ones have not lost so much as a share of a win
    to the weaker: with more than one group the likelihood has no maximum (Ford 1957), and how far the groups lie apart
    is set by the ridge alone. `ridge` is the precision of the normal prior on strengths that keeps them finite.
    """

    strengths: list[ModelStrength]
    anchor: str | None
    groups: list[list[str]]
    ridge: float = RIDGE

    @property
    def finite(self) -> bool:
        """Whether all strengths come from the preferences."""
        return len(self.groups) == 1


class _Games(NamedTuple):
    """Weight and weighted share won by the first of each pair of models, for each prompt."""

    pairs: Int[np.ndarray, "P 2"]
    won: Float[np.ndarray, "C P"]
    weight: Float[np.ndarray, "C P"]


def _games(
    first: Int[np.ndarray, " N"],
    second: Int[np.ndarray, " N"],
    shares: Float[np.ndarray, " N"],
    weights: Float[np.ndarray, " N"],
    clusters: Sequence[Hashable],
) -> _Games:
    """Every pair once, whichever of the two came first."""
    swapped = first > second
    both = np.where(swapped[:, None], np.stack([second, first], 1), np.stack([first, second], 1))
    pairs, pair = np.unique(both, axis=0, return_inverse=True)
    owner = owners(clusters)
    shape = (int(owner.max()) + 1, len(pairs))
    won, weight = np.zeros(shape), np.zeros(shape)
    np.add.at(won, (owner, pair), weights * np.where(swapped, 1 - shares, shares))
    np.add.at(weight, (owner, pair), weights)
    return _Games(pairs, won, weight)


def _reachable(edges: Bool[np.ndarray, "K K"]) -> Bool[np.ndarray, "K K"]:
    """Which models can be reached from which."""
    reach = edges | np.eye(len(edges), dtype=bool)
    for _ in range(len(edges).bit_length()):
        reach = (reach.astype(np.float64) @ reach) > 0
    return reach


def _components(mutual: Bool[np.ndarray, "K K"]) -> list[list[int]]:
    return [list(part) for part in dict.fromkeys(tuple(np.flatnonzero(row).tolist()) for row in mutual)]


def _fit(games: _Games, counts: Float[np.ndarray, "B C"], num_models: int) -> Float[np.ndarray, "B K"]:
    """Strengths that sum to zero, in each resample."""
    features = np.zeros((1, len(games.pairs), num_models))
    rows = np.arange(len(games.pairs))
    features[0, rows, games.pairs[:, 0]], features[0, rows, games.pairs[:, 1]] = 1.0, -1.0
    weights = counts @ games.weight
    shares = np.divide(counts @ games.won, weights, out=np.zeros_like(weights), where=weights > 0)
    return fit_logistic(features, shares, weights)


def _check(first: Sequence[str], second: Sequence[str], names: Sequence[str], anchor: str | None) -> None:
    if len(names) < 2:
        raise ValueError("strengths compare models, and there are fewer than two")
    if alone := next((a for a, b in zip(first, second, strict=True) if a == b), None):
        raise ValueError(f"{alone} is compared with itself, which says nothing about its strength; leave that out")
    if anchor is not None and anchor not in names:
        raise ValueError(f"the anchor {anchor} is none of the models {', '.join(names)}")


def _groups(names: Sequence[str], games: _Games, fitted: Float[np.ndarray, " K"]) -> list[list[str]]:
    """Models that are bound to each other by wins both ways, strongest first. ValueError for unconnected ones."""
    won, weight = games.won.sum(axis=0), games.weight.sum(axis=0)
    beats = np.zeros((len(names), len(names)), dtype=bool)
    a, b = games.pairs.T
    beats[a, b], beats[b, a] = won > 0, weight - won > 0
    parts = _components(_reachable(beats | beats.T))
    if len(parts) > 1:
        listed = "; ".join(", ".join(names[index] for index in part) for part in parts)
        raise ValueError(f"strengths need models that are connected by comparisons, and these are not: {listed}")
    reach = _reachable(beats)
    bound = sorted(_components(reach & reach.T), key=lambda part: -fitted[part].mean())
    return [sorted((names[index] for index in part), key=lambda n: -fitted[names.index(n)]) for part in bound]


def bradley_terry(
    first: Sequence[str],
    second: Sequence[str],
    shares: Float[np.ndarray, " N"],
    clusters: Sequence[Hashable],
    seed: int,
    weights: Float[np.ndarray, " N"] | None = None,
    anchor: str | None = None,
) -> BradleyTerry:
    """Strengths s with P(a beats b) = sigmoid(s_a - s_b), from comparisons in which the first model won a share in
    [0, 1] (a tie is one half, nan is left out), each with a weight of 1 unless given; intervals are a bootstrap over
    clusters, the prompts.

    Strengths are relative to the `anchor`, whose own is 0, or sum to zero. Raises ValueError for models that no chain
    of comparisons connects, for a model compared with itself and for an unknown anchor.
    """
    check_preferences(shares)
    row_weights = np.ones(len(shares)) if weights is None else weights
    rows: list[int] = np.flatnonzero(~np.isnan(shares) & (row_weights > 0)).tolist()
    first, second = [first[row] for row in rows], [second[row] for row in rows]
    names = list(dict.fromkeys([*first, *second]))
    _check(first, second, names, anchor)
    index = {name: i for i, name in enumerate(names)}
    ours, theirs = (np.array([index[name] for name in side]) for side in (first, second))
    games = _games(ours, theirs, shares[rows], row_weights[rows], [clusters[row] for row in rows])
    num_clusters = len(games.won)
    (fitted,) = _fit(games, np.ones((1, num_clusters)), len(names))
    groups = _groups(names, games, fitted)
    width = 1 + len(names) * max(len(names), len(games.pairs)) // num_clusters
    fits = np.concatenate([_fit(games, counts, len(names)) for counts in resampled_counts(num_clusters, seed, width)])
    if anchor is not None:
        fitted, fits = fitted - fitted[index[anchor]], fits - fits[:, index[anchor], None]
    order = sorted(names, key=lambda name: -fitted[index[name]])
    strengths = [
        ModelStrength(name, fitted[index[name]].item(), *percentile_interval(fits[:, index[name]])) for name in order
    ]
    return BradleyTerry(strengths, anchor, groups)
