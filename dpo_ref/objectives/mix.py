"""Several objectives as one: a weighted sum of their losses on the same pairs, from one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_ref.component import Hooks, component
from dpo_ref.objectives.interface import (
    OF_TOKENS,
    BatchLogps,
    Mixed,
    Objective,
    ObjectiveInputs,
    Running,
    TokenPairLogps,
    bind,
)
from dpo_ref.objectives.pairwise import dpo
from dpo_ref.objectives.unpaired import bco, sft
from dpo_ref.types import PairLogps, ResponseLogps, ResponseScores

MPO = (dpo, bco, sft)  # the parts of arXiv:2411.10442, which the default weights belong to


@component(bind=lambda **options: _mixed(**options))
def mix(
    losses: Sequence[Float[Tensor, " B"]],
    *,
    parts: list[Any] = [part.__name__ for part in MPO],  # noqa: B006  (read, never changed)
    weights: list[float] = [0.8, 0.2, 1.0],  # noqa: B006
) -> Float[Tensor, " B"]:
    """The sum of the parts' losses of a pair, each times its weight (MPO, arXiv:2411.10442: dpo, bco and the chosen
    response's likelihood).

    `parts` are names of objectives, or {objective: <name>, and its options}; they share one forward pass, and rewards
    are the first's, which must compare pairs. kto and bco see each pair as a wanted and an unwanted response, whose
    losses they add; sft sees the chosen one. Top-level `beta` is that of every part that has a strength and does not
    say its own. TRL: loss_type=[...], loss_weights=[...], whose "bco_pair" has no shift and whose "sft" is a mean over
    the tokens of the micro-batch.
    """
    return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum(0)


@dataclass(frozen=True, slots=True)
class MixedObjective(Objective):
    """An objective made of others. What one of them carries from step to step has its name in front."""

    parts: tuple[Objective, ...] = ()

    def outcome(self, policy: ResponseLogps | ResponseScores, inputs: ObjectiveInputs) -> Mixed:
        """Every part on the same pairs; the rewards are the first's."""
        assert isinstance(policy, ResponseLogps)
        first, *rest = self.parts
        rewarded: Any = first(policy, self._seen_by(first, inputs))
        losses = {first.name: rewarded.losses}
        losses |= {part.name: LOSSES[kind_of(part)](part, policy, self._seen_by(part, inputs)) for part in rest}
        return Mixed(self.function(list(losses.values())), rewarded.chosen_rewards, rewarded.rejected_rewards, losses)

    def _seen_by(self, part: Objective, inputs: ObjectiveInputs) -> ObjectiveInputs:
        batch = replace(inputs.batch, weights=None)  # of the pairs: they weigh the sum
        return replace(inputs, batch=batch, running=self._of(part, inputs.running))

    def step(self, whole: BatchLogps[PairLogps]) -> None:
        """Take an optimiser batch into the parts' running statistics."""
        for part in self.parts:
            if part.advance is not None:
                seen = whole if part.pairwise else whole_of_responses(whole)
                advanced = part.advance(self._of(part, self.running), seen)
                self.running.update({f"{part.name}.{key}": value for key, value in advanced.items()})

    @staticmethod
    def _of(part: Objective, running: Running | None) -> Running:
        prefix = f"{part.name}."
        named = (running or {}).items()
        return {key.removeprefix(prefix): value for key, value in named if key.startswith(prefix)}


# --- parts of any kind, on pairs


def kind_of(part: Objective) -> str:
    """What an objective sees: pairs, wanted and unwanted responses, or responses to be fitted. Raises ValueError for
    one that cannot be put on pairs of text."""
    if isinstance(part, MixedObjective):
        raise ValueError("objective.parts: mix is a mixture itself; name its parts")
    if part.settle is not None:
        raise ValueError(f"objective.parts: {part.name} moves its own beta by what came of its pairs; use it alone")
    if part.pairwise and not part.of_scores:
        return "pairs"
    if "labels" in part.inputs:
        return "labels"
    if set(part.inputs) == {"policy"} and not part.of_scores:
        return "likelihood"
    raise ValueError(
        f"objective.parts: {part.name} is no objective on the log-probs of pairs; parts are those that are, kto, bco "
        "and sft"
    )


def _on_pairs(part: Objective, policy: ResponseLogps, inputs: ObjectiveInputs) -> Float[Tensor, " B"]:
    return part(policy, inputs).losses


