"""Metric keys and their definitions, in one place, the same for training and held-out data; callers add the prefix."""

from collections.abc import Iterable
from functools import singledispatch
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dpo_ref.objectives.divergences import REVERSE_KL, NextTokenLogps, kl_per_token
from dpo_ref.objectives.interface import (
    Compared,
    Labelled,
    Likelihood,
    Mixed,
    ObjectiveInputs,
    Outcome,
    Preference,
    Ranked,
    Regressed,
    Sampled,
    Stepped,
)
from dpo_ref.types import PackedBatch, ResponseLogps, ResponseScores

Values = dict[str, Float[Tensor, "..."]]


MAY_LACK = ("eos/chosen_logratio",)  # nan where a reference with another tokenizer says nothing of a token
SATURATED = 4.0  # a margin beyond it has a gradient weight sigmoid(-margin) below 0.018 or above 0.982


@singledispatch
def values_of(outcome: Any, policy: Any, reference: ResponseLogps, batch: PackedBatch) -> Values:
    """Per-item values of one pack, by the kind of outcome."""
    raise TypeError(f"a {type(outcome).__name__} has no metrics")


def _last_token(logps: ResponseLogps, batch: PackedBatch) -> Float[Tensor, " N"] | None:
    """Log-prob of each response's last token, its end-of-turn token unless it was cut."""
    tokens = logps.aligned if logps.token_logps is None else logps.token_logps
    return None if tokens is None else tokens[batch.lengths.cumsum(0) - 1]


@values_of.register(Compared)
def compared_values(
    outcome: Preference | Compared,
    policy: ResponseLogps | ResponseScores,
    reference: ResponseLogps,
    batch: PackedBatch,
) -> Values:
    """Per-pair values that pairs have whatever their rewards are made of."""
    margins = outcome.chosen_rewards - outcome.rejected_rewards
    return {
        "loss": outcome.losses,
        "rewards/chosen": outcome.chosen_rewards,
        "rewards/rejected": outcome.rejected_rewards,
        "rewards/accuracies": (outcome.chosen_rewards > outcome.rejected_rewards).double(),
        "rewards/ties": (outcome.chosen_rewards == outcome.rejected_rewards).double(),
        "rewards/margins": margins,
        "rewards/saturated": (margins.abs() > SATURATED).double(),
        "lengths/chosen": batch.lengths[batch.chosen].double(),
        "lengths/rejected": batch.lengths[batch.rejected].double(),
    }


@values_of.register(Preference)
def pair_values(outcome: Preference, policy: ResponseLogps, reference: ResponseLogps, batch: PackedBatch) -> Values:
    """Per-pair values of everything whose mean is reported."""
    chosen, rejected = batch.chosen, batch.rejected
    logratios = policy.sums - reference.sums
    values = compared_values(outcome, policy, reference, batch) | {
        "logps/chosen": policy.sums[chosen],
        "logps/rejected": policy.sums[rejected],
        "ref_logps/chosen": reference.sums[chosen],
        "ref_logps/rejected": reference.sums[rejected],
        "ref/accuracy": (reference.sums[chosen] > reference.sums[rejected]).double(),
        "logratios/chosen": logratios[chosen],
        "logratios/rejected": logratios[rejected],
    }
    ours, theirs = _last_token(policy, batch), _last_token(reference, batch)
    if ours is not None and theirs is not None:
        values["eos/chosen_logratio"] = (ours - theirs)[chosen].double()
    return values


@values_of.register(Mixed)
def mixed_values(outcome: Mixed, policy: ResponseLogps, reference: ResponseLogps, batch: PackedBatch) -> Values:
    """Per-pair values of a mixture, and every part's losses before they are weighted."""
    pairs = Preference(outcome.losses, outcome.chosen_rewards, outcome.rejected_rewards)
    return pair_values(pairs, policy, reference, batch) | {
        f"loss/{name}": part for name, part in outcome.parts.items()
    }


@values_of.register(Stepped)
def stepped_values(outcome: Stepped, policy: ResponseLogps, reference: ResponseLogps, batch: PackedBatch) -> Values:
    """Per-pair values under strengths of the pairs' own, and which way each went."""
    return pair_values(Preference(*outcome[:3]), policy, reference, batch) | {"beta/step": outcome.steps}


