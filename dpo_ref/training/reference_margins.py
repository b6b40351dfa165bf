"""Training pairs chosen and weighed by the reference: `data.reference_margin` and `data.reference_weight`.

The reference margin of a pair is D_ref = log pi_ref(chosen) - log pi_ref(rejected), in nats; a pair is pessimistic
where it is negative: the reference prefers the rejected response. Pairs with clear margins are said to train as well
with a third to a half of the data (arXiv:2501.15109). Held-out pairs are never chosen among.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from dpo_ref.component import Component
from dpo_ref.data.groups import Groups
from dpo_ref.data.packing import Pack
from dpo_ref.files.digests import bytes_digest
from dpo_ref.objectives.interface import Objective
from dpo_ref.references.interface import Reference
from dpo_ref.references.table import logps_of_groups
from dpo_ref.types import PromptGroup, TokenGroup, digest

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
BINS = 40


# --- what is asked for


@dataclass(frozen=True, slots=True)
class ByReference:
    """Which reference margins are kept, [low, high] in nats, an end left open where it is None; and the scale of
    weights, in nats, None for pairs that all weigh the same."""

    low: float | None = None
    high: float | None = None
    scale: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What was given, as one types it."""
        ends = ["null" if end is None else f"{end:g}" for end in (self.low, self.high)]
        band = {} if self.low is self.high is None else {"data.reference_margin": f"[{','.join(ends)}]"}
        return band | ({} if self.scale is None else {"data.reference_weight": f"{self.scale:g}"})

    def keeps(self, margins: Float[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
        """Which of the pairs are trained on."""
        low, high = -np.inf if self.low is None else self.low, np.inf if self.high is None else self.high
        return (margins >= low) & (margins <= high)

    def weights(self, margins: Float[np.ndarray, " B"]) -> Float[np.ndarray, " B"] | None:
        """w = sigmoid(D_ref / scale), divided by the mean over the pairs: how sure the reference itself is of the
        label, as a Bradley-Terry judge whose reward is its log-prob / scale. Ours; no paper's. Raises ValueError where
        nothing would be left of any."""
        if self.scale is None:
            return None
        raw = np.exp(-np.logaddexp(0.0, -margins / self.scale))
        if not raw.any():
            raise ValueError(
                f"data.reference_weight={self.scale:g} gives every pair the weight 0: the reference prefers each "
                f"rejected response by {-margins.max():.3g} nats and more; use a larger scale"
            )
        return raw / raw.mean()


def by_reference(
    *, reference_margin: list[float | None] | None = None, reference_weight: float | None = None
) -> ByReference:
    """What all data members take: `reference_margin=[low, high]` keeps training pairs whose reference margin lies
    between, in nats (null leaves an end open); `reference_weight` multiplies each pair's loss with
    sigmoid(margin / reference_weight), made 1 in the mean. Raises ValueError for what is no band and no scale."""
    band = reference_margin or [None, None]
    if len(band) != 2 or (reference_margin is not None and band == [None, None]):
        raise ValueError(
            f"data.reference_margin={reference_margin} must be [low, high] in nats, of which one may be null, such as "
            "[0, null]"
        )
    low, high = band
    if low is not None and high is not None and not low < high:
        raise ValueError(f"data.reference_margin=[{low:g}, {high:g}] is empty: the first must be below the second")
    if reference_weight is not None and not 0 < reference_weight < float("inf"):
        raise ValueError(
            f"data.reference_weight={reference_weight} must be a positive number of nats; null weighs none"
        )
    return ByReference(low, high, reference_weight)


def check_by_reference(choice: ByReference, objective: Objective, reference: Component, data: Component) -> None:
    """Raise ValueError, before anything is loaded, where no reference could choose, or nothing be weighed."""
    for option, value in choice.options.items():
        key = f"{option}={value}"
        if data.hooks.rounds is not None:
            raise ValueError(f"{key}: data={data.name} makes its pairs while the policy is trained; leave it out")
        if not objective.uses_reference:
            raise ValueError(f"{key} has no effect: objective={objective.name} uses no reference; leave it out")
        if not objective.pairwise:
            raise ValueError(f"{key} is about pairs, and objective={objective.name} is not; use one on pairs, as dpo")
        if unfit := _unfit(reference):
            raise ValueError(f"{key}: {unfit}; use one such as reference=initial")
        if reference.options.get("cache") == "off":
            raise ValueError(
                f"{key} needs the reference's log-probs of all training pairs before training, and it is asked at "
                "every step; leave reference.cache=off out, and what needs the reference in memory"
            )
    if choice.scale is not None and "whole" in objective.inputs:
        raise ValueError(
            f"data.reference_weight={choice.scale:g}: objective={objective.name} couples the pairs of a batch, so "
            "they have no losses of their own to weigh; data.reference_margin leaves pairs out"
        )


def _unfit(reference: Component) -> str | None:
    """Why a reference cannot choose pairs before training; None where it can."""
    if reference.name == "none":  # as a part of a mixture it has margins smaller, and not 0
        return "reference=none gives every response 0, and every margin is 0"
    return _follower(reference)


def _follower(reference: Component) -> str | None:
    """What of a reference, or of a mixture's parts, changes with the policy."""
    if reference.hooks.follows:
        return f"reference={reference.name} changes while the policy is trained, and pairs are chosen before"
    return next(filter(None, map(_follower, reference.parts)), None)


# --- chosen


class ChosenPairs(Groups):
    """Groups with those of their pairs that are kept, and what these weigh. All responses of a group stay: a table
    knows them together."""

    def __init__(
        self,
        groups: Groups,
        ends: Int[np.ndarray, " G"],
        kept: Bool[np.ndarray, " B"],
        weights: Float[np.ndarray, " B"] | None,
    ) -> None:
        """`ends` is where each group's pairs end among all; `weights` are of all pairs."""
        self.groups, self._ends, self._kept, self._weights = groups, ends, kept, weights
        counts = np.add.reduceat(kept, np.concatenate([[0], ends[:-1]])) if len(ends) else np.zeros(0)
        self.positions = np.flatnonzero(counts).tolist()

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> TokenGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenGroup]: ...
    def __getitem__(self, index: int | slice) -> TokenGroup | list[TokenGroup]:
        if isinstance(index, slice):
            return [self._group(position) for position in self.positions[index]]
        return self._group(self.positions[index])

    def _group(self, position: int) -> TokenGroup:
        group = self.groups[position]
        end = int(self._ends[position])
        kept = self._kept[end - len(group.pairs) : end]
        weights = None if self._weights is None else self._weights[end - len(group.pairs) : end][kept]
        pairs = tuple(compress(group.pairs, kept))
        return replace(group, pairs=pairs, weights=None if weights is None else tuple(weights.tolist()))

    @property
    def digest(self) -> str:
        """Of the groups, which of their pairs these are, and what they weigh."""
        weights = b"" if self._weights is None else self._weights.tobytes()
        return digest([self.groups.digest, bytes_digest(self._kept.tobytes()), bytes_digest(weights)])

    def text(self, index: int) -> PromptGroup:
        """The texts of the group at this position, with all its pairs."""
        return self.groups.text(self.positions[index])


@dataclass(frozen=True, slots=True)
class Chosen:
    """Training pairs as the reference has chosen and weighed them. `weights` are of those that are kept."""

    groups: ChosenPairs
    margins: Float[np.ndarray, " B"]
    kept: Bool[np.ndarray, " B"]
    weights: Float[np.ndarray, " K"] | None

    @property
    def counts(self) -> dict[str, int]:
        """What became of pairs, for the run's summary."""
        return {
            "pessimistic pairs": int((self.margins < 0).sum()),
            "pairs kept by their reference margin": int(self.kept.sum()),
            "pairs left out by their reference margin": int((~self.kept).sum()),
        }

    def line(self, choice: ByReference) -> str:
        """What the user is told."""
        pairs, (wrong, kept, left) = len(self.margins), self.counts.values()
        words = [f"the reference prefers the rejected response in {wrong:,} of {pairs:,} training pairs"]
        if "data.reference_margin" in choice.options:
            words.append(
                f"{kept:,} are kept with a margin in {choice.options['data.reference_margin']}, {left:,} are not"
            )
        if self.weights is not None:
            words.append(f"their weights are {self.weights.min():.2g} to {self.weights.max():.2g}")
        return "reference margins: " + "; ".join(words)

    def record(self, choice: ByReference, reference: Reference) -> dict[str, Any]:
        """What is kept of them in the run's folder: quantiles and a histogram, in nats."""
        edges = np.histogram_bin_edges(self.margins, BINS)
        return {
            "reference": reference.name,
            "identity": reference.identity,
            "margin": "log p(chosen) - log p(rejected) of training pairs under the reference, in nats",
            "options": choice.options,
            "pairs": len(self.margins),
            **self.counts,
            "pessimistic share": float((self.margins < 0).mean()),
            "quantiles": quantiles_of(self.margins),
            "quantiles of the kept": quantiles_of(self.margins[self.kept]),
            "weights": None if self.weights is None else quantiles_of(self.weights),
            "histogram": {
                "edges": edges.tolist(),
                "pairs": np.histogram(self.margins, edges)[0].tolist(),
                "kept": np.histogram(self.margins[self.kept], edges)[0].tolist(),
            },
        }


def quantiles_of(values: Float[np.ndarray, " B"]) -> dict[str, float]:
    """By their per cent."""
    return {f"{100 * q:g} %": float(value) for q, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}


def margins_of(
    reference: Reference, groups: Groups, pack: Pack, device: torch.device
) -> tuple[Float[np.ndarray, " B"], Int[np.ndarray, " G"]]:
    """Reference margins of all pairs, group after group, in nats; and where each group's end among them."""
    margins: list[float] = []
    ends = np.zeros(len(groups), dtype=np.int64)
    for index, (group, logps) in enumerate(zip(groups, logps_of_groups(reference, groups, pack, device), strict=True)):
        margins += [float(logps[better] - logps[worse]) for better, worse in group.pairs]
        ends[index] = len(margins)
    return np.array(margins), ends


def given_margins(groups: Iterable[PromptGroup]) -> Float[np.ndarray, " B"]:
    """Margins by the log-probs that came with the rows, in nats, of the pairs that have both; no model is asked."""
    brought = ((group.logps, group.pairs) for group in groups if group.logps is not None)
    margins = np.array([logps[better] - logps[worse] for logps, pairs in brought for better, worse in pairs])
    return margins[np.isfinite(margins)]


def chosen_pairs(
    choice: ByReference, reference: Reference, groups: Groups, pack: Pack, device: torch.device
) -> Chosen:
    """The training pairs that the reference keeps. Raises ValueError for a reference that moves, and where none is
    left, with the margins that there are."""
    if reference.state_dict():
        raise ValueError(
            f"{next(iter(choice.options))}: reference={reference.name} has a part that moves while the policy is "
            "trained; use one that stays"
        )
    margins, ends = margins_of(reference, groups, pack, device)
    kept = choice.keeps(margins)
    if not kept.any():
        there = ", ".join(f"{value:.3g} ({name})" for name, value in quantiles_of(margins).items())
        raise ValueError(
            f"data.reference_margin={choice.options['data.reference_margin']} leaves none of {len(margins):,} "
            f"training pairs: their margins under reference={reference.name} are, in nats, {there}"
        )
    of_kept = choice.weights(margins[kept])
    weights = None
    if of_kept is not None:
        weights = np.zeros(len(margins))
        weights[kept] = of_kept
    return Chosen(ChosenPairs(groups, ends, kept, weights), margins, kept, of_kept)


def told_of(margins: Float[np.ndarray, " B"], choice: ByReference) -> Mapping[str, str]:
    """What pages say of margins: how many are negative, and what would be kept."""
    said = {"pessimistic pairs": f"{(margins < 0).mean():.1%} of {len(margins):,}"}
    kept = choice.keeps(margins)
    if "data.reference_margin" in choice.options:
        band = choice.options["data.reference_margin"]
        said[f"data.reference_margin={band} keeps"] = f"{kept.sum():,} ({kept.mean():.1%})"
    if kept.any() and (weights := choice.weights(margins[kept])) is not None:
        said[f"data.reference_weight={choice.scale:g} weighs them"] = f"{weights.min():.2g} to {weights.max():.2g}"
    return said