def _on_both(part: Objective, policy: ResponseLogps, inputs: ObjectiveInputs) -> Float[Tensor, " B"]:
    """Chosen is wanted and rejected is not; a pair's loss is the sum over its two responses."""
    batch = inputs.batch
    both = torch.stack([batch.chosen, batch.rejected], dim=1).flatten()
    rewards = None if batch.rewards is None else batch.rewards[both]
    seen = replace(
        inputs,
        batch=replace(batch, labels=_wanted(batch.num_pairs, both.device), rewards=rewards),
        reference=_at(inputs.reference, both),
        collision=None if inputs.collision is None else _at(inputs.collision, both),
        whole=None if inputs.whole is None else whole_of_responses(inputs.whole),
        divergences=None,  # a pair's; none of these parts looks at them
    )
    return part(_at(policy, both), seen).losses.unflatten(0, (-1, 2)).sum(1)


def _on_chosen(part: Objective, policy: ResponseLogps, inputs: ObjectiveInputs) -> Float[Tensor, " B"]:
    return part(_at(policy, inputs.batch.chosen), inputs).losses


LOSSES = {"pairs": _on_pairs, "labels": _on_both, "likelihood": _on_chosen}


def _at(logps: ResponseLogps, index: Tensor) -> ResponseLogps:
    """Some of the responses, without token values."""
    return ResponseLogps(logps.sums[index], logps.lengths[index], logps.num_bytes[index], None)


def _wanted(num_pairs: int, device: torch.device) -> Tensor:
    return torch.tensor([True, False], device=device).repeat(num_pairs)


def whole_of_responses(whole: BatchLogps[PairLogps]) -> BatchLogps[ResponseLogps]:
    """The responses of an optimiser batch's pairs, each chosen one before its rejected one."""

    def both(pairs: PairLogps) -> ResponseLogps:
        columns = (
            (pairs.chosen, pairs.rejected),
            (pairs.chosen_lengths, pairs.rejected_lengths),
            (pairs.chosen_bytes, pairs.rejected_bytes),
        )
        sums, lengths, sizes = (torch.stack(column, dim=1).flatten() for column in columns)
        return ResponseLogps(sums, lengths, sizes, None)

    labels = _wanted(len(whole.policy.chosen), whole.policy.chosen.device)
    here = slice(2 * whole.here.start, 2 * whole.here.stop)
    return BatchLogps(both(whole.policy), both(whole.reference), labels, here)


# --- from configuration


def _mixed(
    *,
    parts: Sequence[Objective] = (),
    weights: Sequence[float] = (0.8, 0.2, 1.0),
    nll_weight: float = 0.0,
    kl_weight: float = 0.0,
) -> MixedObjective:
    """The objective; MPO where no parts are named. Raises ValueError for what is no part, and for other weights than
    as many positive ones."""
    parts = tuple(parts) or tuple(map(bind, MPO))
    if len(parts) < 2:
        raise ValueError("objective.parts of a mixture are at least two")
    if kind_of(parts[0]) != "pairs":
        raise ValueError(
            f"objective.parts begins with {parts[0].name}: the first gives the rewards and compares pairs"
        )
    if len(weights) != len(parts) or not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"objective.weights={list(weights)} must be {len(parts)} positive numbers, one for each part")
    return MixedObjective(
        name="mix",
        function=partial(mix, weights=list(weights)),
        inputs=_inputs(parts),
        hooks=Hooks(fits_chosen=any(part.hooks.fits_chosen or kind_of(part) == "likelihood" for part in parts)),
        nll_weight=nll_weight,
        kl_weight=kl_weight,
        between=tuple(dict.fromkeys(divergence for part in parts for divergence in part.divergences)),
        parts=_named(parts),
    )


def _named(parts: Sequence[Objective]) -> tuple[Objective, ...]:
    """The parts with names of their own: a second dpo is dpo_2."""
    names = [part.name for part in parts]
    counts = [names[: index + 1].count(name) for index, name in enumerate(names)]
    both = zip(parts, names, counts, strict=True)
    return tuple(part if count == 1 else replace(part, name=f"{name}_{count}") for part, name, count in both)


def _inputs(parts: Sequence[Objective]) -> dict[str, Any]:
    """What all parts together are handed; pairs with token values where one of them looks at tokens."""
    names = dict.fromkeys(name for part in parts for name in part.inputs if name != "labels")
    kinds = {name: [part.inputs[name] for part in parts if name in part.inputs] for name in names}
    by_token = {name: TokenPairLogps if set(OF_TOKENS) & set(kinds[name]) else PairLogps for name in names}
    return {name: by_token[name] if name in ("policy", "reference") else kinds[name][0] for name in names}
