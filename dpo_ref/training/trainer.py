"""The training loop. The method itself is `loss_and_metrics`; everything else is bookkeeping.

The loop is a generator of metrics per optimiser step: the caller logs, evaluates, saves and stops. It knows neither
Hydra nor W&B. Metrics are tensors on the device; a caller that reads them one step late never makes the device wait.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dpo_ref.data.packing import Pack, Pass, Share, WindowedPacks, collate, in_step, share_of
from dpo_ref.distributed import memory_for, ranks
from dpo_ref.models.checkpoint import random_states
from dpo_ref.models.experts import Routing
from dpo_ref.models.loading import TrainedModel
from dpo_ref.models.logps import response_collisions
from dpo_ref.models.next_token import BesideReference
from dpo_ref.models.shards import whole
from dpo_ref.objectives.interface import BatchLogps, Mismatched, Objective, ObjectiveInputs, Running
from dpo_ref.references.interface import Reference
from dpo_ref.training.metrics import Values, concat, item_values, mean_of
from dpo_ref.training.optim import Optimisation
from dpo_ref.training.rounds import Rounds
from dpo_ref.types import PackedBatch, PairLogps, Progress, ProgressIn, ResponseLogps, TokenGroup, silent

# --- statistics of an optimiser batch
# What objectives that couple the items of an optimiser batch must know before the first gradient: a forward pass over
# all of its packs, without gradient. Others cost nothing.


Passes = Iterable[Pass]  # of this rank, gone through more than once


@dataclass
class BatchStatistics:
    """None for what the objective does not ask for."""

    whole: BatchLogps[Any] | None = None
    mismatched: Mismatched | None = None

    def next_part(self, objective: Objective, batch: PackedBatch, counts: bool) -> BatchLogps[Any] | None:
        """The whole batch as the next pass's items see it; passes come in the order in which they were looked at. To
        one that does not count, other items are its own."""
        if self.whole is None:
            return None
        size = batch.num_pairs if objective.pairwise else len(batch.lengths)
        if not counts:
            return replace(self.whole, here=slice(0, size))
        start = self.whole.here.stop
        self.whole = replace(self.whole, here=slice(start, start + size))
        return self.whole


@torch.no_grad()
def batch_statistics(
    policy: TrainedModel, reference: Reference, objective: Objective, passes: Passes
) -> BatchStatistics:
    """What `objective` asks for of the passes of all ranks together."""
    return BatchStatistics(
        whole=_whole(policy, reference, objective, passes) if "whole" in objective.inputs else None,
        mismatched=_mismatched_logps(policy, reference, passes) if "mismatched" in objective.inputs else None,
    )


def _whole(policy: TrainedModel, reference: Reference, objective: Objective, passes: Passes) -> BatchLogps[Any]:
    models, labels = [], []
    for groups, counts in passes:
        batch = collate(groups).to(policy.device)
        both = policy.outputs(batch), reference.logps(batch)
        models.append([_counted(_items(logps, objective, batch), counts) for logps in both])
        labels.append(None if batch.labels is None else batch.labels[: len(batch.labels) if counts else 0])
    ours, theirs = (_concat(list(parts)) for parts in zip(*models, strict=True))
    stated = [part for part in labels if part is not None]
    said = {"labels": torch.cat(stated)} if len(stated) == len(labels) else {}
    first = next(column for column in _columns(ours).values() if column is not None)
    start = ranks().before(len(first))
    return BatchLogps(_of_all(ours), _of_all(theirs), ranks().columns(said).get("labels"), slice(start, start))


def _counted(part: Any, counts: bool) -> Any:
    """The items of a pass that counts; of another none."""
    if counts:
        return part
    return type(part)(*(None if column is None else column[:0] for column in _columns(part).values()))


def _of_all(part: Any) -> Any:
    """The items of all ranks, in their order."""
    columns = _columns(part)
    joined = ranks().columns({name: column for name, column in columns.items() if column is not None})
    return type(part)(*(joined.get(name) for name in columns))


def _columns(part: Any) -> dict[str, Tensor | None]:
    return {f.name: getattr(part, f.name) for f in fields(part)}


def _items(logps: ResponseLogps, objective: Objective, batch: PackedBatch) -> PairLogps | ResponseLogps:
    """The objective's items, without token values."""
    if objective.pairwise:
        return logps.pairs(batch.chosen, batch.rejected)
    return ResponseLogps(logps.sums, logps.lengths, logps.num_bytes, None)


