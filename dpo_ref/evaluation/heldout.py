"""What models say about held-out preference pairs: the policy as a reward model, and the shift of the end token."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn

from dpo_ref.data.packing import collate, pack, share_of
from dpo_ref.distributed import ranks
from dpo_ref.evaluation import results
from dpo_ref.evaluation.statistics.estimates import clustered_mean
from dpo_ref.models.logps import response_logps
from dpo_ref.references.interface import Reference
from dpo_ref.types import PackedBatch, Progress, TokenGroup, silent


@dataclass(frozen=True, slots=True)
class PairEvaluation:
    """One model's log-probs of B held-out pairs: both responses, and the token that ends the chosen one."""

    chosen: Float[np.ndarray, " B"]
    rejected: Float[np.ndarray, " B"]
    chosen_end: Float[np.ndarray, " B"]
    chosen_ended: Bool[np.ndarray, " B"]  # False where the response was cut and has no end token
    chosen_lengths: Int[np.ndarray, " B"]
    rejected_lengths: Int[np.ndarray, " B"]
    prompts: tuple[tuple[int, ...], ...]


@torch.no_grad()
def score_pairs(
    model: nn.Module,
    groups: Sequence[TokenGroup],
    end_ids: Collection[int],
    progress: Progress = silent,
    *,
    tokens_per_batch: int = 8192,
) -> PairEvaluation:
    """Log-probs of every pair in `groups`, in order, under a model with packed attention; `end_ids` end a turn."""
    device, ends = next(model.parameters()).device, torch.tensor(sorted(end_ids))

    def measure(batch: PackedBatch) -> Float[Tensor, "4 N"]:
        scored, last = response_logps(model, batch), batch.lengths.cumsum(0) - 1
        ended = torch.isin(batch.target_ids[last], ends.to(device))
        per_response = (scored.sums, scored.token_logps[last], ended, batch.lengths)  # pyright: ignore
        return torch.stack([values.double() for values in per_response])

    table, members = _per_pair(groups, 4, measure, device, progress, tokens_per_batch)
    chosen, end, ended, length, rejected, _, _, rejected_length = table
    prompts = tuple(tuple(group.prompt_ids) for group in members)
    lengths = length.astype(np.int64), rejected_length.astype(np.int64)
    return PairEvaluation(chosen, rejected, end, ended.astype(bool), *lengths, prompts)


def reference_pairs(
    reference: Reference,
    groups: Sequence[TokenGroup],
    pairs: PairEvaluation,
    device: torch.device,
    *,
    tokens_per_batch: int = 8192,
) -> PairEvaluation:
    """The same pairs as scored by a reference of any kind; it need not know what the end token costs."""

    def measure(batch: PackedBatch) -> Float[Tensor, "1 N"]:
        return reference.logps(batch).sums.double()[None]

    (chosen, rejected), _ = _per_pair(groups, 1, measure, device, silent, tokens_per_batch)
    return replace(pairs, chosen=chosen, rejected=rejected, chosen_end=np.full_like(chosen, np.nan))


def _per_pair(
    groups: Sequence[TokenGroup],
    count: int,
    measure: Callable[[PackedBatch], Float[Tensor, "K N"]],
    device: torch.device,
    progress: Progress,
    tokens_per_batch: int,
) -> tuple[Float[np.ndarray, "_ B"], list[TokenGroup]]:
    """`count` values of the chosen and as many of the rejected response of every pair, and the group of each, in the
    groups' order whatever the packs."""
    paired = {group.group_index: group for group in groups if group.pairs}
    share = share_of(list(paired.values()), partial(pack, tokens_per_batch=tokens_per_batch))
    tables, owners = [torch.empty(2 * count, 0, dtype=torch.float64)], []
    for members, counts in progress(share.passes, "held-out pairs", len(share.passes)):
        batch = collate(members).to(device)
        table = measure(batch).cpu()
        if counts:
            tables.append(torch.cat([table[:, batch.chosen.cpu()], table[:, batch.rejected.cpu()]]))
            owners += [group.group_index for group in members for _ in group.pairs]
    named = {str(row): values for row, values in enumerate(torch.cat(tables, dim=1))}
    of_all = ranks().columns({"group": torch.tensor(owners, dtype=torch.long), **named})
    places = of_all.pop("group").numpy()
    order = np.argsort(places, kind="stable")
    return torch.stack(list(of_all.values())).numpy()[:, order], [paired[place] for place in places[order].tolist()]


def displacement(policy: PairEvaluation, initial: PairEvaluation) -> dict[str, float]:
    """How far the policy's log-probs of held-out pairs moved from the initial policy's, the end token's apart."""
    every = np.ones(len(policy.chosen), dtype=bool)
    moved = {
        results.LOGRATIO.of(side="chosen"): (policy.chosen - initial.chosen, every),
        results.LOGRATIO.of(side="rejected"): (policy.rejected - initial.rejected, every),
        results.END_CHOSEN.key: (policy.chosen_end - initial.chosen_end, policy.chosen_ended),
    }
    metrics: dict[str, float] = {}
    for name, (values, present) in moved.items():
        clusters = [prompt for prompt, keep in zip(policy.prompts, present, strict=True) if keep]
        estimate = clustered_mean(values[present], clusters)
        metrics |= {name: estimate.mean, f"{name}_se": estimate.se}
    return metrics


def heldout_metrics(policy: PairEvaluation, initial: PairEvaluation, reference: PairEvaluation) -> dict[str, float]:
    """Implicit-reward accuracy against the loss reference, beside the length-only baseline; how far the policy's
    log-probs moved from the initial policy's, the end token's apart.

    Rewards are log pi - log pi_ref (beta scales them and changes no accuracy). Raises ValueError for no pairs.
    """
    metrics = pair_accuracy(
        policy.chosen - reference.chosen,
        policy.rejected - reference.rejected,
        policy.chosen_lengths,
        policy.rejected_lengths,
    )
    return metrics | displacement(policy, initial)


# --- does the policy, seen as a reward model, rank pairs as their labels do, and better than by length?


def pair_accuracy(
    chosen_rewards: Float[np.ndarray, " B"],
    rejected_rewards: Float[np.ndarray, " B"],
    chosen_lengths: Num[np.ndarray, " B"],
    rejected_lengths: Num[np.ndarray, " B"],
) -> dict[str, float]:
    """Implicit-reward accuracy (strict: ties are wrong, and reported) beside the accuracy of preferring the longer
    response (equal lengths are a coin flip: half).

    The rewards are log pi - log pi_ref, or that times beta, which changes nothing here. Standard errors are those of
    a share. Raises ValueError for no pairs.
    """
    if len(chosen_rewards) == 0:
        raise ValueError("there are no held-out pairs; give data.eval_fraction or data.eval_path")
    margins = chosen_rewards - rejected_rewards
    longer = (np.sign(chosen_lengths - rejected_lengths) + 1) / 2
    accuracy = float((margins > 0).mean())
    return {
        results.ACCURACY.key: accuracy,
        f"{results.ACCURACY.key}_se": float(np.sqrt(accuracy * (1 - accuracy) / len(margins))),
        results.TIES.key: float((margins == 0).mean()),
        results.MARGIN.key: float(margins.mean()),
        results.LENGTH_BASELINE.key: float(longer.mean()),
        results.NUM_PAIRS.key: float(len(margins)),
    }
