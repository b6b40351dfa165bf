"""The training loop. The method itself is `loss_and_metrics`; everything else is bookkeeping.

The loop is a generator of metrics per optimiser step: the caller logs, evaluates, saves and stops. It knows neither
Hydra nor W&B. Metrics are tensors on the device; a caller that reads them one step late never makes the device wait.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from dpo_ref.data.packing import collate, optimiser_batches, steps_per_epoch
from dpo_ref.models.logps import (
    fused_loss,
    head_of,
    response_collisions,
    response_hidden,
    response_logps,
    response_scores,
)
from dpo_ref.objectives.interface import Known, Mismatched, Objective, Running, WholeBatch
from dpo_ref.references.interface import Reference
from dpo_ref.training.metrics import Values, joined, mean_of, values_of
from dpo_ref.training.optim import Optimisation
from dpo_ref.types import PackedBatch, PairLogps, ResponseLogps, ResponseScores, Span, TokenGroup

# --- a look ahead
# What objectives that couple the items of an optimiser batch must know before the first gradient: a forward pass over
# all of its packs, without gradient. Others cost nothing.


Packs = list[list[TokenGroup]]


@dataclass
class Lookahead:
    """What was found; None where the objective does not ask for it."""

    whole: WholeBatch[Any] | None = None
    mismatched: Mismatched | None = None

    def next_part(self, objective: Objective, batch: PackedBatch) -> WholeBatch[Any] | None:
        """The whole batch as the next pack's items see it; packs come in the order in which they were looked at."""
        if self.whole is None:
            return None
        start = self.whole.here.stop
        stop = start + (batch.num_pairs if objective.pairwise else len(batch.lengths))
        self.whole = replace(self.whole, here=slice(start, stop))
        return self.whole


@torch.no_grad()
def looked_ahead(
    policy: nn.Module, reference: Reference, objective: Objective, packs: Packs, device: torch.device
) -> Lookahead:
    """What `objective` asks for of these packs together."""
    return Lookahead(
        whole=_whole(policy, reference, objective, packs, device) if "whole" in objective.takes else None,
        mismatched=_mismatched(policy, reference, packs, device) if "mismatched" in objective.takes else None,
    )


def _whole(
    policy: nn.Module, reference: Reference, objective: Objective, packs: Packs, device: torch.device
) -> WholeBatch[Any]:
    found, labels = [], []
    for groups in packs:
        batch = collate(groups).to(device)
        both = response_logps(policy, batch), reference.logps(batch)
        found.append([_items(logps, objective, batch) for logps in both])
        labels.append(batch.labels)
    ours, theirs = (_joined(list(parts)) for parts in zip(*found, strict=True))
    known = [part for part in labels if part is not None]
    return WholeBatch(ours, theirs, torch.cat(known) if len(known) == len(labels) else None, slice(0, 0))


def _items(logps: ResponseLogps, objective: Objective, batch: PackedBatch) -> PairLogps | ResponseLogps:
    """The objective's items, without token values."""
    if objective.pairwise:
        return logps.pairs(batch.chosen, batch.rejected)
    return ResponseLogps(logps.sums, logps.lengths, logps.num_bytes, None)


def _joined(parts: list[Any]) -> Any:
    columns = ([getattr(part, f.name) for part in parts] for f in fields(parts[0]))
    return type(parts[0])(*(None if column[0] is None else torch.cat(column) for column in columns))


def _mismatched(policy: nn.Module, reference: Reference, packs: Packs, device: torch.device) -> Mismatched:
    ours, theirs = [], []
    for groups in packs:
        others = [group.mismatched for group in groups if group.mismatched is not None]
        if len(others) < len(groups):
            raise ValueError("the objective measures a KL on responses of other prompts; see training/rounds.py")
        batch = collate(others).to(device)
        ours.append(response_logps(policy, batch).sums)
        theirs.append(reference.logps(batch).sums)
    return Mismatched(torch.cat(ours), torch.cat(theirs))


# --- the loop


Pack = Callable[[Sequence[TokenGroup]], list[list[TokenGroup]]]
STEP_ZERO_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}  # nats per token
STEP_ZERO_TOLERANCE_HALF = 0.1