def _concat(parts: list[Any]) -> Any:
    columns = ([getattr(part, f.name) for part in parts] for f in fields(parts[0]))
    return type(parts[0])(*(None if column[0] is None else torch.cat(column) for column in columns))


def _mismatched_logps(policy: TrainedModel, reference: Reference, passes: Passes) -> Mismatched:
    ours, theirs, largest = [], [], 0
    for groups, counts in passes:
        largest = max(largest, sum(group.num_tokens for group in groups))
        others = [group.mismatched for group in groups if group.mismatched is not None]
        if len(others) < len(groups):
            raise ValueError("the objective measures a KL on responses of other prompts; see training/rounds.py")
        for part, also_counts in in_step(list(_no_larger(others, largest))):
            batch = collate(part).to(policy.device)
            kept = len(batch.lengths) if counts and also_counts else 0
            ours.append(policy.outputs(batch).sums[:kept])
            theirs.append(reference.logps(batch).sums[:kept])
    return Mismatched(**ranks().columns({"policy": torch.cat(ours), "reference": torch.cat(theirs)}))


def _no_larger(groups: Sequence[TokenGroup], num_tokens: int) -> Iterator[list[TokenGroup]]:
    """The groups in their order, in packs of at most so many tokens; a longer group alone."""
    part: list[TokenGroup] = []
    for group in groups:
        if part and sum(each.num_tokens for each in part) + group.num_tokens > num_tokens:
            yield part
            part = []
        part.append(group)
    yield part


# --- the loop


Look = Callable[[Any, Any], None]  # at what policy and reference say of a pack


class Before(NamedTuple):
    """What a step began from, besides weights and moments."""

    random_states: Mapping[str, Tensor]
    running: Running  # the objective's statistics


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step: its 1-based index, the epochs of its groups completed, what was measured before its update:
    means, and the values of single items.

    Its update is `made` unless its loss or gradient norm, or those of a step before it, are not finite.
    """

    step: int
    before: Before
    made: Bool[Tensor, ""]  # on the device, which decides
    epoch: float
    metrics: dict[str, Tensor]
    values: Values
    groups: list[TokenGroup]
    num_tokens: int  # packed tokens forwarded
    share: Share  # what this rank did of them
    of_round: Mapping[str, float]  # the metrics of the round that begins with it
    preparing: float  # seconds that making this round took


def unseen(ours: Any, theirs: Any) -> None:
    """A look at nothing."""


def loss_and_metrics(
    policy: TrainedModel | BesideReference, objective: Objective, inputs: ObjectiveInputs, look: Look = unseen
) -> tuple[Tensor, Values]:
    """The method: the policy's outputs, the reference's (in `inputs`), the objective, its gradient."""
    loss, outputs = policy.loss(inputs.batch, lambda part, span: objective(part, inputs.part(span)).losses.sum())
    look(outputs, inputs.reference)
    outcome = objective(outputs, inputs)
    return loss, item_values(outcome, outputs, inputs)


def asked_of_both(
    policy: TrainedModel, reference: Reference, objective: Objective, batch: PackedBatch
) -> tuple[TrainedModel | BesideReference, ResponseLogps]:
    """The policy as the objective sees it, alone or beside the reference's next-token distributions, and the
    reference's log-probs."""
    if not objective.divergences:
        return policy, reference.logps(batch)
    theirs = reference.next_tokens(batch)
    return BesideReference(policy.model, theirs, objective.divergences), theirs.logps(batch)


def objective_inputs(
    policy: TrainedModel,
    reference: ResponseLogps,
    objective: Objective,
    batch: PackedBatch,
    statistics: BatchStatistics,
    old: Reference | None = None,
    counts: bool = True,
) -> ObjectiveInputs:
    """Everything the objective asks for besides the policy's log-probs; what it does not is not computed."""
    return ObjectiveInputs(
        batch,
        reference,
        old=old.logps(batch) if old is not None and "old" in objective.inputs else None,
        collision=response_collisions(policy.model, batch) if "collision" in objective.inputs else None,
        whole=statistics.next_part(objective, batch, counts),
        mismatched=statistics.mismatched,
        running=objective.running,
        quantiles=objective.quantiles and objective.quantiles(batch),
    )


