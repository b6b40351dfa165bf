"""A reference that is the average, in weight space, of the policies that a run or its rounds came through."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from dpo_ref.component import component
from dpo_ref.files.writing import beside, needing_room, remove
from dpo_ref.models.adapters import PARTS, plain_name
from dpo_ref.models.asked import ModelSource
from dpo_ref.models.averages import OpenedPolicy, check_weights, open_policies, policies_at, write_average
from dpo_ref.references.interface import Reference, ReferenceContext
from dpo_ref.references.policies import Cache, check_same_text, model_reference
from dpo_ref.types import digest

KEY = "reference.path"


def _check(shares: list[float] | None, last: int | None, **_: Any) -> None:
    if last is not None and last < 2:
        raise ValueError(f"reference.last={last} must be at least 2 policies; one of them is reference=other")
    if shares is not None:
        check_weights(shares, last or len(shares), "reference.shares")


@component(check=_check)
def trajectory(
    context: ReferenceContext,
    *,
    path: str | list[str],
    shares: list[float] | None = None,
    last: int | None = None,
    cache: Cache = "auto",
) -> Reference:
    """The model sum_i w_i theta_i of policies that were come through, as in TPMM-DPO (arXiv:2605.23398), which learns
    the w_i; how it does so could not be read, so here they are given.

    `path` is a run, whose checkpoints are averaged, the `checkpoints/` of one, a pattern, or a list of runs (their
    policies: rounds), checkpoints and models; the `last` so many of them count, all unless given. `shares` are the
    w_i in their order, which sum to 1 and may be negative; equal unless given. Each tensor is summed in float64
    (`evaluate.py stage=merge` writes the same model). Raises ValueError for fewer than two, and for policies that are
    not alike, or not like the one that is trained.
    """
    files = policies_at(path, KEY)[-last if last else None :]
    if len(files) < (last or 2):
        raise ValueError(
            f"{KEY}={path} names {len(files)} policies, and reference=trajectory averages {last or 'two or more'}; a "
            "run keeps its checkpoints with trainer.save_every=<optimiser steps> trainer.keep_checkpoints=null"
        )
    weights = [1 / len(files)] * len(files) if shares is None else shares
    check_weights(weights, len(files), "reference.shares")
    policies = open_policies(files, KEY)
    check_same_text("trajectory", files[-1].name, policies[-1].tokenizer, context.policy)
    with _written(context.work.cache, policies, weights) as folder:
        model = context.work.loader.fresh(ModelSource(str(folder)))
    _check_like_policy(files[-1].name, model, context.policy.model)
    reference = model_reference("trajectory", model, context, cache)
    reference.notes = (*reference.notes, f"reference: the average of {len(files)} policies, the last {files[-1].name}")
    return reference


@contextmanager
def _written(cache: Path, policies: Sequence[OpenedPolicy], weights: Sequence[float]) -> Iterator[Path]:
    """Within, the folder of their average, which no two processes share: no second model is in memory to make it."""
    which = digest([[policy.digest, weight] for policy, weight in zip(policies, weights, strict=True)])
    folder = beside(cache / f"average-{which}")
    remove(folder)
    try:
        with needing_room(folder):
            folder.mkdir(parents=True)
            write_average(folder, policies, weights)
        yield folder
    finally:
        remove(folder)


def _check_like_policy(name: str, model: nn.Module, policy: nn.Module) -> None:
    """Raise ValueError unless a model has the weights of the policy, or of what is below its adapter."""
    theirs, ours = _shapes(model), _shapes(policy)
    for weight in sorted(ours.keys() | theirs.keys()):
        mine, its = (shapes.get(weight, "missing") for shapes in (ours, theirs))
        if mine not in (its, PACKED):
            raise ValueError(
                f"reference=trajectory: {name} is another architecture than the policy: {weight} is {its} in it and "
                f"{mine} in the policy; evaluate.py stage=merge makes a model of such policies, for reference=other"
            )


PACKED = "packed"  # weights that are held quantised


def _shapes(model: nn.Module) -> dict[str, str]:
    """The shapes of the weights below an adapter, by the names they have without it."""
    named = model.named_parameters()  # once each: a sharded head that is the embedding has none of its own
    kept = ((plain_name(name), weight) for name, weight in named if PARTS.isdisjoint(name.split(".")))
    return {name: str(list(weight.shape)) if weight.is_floating_point() else PACKED for name, weight in kept}