@dataclass
class TrainerConfig:
    """`trainer.*`. Cadences are in optimiser steps; training ends at whichever of epochs and max_steps comes first."""

    batch_size: int = 32  # groups (pairs) per optimiser step
    epochs: float = 1.0
    max_steps: int | None = None
    eval_every: int | None = None  # None: before and after training only
    save_every: int | None = None  # None: at the end and when interrupted only
    keep_checkpoints: int | None = 1  # the newest; None: all
    stop_when_degenerate: bool = False  # end the run once an evaluation in training says so

    def __post_init__(self) -> None:
        names = ("batch_size", "epochs", "max_steps", "eval_every", "save_every", "keep_checkpoints")
        values = {name: getattr(self, name) for name in names}
        for name, value in values.items():
            if value is not None and value <= 0:
                raise ValueError(f"trainer.{name}={value} must be positive; null leaves it out")

    def num_steps(self, num_groups: int) -> int:
        """Optimiser steps of the whole run."""
        steps = max(1, round(self.epochs * steps_per_epoch(num_groups, self.batch_size)))
        return steps if self.max_steps is None else min(steps, self.max_steps)


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step: its 1-based number, the epochs of its groups completed, what was measured before its update:
    means, and the values of single items."""

    step: int
    epoch: float
    metrics: dict[str, Tensor]
    values: Values
    groups: list[TokenGroup]
    num_tokens: int  # packed tokens forwarded
    num_packs: int  # micro-batches they were packed into


def loss_and_metrics(policy: nn.Module, objective: Objective, known: Known) -> tuple[Tensor, Values]:
    """Summed loss over the pack's items, with its gradient ready, and the items' values."""
    return LOSSES[objective.asks](policy, objective, known)


def _loss_of_scores(policy: nn.Module, objective: Objective, known: Known) -> tuple[Tensor, Values]:
    scores = response_scores(policy, known.batch)
    outcome = objective(scores, known)
    return outcome.losses.sum(), values_of(outcome, scores, known.reference, known.batch)


def _loss_of_logps(policy: nn.Module, objective: Objective, known: Known) -> tuple[Tensor, Values]:
    def loss_of(policy_logps: ResponseLogps, span: Span) -> Tensor:
        return objective(policy_logps, known.part(span)).losses.sum()

    loss, policy_logps = fused_loss(response_hidden(policy, known.batch), head_of(policy), known.batch, loss_of)
    outcome = objective(policy_logps, known)
    return loss, values_of(outcome, policy_logps, known.reference, known.batch)


LOSSES = {ResponseLogps: _loss_of_logps, ResponseScores: _loss_of_scores}
ASKED = {ResponseLogps: response_logps, ResponseScores: response_scores}


def known_of(
    policy: nn.Module,
    reference: Reference,
    objective: Objective,
    batch: PackedBatch,
    old: Reference | None,
    ahead: Lookahead,
    running: Running | None,
) -> Known:
    """Everything the objective asks for besides the policy's log-probs; what it does not is not computed."""
    return Known(
        batch,
        reference.logps(batch),
        old=old.logps(batch) if old is not None and "old" in objective.takes else None,
        collision=response_collisions(policy, batch) if "collision" in objective.takes else None,
        whole=ahead.next_part(objective, batch),
        mismatched=ahead.mismatched,
        running={} if running is None else running,
    )


def num_items(objective: Objective, groups: Sequence[TokenGroup]) -> int:
    """What the loss is a mean over: pairs, or responses."""
    return sum(len(group.pairs) if objective.pairwise else len(group.response_ids) for group in groups)


def backward(
    policy: nn.Module,
    reference: Reference,
    objective: Objective,
    packs: list[list[TokenGroup]],
    device: torch.device,
    old: Reference | None = None,
    running: Running | None = None,
) -> tuple[Values, int]:
    """Accumulate the gradient of the mean loss over all items of the packs; the items' values, and packed tokens.

    Every item weighs the same, however the packer distributed them. `old` gives the log-probs of the policy that drew
    the responses; `running`, the objective's running statistic, is advanced by this batch in place.
    """
    total = num_items(objective, [group for groups in packs for group in groups])
    ahead = looked_ahead(policy, reference, objective, packs, device)
    if running is not None and ahead.whole is not None:
        objective.step(running, ahead.whole)
    parts, num_tokens = [], 0
    for groups in packs:
        batch = collate(groups).to(device)
        known = known_of(policy, reference, objective, batch, old, ahead, running)
        loss, values = loss_and_metrics(policy, objective, known)
        (loss / total).backward()
        parts.append(values)
        num_tokens += len(batch.input_ids)
    return joined(parts), num_tokens