def num_items(objective: Objective, groups: Sequence[TokenGroup]) -> int:
    """What the loss is a mean over: pairs, responses or prompts."""
    return sum(map(objective.num_items, groups))


def backward(
    policy: TrainedModel,
    reference: Reference,
    objective: Objective,
    share: Share,
    old: Reference | None = None,
    look: Look = unseen,
) -> tuple[Values, Routing]:
    """Accumulate the gradient of the mean loss over all items of an optimiser batch, and of a mixture's load-balancing
    loss where it is asked for; the items' values, and what the experts did. `share` is what this rank does of the
    batch.

    Every item weighs the same, however packer and ranks distribute them. `old` gives the log-probs of the policy that
    drew the responses. The objective's running statistic takes the batch in before its loss is computed, or its items'
    values after it. `look` sees what policy and reference say of the first pack.
    """
    total = num_items(objective, share.groups)
    routing = policy.routing(sum(group.num_tokens for group in share.groups))
    statistics = batch_statistics(policy, reference, objective, share.passes)
    if statistics.whole is not None:
        objective.step(statistics.whole)
    parts = []
    for index, (some, counts) in enumerate(share.passes, 1):
        work = memory_for("the forward and backward pass of", sum(group.num_tokens for group in some))
        with work, policy.holding.pass_of(last=index == len(share.passes)):
            batch = collate(some).to(policy.device)
            seen, theirs = asked_of_both(policy, reference, objective, batch)
            inputs = objective_inputs(policy, theirs, objective, batch, statistics, old, counts)
            with routing.observed(batch, counts) as added:
                loss, values = policy.holding.through(partial(loss_and_metrics, seen, objective, inputs, look))
            sum(added, start=loss * (counts / total)).backward()
        look = unseen
        parts.append(_of_items(values, counts))
    whole_values = ranks().columns(concat(parts))
    objective.end_step(whole_values)
    return whole_values, routing


def _of_items(values: Values, counts: bool) -> Values:
    """The values of a pass that counts; of another their names alone."""
    return values if counts else {name: value[:0] for name, value in values.items()}


def update(
    policy: TrainedModel, optim: Optimisation, step: int, finite: Bool[Tensor, ""]
) -> tuple[Float[Tensor, ""], Bool[Tensor, ""]]:
    """Clip and step; the gradient norm before clipping, and whether the update was made: where the norm or what came
    before is not finite, weights and moments are untouched. Decided on the device, so nothing waits for it."""
    limit = float("inf") if optim.max_grad_norm is None else optim.max_grad_norm
    norm = whole(nn.utils.clip_grad_norm_(policy.model.parameters(), limit))
    optim.parts.take_gradients()
    finite = finite & norm.isfinite()
    for group in optim.optimizer.param_groups:
        group["lr"] = optim.lr_at(step)
    optim.optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
    optim.optimizer.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue]
    with memory_for("the optimiser's step"):
        optim.optimizer.step()
    optim.optimizer.zero_grad(set_to_none=True)
    return norm, finite


