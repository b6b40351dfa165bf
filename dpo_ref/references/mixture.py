"""Several references as one."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from dpo_ref.component import Component, MembersOf, RunPlan, component
from dpo_ref.objectives.interface import Objective
from dpo_ref.references.interface import Reference, ReferenceContext, check_strength, tempered
from dpo_ref.types import PackedBatch, ResponseLogps, digest


class Mixture(Reference):
    """The weighted mean of references: of log-probs (geometric), or of sequence probabilities (arithmetic). Parts that
    move go on doing so, and those that have a table keep it."""

    def __init__(self, parts: Sequence[Reference], weights: Sequence[float], mean: str) -> None:
        self._parts, self._shares, self._combine = parts, weights, MEANS[mean]
        self.name, self.live = "mixture", all(part.live for part in parts)
        self.normalised = mean == "arithmetic" and all(part.normalised for part in parts)
        self.own_text = any(part.own_text for part in parts)
        self.identity = digest([[part.identity for part in parts], list(weights), mean])
        self.values_digest = digest([part.values_digest or part.identity for part in parts])
        self.notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
        if any(part.weights for part in parts):  # the same on a device that computes in another dtype
            models = [[part.weights or part.identity, part.strength] for part in parts]
            self.weights = digest([models, list(weights), mean])

    @property
    def tables(self) -> tuple[str, ...]:
        """Those of the parts."""
        return tuple(dict.fromkeys(table for part in self._parts for table in part.tables))

    def digest_of(self, indices: Sequence[int]) -> str:
        """Of what the parts say, or which they are."""
        return digest([part.digest_of(indices) or part.identity for part in self._parts])

    def logps(self, batch: PackedBatch) -> ResponseLogps:
        """The combination of what the parts say."""
        return self._combine([part.logps(batch) for part in self._parts], self._shares)

    def update(self, policy: nn.Module, step: int, made: Bool[Tensor, ""]) -> None:
        """Move those parts that do."""
        for part in self._parts:
            part.update(policy, step, made)

    def begin_round(self, policy: nn.Module) -> None:
        """Let the parts look at the policy."""
        for part in self._parts:
            part.begin_round(policy)

    def state_dict(self) -> dict[str, Tensor]:
        """Those of the parts, with the part's number before the names."""
        states = (part.state_dict() for part in self._parts)
        return {f"{index}/{name}": value for index, state in enumerate(states) for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Give each part its own. Raises ValueError for a state of other parts."""
        numbered: dict[str, dict[str, Tensor]] = {str(index): {} for index in range(len(self._parts))}
        for key, value in state.items():
            index, _, name = key.partition("/")
            if index not in numbered:
                raise ValueError(f"the checkpoint holds {key} of another mixture than these {len(self._parts)} parts")
            numbered[index][name] = value
        for part, own in zip(self._parts, numbered.values(), strict=True):
            part.load_state_dict(own)


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


def _check(parts: list[Component], weights: list[float] | None, mean: str, **_: Any) -> None:
    """Refuse too few parts, weights that are none, and what has no probabilities to take the mean of."""
    if len(parts) < 2:
        raise ValueError("reference.parts of a mixture are at least two")
    shares = [1.0] * len(parts) if weights is None else weights
    if len(shares) != len(parts) or not all(0 < share < math.inf for share in shares):
        raise ValueError(f"reference.weights={shares} must be {len(parts)} positive numbers, one for each part")
    for index, part in enumerate(parts):
        with _named(index):
            check_strength(part.name, part.options["strength"])
            if mean == "arithmetic" and not _is_distribution(part):
                raise ValueError(
                    f"reference={part.name} is no distribution here (its probabilities of all responses do not sum to "
                    "1), and reference.mean=arithmetic is a mean of such; use reference.mean=geometric"
                )


@contextmanager
def _named(index: int) -> Iterator[None]:
    """What is refused inside is said of this part."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"reference.parts[{index}]: {error}") from error


def _is_distribution(part: Component) -> bool:
    """Whether its numbers are meant as log-probabilities: not the zeros of no reference, powers, or means of logs."""
    whole = part.name != "none" and part.options["strength"] == 1
    return whole and part.options.get("mean", "arithmetic") == "arithmetic"


def _check_run(objective: Objective, plan: RunPlan) -> None:
    """Refuse objectives in which the geometric mean's normaliser does not cancel, or the arithmetic lacks tokens, and
    what its parts refuse."""
    reference = plan.components["reference"]
    mean = reference.options["mean"]
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
    for index, part in enumerate(reference.parts):
        with _named(index):
            part.hooks.check_run(objective, replace(plan, components={**plan.components, "reference": part}))


@component(check=_check, check_run=_check_run)
def mixture(
    context: ReferenceContext,
    *,
    parts: Annotated[list[Any], MembersOf("reference")],
    weights: list[float] | None = None,
    mean: Literal["geometric", "arithmetic"] = "geometric",
) -> Reference:
    """Several references with weights that are made to sum to 1 (equal unless given).

    `parts` are references of any kind: their names, or {reference: <kind>, and its options}. `geometric` is the mean
    of log-probs: not normalised, which cancels within a pair; `arithmetic` the log of the mean of sequence
    probabilities. Before anything is loaded ValueError is raised for unknown parts or options, for weights that are
    not positive or not as many, and for a part that no mean of probabilities can be taken of.
    """
    shares = [1.0] * len(parts) if weights is None else weights
    context = replace(context, spans_serve=False)  # those of two parts need not end together
    references = [part.bound(tempered)(part(context)) for part in parts]
    return Mixture(references, [share / sum(shares) for share in shares], mean)
