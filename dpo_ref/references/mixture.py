"""Several references as one."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from dpo_ref.component import RunPlan, component
from dpo_ref.objectives.interface import Objective
from dpo_ref.references.interface import Reference, ReferenceContext, tempered
from dpo_ref.references.policies import adapter_base, initial, interpolate, other, prior, uniform_token
from dpo_ref.references.served import served
from dpo_ref.types import PackedBatch, ResponseLogps, digest

KINDS = {
    function.__name__: function
    for function in (initial, other, prior, interpolate, uniform_token, served, adapter_base)
}


class Mixture(Reference):
    """The weighted mean of references: of log-probs (geometric), or of sequence probabilities (arithmetic)."""

    def __init__(self, parts: Sequence[Reference], weights: Sequence[float], mean: str) -> None:
        self.name, self.normalised, self.live = "mixture", mean == "arithmetic", all(part.live for part in parts)
        self._parts, self._shares, self._combine = parts, weights, MEANS[mean]
        self.identity = digest([[part.identity for part in parts], list(weights), mean])
        self.values_digest = digest([part.values_digest or part.identity for part in parts])
        self.notes = tuple(note for part in parts for note in part.notes)

    def digest_of(self, indices: Sequence[int]) -> str:
        """Of what the parts say, or which they are."""
        return digest([part.digest_of(indices) or part.identity for part in self._parts])

    def logps(self, batch: PackedBatch) -> ResponseLogps:
        """The combination of what the parts say."""
        return self._combine([part.logps(batch) for part in self._parts], self._shares)


def _geometric(parts: Sequence[ResponseLogps], shares: Sequence[float]) -> ResponseLogps:
    """sum_i w_i log p_i. Its normaliser depends on the prompt alone and cancels between the responses of a pair."""
    sums = sum(share * part.sums for share, part in zip(shares, parts, strict=True))
    tokens = None
    if all(part.token_logps is not None for part in parts):
        tokens = sum(share * part.tokens() for share, part in zip(shares, parts, strict=True))
    return ResponseLogps(sums, parts[0].lengths, parts[0].num_bytes, tokens)  # pyright: ignore[reportArgumentType]


def _arithmetic(parts: Sequence[ResponseLogps], shares: Sequence[float]) -> ResponseLogps:
    """log sum_i w_i p_i of whole sequences; tokens have no values of their own."""
    logs = torch.stack([part.sums + math.log(share) for share, part in zip(shares, parts, strict=True)])
    return ResponseLogps(logs.logsumexp(dim=0), parts[0].lengths, parts[0].num_bytes, None)


MEANS = {"geometric": _geometric, "arithmetic": _arithmetic}


def _check_run(objective: Objective, plan: RunPlan) -> None:
    """Refuse objectives in which the geometric mean's normaliser does not cancel, or the arithmetic lacks tokens."""
    mean = plan.components["reference"].options["mean"]
    if mean == "geometric" and not objective.constants_cancel:
        raise ValueError(
            "reference.mean=geometric: the mean of log-probs is not normalised, and a constant per prompt does not "
            f"cancel in objective={objective.name}; reference.mean=arithmetic is a distribution"
        )
    if mean == "arithmetic" and objective.needs_tokens:
        raise ValueError(
            f"reference.mean=arithmetic has log-probs of whole responses, and objective={objective.name} looks at "
            "single tokens of the reference; use reference.mean=geometric, or an objective on sums"
        )


@component(check_run=_check_run)
def mixture(
    context: ReferenceContext,
    *,
    parts: list[Any],
    weights: list[float] | None = None,
    mean: Literal["geometric", "arithmetic"] = "geometric",
) -> Reference:
    """Several references with weights that are made to sum to 1 (equal unless given).

    `parts` is a list of {reference: <kind>, and its options}, of a kind in `KINDS`. `geometric` is the mean of
    log-probs: not normalised, which cancels within a pair; `arithmetic` the log of the mean of sequence probabilities.
    Raises ValueError for unknown parts or options, and for weights that are not positive or not as many.
    """
    if len(parts) < 2:
        raise ValueError("reference.parts of a mixture are at least two")
    shares = [1.0] * len(parts) if weights is None else weights
    if len(shares) != len(parts) or not all(0 < share < math.inf for share in shares):
        raise ValueError(f"reference.weights={shares} must be {len(parts)} positive numbers, one for each part")
    references = [_part(entry, context) for entry in parts]
    return Mixture(references, [share / sum(shares) for share in shares], mean)


def _part(entry: Any, context: ReferenceContext) -> Reference:
    options = dict(entry) if isinstance(entry, Mapping) else {}
    kind, strength = options.pop("reference", None), options.pop("strength", 1.0)
    if kind not in KINDS:
        raise ValueError(f"reference.parts: {entry} is not {{reference: {'|'.join(KINDS)}, and its options}}")
    names = {n for n, p in inspect.signature(KINDS[kind]).parameters.items() if p.kind is p.KEYWORD_ONLY}
    if set(options) - names:
        unknown = ", ".join(sorted(set(options) - names))
        known = ", ".join(sorted({*names, "strength"}))
        raise ValueError(f"reference.parts: {unknown} is not an option of {kind}; known: {known}")
    return tempered(KINDS[kind](context, **options), strength=strength)