def train(
    policy: TrainedModel,
    reference: Reference,
    objective: Objective,
    optim: Optimisation,
    rounds: Rounds,
    first_step: int = 0,
) -> Iterator[Step]:
    """Train `policy` in place from `first_step` (0-based, as a checkpoint says) to the end; yields after each step.

    From the first step on whose loss or gradient norm is not finite, nothing changes any more: neither weights,
    moments nor a reference that moves. Whoever reads that its update was not made restores what it began from
    (`Step.before`) and has the state before it, though the next step was begun. No other round is made after it.

    The data's order is a function of seed and step alone, so a resumed run sees what the uninterrupted one saw; the
    reference looks at the policy before the first step of each round. Raises ValueError where policy and reference are
    the same weights and yet give other log-probs (`step_zero`).
    """
    if first_step == 0:
        objective.running.clear()
    started, made = time.perf_counter(), torch.ones((), dtype=torch.bool, device=policy.device)
    for current in rounds.after(first_step):
        begins = first_step <= current.begin  # else a run goes on in the middle of it
        if begins:
            reference.begin_round(policy.model)
        of_round = current.metrics if begins else {}
        preparing = time.perf_counter() - started
        for step, groups in current.batches(first_step):
            policy.train()
            before = Before(random_states(), dict(objective.running))
            share = share_of(groups, rounds.pack)
            look = step_zero(policy, reference) if step == 0 else unseen
            values, routing = backward(policy, reference, objective, share, current.old, look)
            metrics = mean_of(values) | {f"objective/{name}": value for name, value in objective.running.items()}
            metrics |= routing.metrics()
            metrics["grad_norm"], made = update(policy, optim, step, made & metrics["loss"].isfinite())
            metrics["lr"] = torch.tensor(optim.lr_at(step))
            reference.update(policy.model, step + 1, made)
            epoch, tokens = current.epochs(step + 1), routing.num_tokens
            yield Step(step + 1, before, made, epoch, metrics, values, groups, tokens, share, of_round, preparing)
            of_round, preparing = {}, 0.0
        if not made:
            return
        started = time.perf_counter()


@torch.no_grad()
def evaluate(
    policy: TrainedModel,
    reference: Reference,
    objective: Objective,
    groups: Sequence[TokenGroup],
    pack: Pack,
    outputs_of: Callable[[PackedBatch], Any] | None = None,
    progress: Progress = silent,
) -> Values:
    """Values of every item of held-out groups; their means are the training metrics on them. To objectives that look
    at the whole batch they are one batch; the running statistic is read, not advanced. Besides the items' values no
    more is in memory than one pack and the groups of a window. `outputs_of` gives what the policy says of a pack where
    that is known already."""
    policy.model.eval()
    parts, passes = [], WindowedPacks(groups, pack)
    shown = ProgressIn(progress, "held-out pairs", len(groups))
    statistics = batch_statistics(policy, reference, objective, passes)
    for some, counts in passes:
        with memory_for("the evaluation of", sum(group.num_tokens for group in some)):
            batch = collate(some).to(policy.device)
            seen, theirs = asked_of_both(policy, reference, objective, batch)
            outputs = (outputs_of or seen.outputs)(batch)
            inputs = objective_inputs(policy, theirs, objective, batch, statistics, counts=counts)
            parts.append(_of_items(item_values(objective(outputs, inputs), outputs, inputs), counts))
        shown.advance(ranks().size * counts * len(some))
    return ranks().columns(concat(parts))


# --- before the first update


STEP_ZERO_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}  # nats on any token
# Half precision: (mean, largest). bfloat16 is 0.02 nats in the mean and 0.3 at most from float32
# (docs/performance_notes.md), and kernels that a compiler chooses by length round anew.
STEP_ZERO_TOLERANCE_HALF = (0.05, 1.0)


def step_zero(policy: TrainedModel, reference: Reference) -> Look:
    """The look at the first pack, before the first update: where policy and reference are the same weights that read
    the same text, their token log-probs must be the same too.

    It raises ValueError if a log-ratio exceeds 1e-5 nats in float32 (in half precision 1 nat, or 0.05 in the mean):
    then the two are not the same function of the text, and every margin of the run would carry the difference.
    """
    same = reference.weights and reference.weights == policy.weights
    if not same or reference.own_text or reference.strength != 1:
        return unseen
    half = torch.is_autocast_enabled(policy.device.type)

    def look(ours: ResponseLogps, theirs: ResponseLogps) -> None:
        gaps = (ours.tokens() - theirs.tokens()).abs().double()
        exact = None if half else STEP_ZERO_TOLERANCE.get(ours.tokens().dtype)
        mean_bound, bound = STEP_ZERO_TOLERANCE_HALF if exact is None else (exact, exact)
        if not (gaps.max() <= bound and gaps.mean() <= mean_bound):
            raise ValueError(
                f"step 0: policy and reference have the same weights, yet log-ratios of tokens are {gaps.max():.2g} "
                f"nats at most (bound {bound:g}) and {gaps.mean():.2g} in the mean (bound {mean_bound:g}): they do "
                "not score the same text in the same way"
            )

    return look