@values_of.register(Regressed)
def regressed_values(
    outcome: Regressed, policy: ResponseLogps, reference: ResponseLogps, batch: PackedBatch
) -> Values:
    """Per-response values of rewards that are fitted to targets, and what pairs have where there are any."""
    values = {"loss": outcome.losses, "rewards/all": outcome.rewards, "rewards/targets": outcome.targets}
    if not batch.num_pairs:
        return values
    chosen, rejected = outcome.rewards[batch.chosen], outcome.rewards[batch.rejected]
    return pair_values(Preference(torch.zeros_like(chosen), chosen, rejected), policy, reference, batch) | values


@values_of.register(Ranked)
def ranked_values(outcome: Ranked, policy: ResponseLogps, reference: ResponseLogps, batch: PackedBatch) -> Values:
    """Losses of prompts, and everything else of all pairs of their rankings."""
    unweighed = Preference(torch.zeros_like(outcome.chosen_rewards), *outcome[1:])
    return pair_values(unweighed, policy, reference, batch) | {"loss": outcome.losses}


@values_of.register(Likelihood)
def likelihood_values(
    outcome: Likelihood, policy: ResponseLogps, reference: ResponseLogps, batch: PackedBatch
) -> Values:
    """Per-response values for objectives that fit single responses."""
    return {
        "loss": outcome.losses,
        "rewards/chosen": outcome.rewards,
        "logps/chosen": policy.sums,
        "lengths/chosen": batch.lengths.double(),
    }


@values_of.register(Labelled)
def labelled_values(outcome: Labelled, policy: ResponseLogps, reference: ResponseLogps, batch: PackedBatch) -> Values:
    """Per-response values for objectives on wanted (chosen) and unwanted (rejected) responses, and per-pair ones where
    the data has pairs."""
    assert batch.labels is not None
    values, logratios = {"loss": outcome.losses}, policy.sums - reference.sums
    for name, which in (("chosen", batch.labels), ("rejected", ~batch.labels)):
        values |= {
            f"rewards/{name}": outcome.rewards[which],
            f"logps/{name}": policy.sums[which],
            f"ref_logps/{name}": reference.sums[which],
            f"logratios/{name}": logratios[which],
            f"lengths/{name}": batch.lengths[which].double(),
        }
    chosen, rejected = outcome.rewards[batch.chosen], outcome.rewards[batch.rejected]
    return values | {
        "rewards/accuracies": (chosen > rejected).double(),
        "rewards/ties": (chosen == rejected).double(),
        "rewards/margins": chosen - rejected,
    }


@values_of.register(Sampled)
def sampled_values(outcome: Sampled, policy: ResponseLogps, reference: ResponseLogps, batch: PackedBatch) -> Values:
    """Per-response values for objectives on samples."""
    assert batch.advantages is not None
    return {
        "loss": outcome.losses,
        "advantages": batch.advantages,
        "logps/samples": policy.sums,
        "logratios/samples": policy.sums - reference.sums,
        "lengths/samples": batch.lengths.double(),
    }


def _kl_values(outputs: NextTokenLogps, batch: PackedBatch) -> Values:
    """Per-pair values of the KLs that were measured between next-token distributions: summed over the tokens of either
    response, and that from the reference per token of both, in nats."""
    sums = {divergence: values for divergence, values in outputs.divergences.sums.items() if divergence.metric}
    sides = {"chosen": batch.chosen, "rejected": batch.rejected}
    values = {f"kl/{d.metric}/{side}": each[at] for d, each in sums.items() for side, at in sides.items()}
    if REVERSE_KL in sums:
        values["kl/reverse/per_token"] = kl_per_token(outputs.divergences, batch)
    return values


def item_values(outcome: Outcome, outputs: ResponseLogps | ResponseScores, inputs: ObjectiveInputs) -> Values:
    """Per-item values of one pack, detached."""
    values = values_of(outcome, outputs, inputs.reference, inputs.batch)
    if isinstance(outputs, NextTokenLogps):
        values |= _kl_values(outputs, inputs.batch)
    return {name: value.detach() for name, value in values.items()}


def mean_of(values: Values) -> dict[str, Tensor]:
    """Means over all items, of what there is any of; scalars on the device."""
    return {
        name: value.nanmean() if name in MAY_LACK else value.mean() for name, value in values.items() if value.numel()
    }


def concat(parts: Iterable[Values]) -> Values:
    """The values of all items of an optimiser batch, whatever its packs."""
    columns: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, value in part.items():
            columns.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in columns.items()}