def update(policy: nn.Module, optim: Optimisation, step: int) -> Tensor:
    """Clip, step, and return the gradient norm before clipping. A non-finite gradient leaves the weights untouched;
    the decision is taken on the device, so nothing waits for it."""
    limit = float("inf") if optim.max_grad_norm is None else optim.max_grad_norm
    norm = nn.utils.clip_grad_norm_(policy.parameters(), limit)
    for group in optim.optimizer.param_groups:
        group["lr"] = optim.lr_at(step)
    optim.optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
    optim.optimizer.found_inf = (~norm.isfinite()).float()  # pyright: ignore[reportAttributeAccessIssue]
    optim.optimizer.step()
    optim.optimizer.zero_grad(set_to_none=True)
    return norm


def train(
    policy: nn.Module,
    reference: Reference,
    objective: Objective,
    optim: Optimisation,
    groups: Sequence[TokenGroup],
    pack: Pack,
    config: TrainerConfig,
    *,
    seed: int,
    begin: int = 0,
    first_step: int = 0,
    old: Reference | None = None,
    running: Running | None = None,
) -> Iterator[Step]:
    """Train `policy` in place from `first_step` (0-based, as a checkpoint says) to the end; yields after each step.

    `begin` is the step at which these groups come in, where others were trained on before: the run's steps are counted
    through, epochs are those of these groups. The data's order is a function of seed and step alone, so a resumed run
    sees what the uninterrupted one saw. `old` gives the log-probs of the policy that drew the responses, for
    objectives that ask for them. `running` is what the objective carries from step to step, as a checkpoint says; it
    is advanced in place.
    """
    device = next(policy.parameters()).device
    per_epoch = steps_per_epoch(len(groups), config.batch_size)
    first_step = max(begin, first_step)
    batches = optimiser_batches(groups, config.batch_size, seed, first_step - begin)
    running = {} if running is None else running
    for step in range(first_step, begin + config.num_steps(len(groups))):
        _, batch_groups = next(batches)
        policy.train()
        packs = pack(batch_groups)
        values, num_tokens = backward(policy, reference, objective, packs, device, old, running)
        metrics = mean_of(values) | {f"objective/{name}": value for name, value in running.items()}
        metrics["grad_norm"] = update(policy, optim, step)
        metrics["lr"] = torch.tensor(optim.lr_at(step))
        reference.update(policy, step + 1)
        yield Step(step + 1, (step + 1 - begin) / per_epoch, metrics, values, batch_groups, num_tokens, len(packs))


@torch.no_grad()
def evaluate(
    policy: nn.Module,
    reference: Reference,
    objective: Objective,
    groups: Sequence[TokenGroup],
    pack: Pack,
    old: Reference | None = None,
    running: Running | None = None,
) -> Values:
    """Values of every item of held-out groups; their means are the training metrics on them. To objectives that look
    at the whole batch they are one batch; `running` is read, not advanced."""
    policy.eval()
    device = next(policy.parameters()).device
    parts, packs = [], pack(groups)
    ahead = looked_ahead(policy, reference, objective, packs, device)
    for pack_groups in packs:
        batch = collate(pack_groups).to(device)
        said = ASKED[objective.asks](policy, batch)
        known = known_of(policy, reference, objective, batch, old, ahead, running)
        parts.append(values_of(objective(said, known), said, known.reference, batch))
    return joined(parts)


@torch.no_grad()
def check_step_zero(policy: nn.Module, reference: Reference, groups: Sequence[TokenGroup]) -> None:
    """When policy and reference are the same weights, their token log-probs must be too.

    Raises ValueError if a log-ratio exceeds 1e-5 nats in float32 (0.1 in half precision): then the two are not the
    same function of the text, and every margin of the run would carry the difference.
    """
    device = next(policy.parameters()).device
    policy.eval()
    batch = collate(groups).to(device)
    ours, theirs = response_logps(policy, batch).tokens(), reference.logps(batch).tokens()
    half = torch.is_autocast_enabled(device.type)
    bound = STEP_ZERO_TOLERANCE_HALF if half else STEP_ZERO_TOLERANCE.get(ours.dtype, STEP_ZERO_TOLERANCE_HALF)
    gap = float((ours - theirs).abs().max())
    if not gap <= bound:
        raise ValueError(
            f"step 0: policy and reference have the same weights, yet a token's log-ratio is {gap:.2g} nats "
            f"(bound {bound:g}): they do not score the same text in the same way"
        )
